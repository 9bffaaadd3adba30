"""``python -m launch.report runs/demo`` (or ``run.name=demo``): write the run's ``report.html``.

``python -m launch.report runs/demo --watch`` writes it again whenever the run has something new,
until Ctrl-C; the page reloads itself in the browser. ``python -m launch.report workspace runs/demo
tracking.entity=TEAM`` builds the run's W&B workspace.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from longrope2.command import run_command
from longrope2.config import RunConfig, compose
from longrope2.errors import ConfigError
from longrope2.help import help_topic
from longrope2.tracking.metrics import TrackingConfig

WATCH_FLAG, WORKSPACE_WORD = "--watch", "workspace"
# Between looks at the run folder; the page reloads at the same pace.
_WATCH_SECONDS = 10
# What a report reads; nothing else in a run folder makes it worth writing again.
_WATCHED = ("metrics.jsonl", "manifest.json", "history.json", "factors.json", "evaluations.json")


@dataclass
class ReportRoot:
    """Configuration of the command."""

    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def main() -> None:
    """Find the run folder, write the report once or again and again, or build the workspace."""
    arguments = sys.argv[1:]
    if help_topic(arguments) is not None:
        compose(ReportRoot, "report", arguments)
    if arguments[:1] == [WORKSPACE_WORD]:
        _workspace(arguments[1:])
        return
    watch = WATCH_FLAG in arguments
    folder = run_folder([argument for argument in arguments if argument != WATCH_FLAG])
    if watch:
        watch_run(folder)
    else:
        from longrope2.report.page import write_report  # loads for seconds

        print(f"report: {write_report(folder)}")


def run_folder(arguments: list[str]) -> Path:
    """The folder named by one path, or by ``run.name=`` and ``run.root=``.

    Raises:
        ConfigError: something else was given.
    """
    paths = [argument for argument in arguments if "=" not in argument]
    if not paths:
        return compose(ReportRoot, "report", arguments).run.folder
    if len(arguments) > 1:
        raise ConfigError([f"give one run folder, or run.name=NAME; got {' '.join(arguments)}"])
    return Path(paths[0])


def watch_run(folder: Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Write the report whenever a file it reads has changed, until Ctrl-C; then a page that rests.

    Raises:
        ArtifactError: the folder is no run folder, or one of its files is damaged.
    """
    from longrope2.report.page import REPORT_FILE, write_report  # loads for seconds

    seen: dict[Path, int] | None = None
    print(f"report: {folder / REPORT_FILE}, written again when the run moves on; Ctrl-C ends it")
    try:
        while True:
            found = _changes(folder)
            if found != seen:
                seen = found
                write_report(folder, reload_seconds=_WATCH_SECONDS)
                print(f"{time.strftime('%T')} written", flush=True)
            pause(_WATCH_SECONDS)
    except KeyboardInterrupt:
        print(f"report: {write_report(folder)}")


def _changes(folder: Path) -> dict[Path, int]:
    """When each file that the report reads was last written."""
    changes = {}
    for name in _WATCHED:
        for path in sorted(folder.glob(f"*/{name}")):
            with suppress(FileNotFoundError):  # replaced or removed by the run just now
                changes[path] = path.stat().st_mtime_ns
    return changes


def _workspace(arguments: list[str]) -> None:
    from longrope2.report.workspace import save_workspace  # wandb loads for seconds

    paths = [argument for argument in arguments if "=" not in argument]
    settings = [argument for argument in arguments if "=" in argument]
    if len(paths) > 1:
        raise ConfigError([f"give one run folder, or run.name=NAME; got {' '.join(paths)}"])
    if paths:
        path = Path(paths[0])
        settings = [f"run.root={path.parent}", f"run.name={path.name}", *settings]
    config = compose(ReportRoot, "report", settings)
    print(f"workspace: {save_workspace(config.run.folder, config.run.name, config.tracking)}")


if __name__ == "__main__":
    run_command(main)
