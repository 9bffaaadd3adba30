"""Parts of an offline run, uploaded by W&B's own client to a local server: none is overwritten."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import wandb_server

ROOT = Path(__file__).parent.parent.parent
PART = """
import sys
from pathlib import Path
from longrope2.tracking.metrics import MetricsLog, TrackingConfig, WandbMode
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with MetricsLog(folder, TrackingConfig(WandbMode.offline), "demo", "train", {"seed": 3}) as log:
    for step in range(first, last + 1):
        log.log({"train/loss": 10.0 - step, "train/tokens": 100 * step}, step=step)
"""
SYNC = re.compile(r"wandb sync RUN/(\S+)")


def site_files_command(run: Path) -> str:
    """What slurm/site.example.env tells to give, for one run."""
    found = SYNC.search((ROOT / "slurm" / "site.example.env").read_text())
    assert found is not None
    return f"{Path(sys.executable).parent}/wandb sync {run}/{found[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False], ids=["one command", "part by part"])
def test_parts_of_a_resumed_offline_run_follow_each_other(tmp_path: Path, at_once: bool) -> None:
    """Steps 4 and 5 are repeated, as after a kill: their lines stand twice, the same."""
    run = tmp_path / "demo"
    product = run / "3_checkpoints"
    with wandb_server() as server:
        own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
        for first, last in ((1, 5), (4, 9)):
            words = [sys.executable, "-c", PART, str(product), str(first), str(last)]
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
            if not at_once:
                sync(site_files_command(run), own)
        if at_once:
            sync(site_files_command(run), own)
        ((name, lines),) = server.histories.items()
    assert name == (product / "wandb_id").read_text().strip()
    assert None not in lines
    steps = [line["_step"] for line in lines if line is not None]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    for line in lines:
        assert line is not None and line["train/loss"] == 10.0 - line["_step"]


def sync(command: str, own: dict[str, str]) -> None:
    """The client's upload; a part that it has uploaded before is skipped."""
    ended = subprocess.run(
        ["bash", "-c", command], env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
