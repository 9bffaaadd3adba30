"""``python -m launch.report runs/demo`` (or ``run.name=demo``): write the run's ``report.html``."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from longrope2.command import run_command
from longrope2.config import RunConfig, compose
from longrope2.errors import ConfigError
from longrope2.evaluation.report import write_report


@dataclass
class ReportRoot:
    """Configuration of the command."""

    run: RunConfig = field(default_factory=RunConfig)


def main() -> None:
    """Find the run folder, write the report, say where it is."""
    print(f"report: {write_report(run_folder(sys.argv[1:]))}")


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


if __name__ == "__main__":
    run_command(main)
