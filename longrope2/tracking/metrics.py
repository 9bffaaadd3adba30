"""Metrics to a JSON-lines file and to Weights & Biases, under the names of the design document.

The file is the record, one line per ``log`` call. W&B runs offline unless the user is logged in;
its x-axis is ``train/tokens``. The stages of a run are one W&B group, and a resumed stage continues
its W&B run, whose id is kept in the product folder.
"""

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich import progress
from rich.progress import Progress

from longrope2.errors import ConfigError
from longrope2.files.append_log import AppendLog, damaged_line, read_log
from longrope2.files.artifacts import write_text

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"
_QUIET = ("silent", "x_disable_stats", "x_disable_machine_info")
METRIC_GROUPS = ("train", "perf", "search", "pack", "eval")


class WandbMode(Enum):
    """When W&B is used."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class TrackingConfig:
    """Where metrics go besides the JSON-lines file."""

    wandb: WandbMode = WandbMode.auto
    """``auto`` is online when logged in and offline otherwise."""
    project: str = "longrope2"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null for the login's default."""


class MetricsLog:
    """Open on one rank only; close it (or use ``with``) so that W&B flushes."""

    def __init__(
        self,
        folder: Path,
        tracking: TrackingConfig,
        run_name: str,
        stage: str,
        config: dict[str, Any],
    ) -> None:
        self._log = AppendLog(folder / METRICS_FILE)
        self._wandb = _start_wandb(
            folder, tracking=tracking, run_name=run_name, stage=stage, config=config
        )

    def log(self, values: Mapping[str, float | int], **position: int) -> None:
        """Record ``values`` (design names) at a position such as ``step=12``."""
        self._log.append({"time": round(time.time(), 3), **position, **values})
        if self._wandb is not None:
            self._wandb.log(dict(values), step=position.get("step"))

    def forget_after(self, step: int) -> int:
        """Remove what the file holds of later steps, which are to be repeated; how many records."""
        return self._log.cut_from(lambda record: record.get("step", 0) > step)

    def log_files(self, kind: str, paths: Sequence[Path]) -> None:
        """Keep small files, of different names, with the W&B run as its artifact ``kind``."""
        if self._wandb is None:
            return
        import wandb

        artifact = wandb.Artifact(f"{self._wandb.id}-{kind}", type=kind)
        for path in paths:
            artifact.add_file(str(path))
        self._wandb.log_artifact(artifact)

    def close(self) -> None:
        """Flush both."""
        self._log.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def progress_line(name: str, counted: progress.ProgressColumn, period: float = 30.0) -> Progress:
    """A line for a long stage: name, bar, how far, a description, time passed and time left.

    The time left is told from the speed of the last ``period`` seconds.
    """
    state = progress.TextColumn("{task.description}")
    columns = progress.TextColumn(name), progress.BarColumn(), counted, state
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    return Progress(*columns, *times, speed_estimate_period=period)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder's metrics file, oldest first; empty when there is none.

    Raises:
        ArtifactError: a line is none of ours: it holds something else than numbers.
    """
    path = folder / METRICS_FILE
    records = read_log(path)
    for number, record in enumerate(records, start=1):
        are_numbers = all(type(value) in (int, float) for value in record.values())
        if not are_numbers or type(record.get("step", 0)) is not int:
            raise damaged_line(path, number)
    return records


def _start_wandb(
    folder: Path, tracking: TrackingConfig, run_name: str, stage: str, config: dict[str, Any]
) -> Any:
    """Start or continue the W&B run of this stage; None when disabled."""
    mode = resolve_mode(tracking.wandb)
    if mode is WandbMode.disabled:
        return None
    import wandb

    # Kept in the folder, so that a run of the same name elsewhere is another W&B run.
    id_file = folder / WANDB_ID_FILE
    if not id_file.is_file():
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run_name}-{stage}")[-60:]
        write_text(id_file, f"{readable}-{secrets.token_hex(4)}\n")
    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=run_name,
        job_type=stage,
        name=f"{run_name}/{stage}",
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow" if mode is WandbMode.online else None,
        dir=str(folder),
        mode=mode.value,  # type: ignore[arg-type]
        config=config,
        settings=wandb.Settings(console="off", **dict.fromkeys(_QUIET, True)),
    )
    run.define_metric("train/tokens")
    for group in METRIC_GROUPS:
        x = "train/tokens" if group in ("train", "perf") else None
        run.define_metric(f"{group}/*", step_metric=x)
    return run


def resolve_mode(mode: WandbMode) -> WandbMode:
    """What ``auto`` stands for: ``WANDB_MODE``, else online with a key at hand, else offline.

    Raises:
        ConfigError: ``WANDB_MODE`` holds something else.
    """
    if mode is not WandbMode.auto:
        return mode
    if named := os.environ.get("WANDB_MODE"):
        allowed = {mode.value: mode for mode in WandbMode if mode is not WandbMode.auto}
        if named not in allowed:
            fault = f"WANDB_MODE={named} in the environment must be one of {', '.join(allowed)}"
            raise ConfigError([fault])
        return allowed[named]
    if os.environ.get("WANDB_API_KEY"):
        return WandbMode.online
    netrc = Path.home() / ".netrc"
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    return WandbMode.online if logged_in else WandbMode.offline
