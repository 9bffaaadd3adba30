"""A model and documents of one's own through ``slurm/*_own.sh``, from launch.init to an export."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import INSIDE, ROOT, SITE, EmulatedSlurm
from own_model import make_documents, make_model

from longrope2.files.artifacts import read_manifest

# What two nodes of two emulated GPUs have, where the scripts ask for eight of 80 GB.
RESOURCES = [
    "--time=20", "pack:--cpus-per-task=1", "search:--gpus-per-node=1", "train:--nodes=2",
    "train:--gpus-per-node=2", "evaluate:--gpus-per-node=1", "evaluate:--array=1-2",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, documents, slurm/ and a site file, and no checkout in it."""
    folder = tmp_path / "mine"
    make_model(folder / "model")
    make_documents(folder / "texts", short=120, long=80, long_words=(500, 900, 1200))
    shutil.copytree(
        ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("logs", "site.env")
    )
    (folder / "slurm" / "logs").mkdir()
    site = SITE.format(python=sys.executable) + f"export PYTHONPATH='{ROOT}'\n"
    (folder / "slurm" / "site.env").write_text(site)
    return folder


def init(place: Path) -> None:
    """``launch.init`` for four processes, in the folder."""
    given = "model.path=model corpus.folder=texts target_len=1024 run.name=mine_cluster processes=4"
    subprocess.run(
        [sys.executable, "-m", "launch.init", *given.split()],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_packing_in_a_container_of_srun(place: Path, small_cluster: EmulatedSlurm) -> None:
    """The bytes of packing outside of it, from the cores of one job; see slurm/README.md."""
    init(place)
    outside = ["-m", "data_prep.pack", "experiment=mine_cluster", "run.name=outside"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *outside], cwd=place, env=environment, check=True, capture_output=True
    )
    python, site = place / "python_inside", place / "slurm" / "site.env"
    python.write_text(INSIDE.format(python=sys.executable))
    python.chmod(0o755)
    options = "SRUN_OPTIONS=(--export=ALL,INSIDE=yes --comment='a b')"
    site.write_text(f"{site.read_text()}PYTHON=('{python}')\n{options}\n")
    asked = ["--parsable", "--time=20", "--cpus-per-task=1", "slurm/pack_own.sh"]
    ended = subprocess.run(
        ["sbatch", *asked, "experiment=mine_cluster"],
        cwd=place,
        env=small_cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    job = ended.stdout.strip()
    state = small_cluster.wait_for(job, 900)["JobState"]
    log = next((place / "slurm" / "logs").glob(f"pack_own-{job}*.log")).read_text()
    assert state == "COMPLETED" and "not there outside" not in log, log
    packed, expected = (
        read_manifest(place / "runs" / name / "1_segments", "segments").files
        for name in ("mine_cluster", "outside")
    )
    assert packed == expected and packed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_pages_chain(place: Path, small_cluster: EmulatedSlurm) -> None:
    page = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
    shown = re.search(r"`slurm/pipeline\.sh (own experiment=mine_cluster [^`]*)`", page)
    assert shown is not None
    init(place)
    ended = subprocess.run(
        ["slurm/pipeline.sh", *shown[1].split(), *RESOURCES],
        cwd=place,
        env=small_cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    jobs = dict(re.findall(r"^(\w+) +job (\d+)", ended.stdout, re.MULTILINE))
    assert tuple(jobs) == ("pack", "search", "train", "evaluate", "export")
    logs = place / "slurm" / "logs"
    for stage, job in jobs.items():
        state = small_cluster.wait_for(job, 1800)["JobState"]
        log = next(logs.glob(f"{stage}_own-{job}*.log"), None)
        assert state == "COMPLETED", (stage, state, log.read_text()[-3000:] if log else "no log")
    run = place / "runs" / "mine_cluster"
    counts = read_manifest(run / "1_segments", "segments").counts
    assert counts["num_short_segments"] > 0 and counts["num_long_segments"] > 0
    assert "4 data x 1 sequence" in next(logs.glob("train_own-*.log")).read_text()
    assert next((run / "5_exports").glob("hugging_face*/config.json")).is_file()
