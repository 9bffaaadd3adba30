"""``python -m launch.report workspace runs/x tracking.entity=TEAM``: the run's W&B workspace.

Logs what a workspace cannot compute by itself, the mix and the needle heat maps, as one more run of
the group.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from longrope2.errors import ConfigError
from longrope2.files.artifacts import PRODUCT_FOLDERS
from longrope2.report.data import RunRecord, load_run
from longrope2.report.plots import needle_map_figure
from longrope2.tracking.metrics import TrackingConfig, WandbMode, read_metrics, resolve_mode
from longrope2.tracking.workspace import MIX_KEY, NEEDLE_MAPS_KEY, build_workspace


def save_workspace(run_folder: Path, run_name: str, tracking: TrackingConfig) -> str:
    """Build, log, save; the workspace's address.

    Raises:
        ConfigError: nobody is logged in, or ``tracking`` does not name a team.
        ArtifactError: the folder is no run folder.
    """
    record = load_run(run_folder)
    workspace = run_workspace(record, run_name, tracking)
    if resolve_mode(tracking.wandb) is not WandbMode.online:
        raise ConfigError(["W&B is offline here; `wandb login` first, or set WANDB_API_KEY"])
    _log_figures(record, run_name, tracking)
    return workspace.save().url


def run_workspace(record: RunRecord, run_name: str, tracking: TrackingConfig) -> Any:
    """The workspace for what a run folder holds."""
    evaluations = record.folder / PRODUCT_FOLDERS["evaluations"]
    names = {name for line in read_metrics(evaluations) for name in line}
    return build_workspace(tracking, run_name, list(record.mix_tokens), evaluated_metrics(names))


def evaluated_metrics(names: set[str]) -> dict[str, dict[str, list[int]]]:
    """Suite -> model -> lengths, from metric names ``eval/<suite>/<model>/<length>``.

    Of a suite of tasks its average is shown: ``eval/ruler/average/<model>/<length>``, suite
    ``ruler/average``.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name in sorted(names):
        stage, *suite, model, length = name.split("/") if name.count("/") > 2 else ("", "", "")
        is_shown = len(suite) == 1 or (len(suite) == 2 and suite[1] == "average")
        if is_shown and stage == "eval" and length.isdigit():
            found.setdefault("/".join(suite), {}).setdefault(model, []).append(int(length))
    for by_model in found.values():
        for lengths in by_model.values():
            lengths.sort()
    return found


def _log_figures(record: RunRecord, run_name: str, tracking: TrackingConfig) -> None:
    """Log the mix and the heat maps as the run's ``report`` stage."""
    import wandb

    place = {"project": tracking.project, "entity": tracking.entity, "group": run_name}
    stage: dict[str, Any] = {**place, "job_type": "report", "name": f"{run_name}/report"}
    stage["mode"] = resolve_mode(tracking.wandb).value
    stage["settings"] = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        wandb.init(dir=os.environ.get("WANDB_DIR", folder), **stage) as run,
    ):
        values: dict[str, Any] = {}
        for source, windows in record.mix_tokens.items():
            values |= {f"{MIX_KEY}/{source}/{window}": n for window, n in windows.items()}
        if record.evaluation is not None:
            images = []
            for name in (subject.name for subject in record.evaluation.subjects):
                path = Path(folder) / f"{name}.png"
                needle_map_figure(record.evaluation.needle, name).savefig(path, dpi=150)
                images.append(wandb.Image(str(path), caption=name))
            values[NEEDLE_MAPS_KEY] = images
        run.log(values)
