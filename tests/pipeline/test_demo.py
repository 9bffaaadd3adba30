"""``make demo`` for real: every stage, the order of the table, reuse, and what stands on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parent.parent.parent
BASELINES = ("base", "pi", "ntk", "yarn", "longrope2-searched", "yarn-trained", "ntk-trained")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("demo")
    return root, run_demo(root)


def run_demo(root: Path) -> str:
    command = [sys.executable, "-m", "launch.demo", "--root", str(root)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2000, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def needle_accuracy(root: Path) -> dict[str, float]:
    """Subject -> share of needles retrieved at the target length, all depths."""
    summary = json.loads((root / "demo" / "4_evaluations" / "evaluations.json").read_text())
    return {row["subject"]: row["accuracy"] for row in summary["needle"] if row["length"] == summary["target_len"]}


def test_trained_longrope2_retrieves_at_least_as_well_as_every_baseline(runs: tuple[Path, str]) -> None:
    found = needle_accuracy(runs[0])
    for baseline in BASELINES:
        assert found["longrope2-trained"] >= found[baseline], found


def test_the_short_window_is_kept(runs: tuple[Path, str]) -> None:
    summary = json.loads((runs[0] / "demo" / "4_evaluations" / "evaluations.json").read_text())
    ratio = {row["subject"]: row["ratio"] for row in summary["retention"]}
    assert ratio["longrope2-trained"] <= 1.015, ratio


def test_every_product_is_finished(runs: tuple[Path, str]) -> None:
    root, _ = runs
    for product in ("1_segments", "2_factors", "3_checkpoints", "4_evaluations", "5_exports"):
        assert (root / "demo" / product / "manifest.json").is_file()
        assert (root / "demo" / product / "config.yaml").is_file()
    assert (root / "demo" / "report.html").stat().st_size > 10_000


def test_a_second_run_reuses_everything(runs: tuple[Path, str]) -> None:
    root, _ = runs
    before = {p: p.stat().st_mtime_ns for p in root.glob("demo*/3_checkpoints/final/*")}
    again = run_demo(root)
    assert again.count("already complete") >= 4
    assert {p: p.stat().st_mtime_ns for p in root.glob("demo*/3_checkpoints/final/*")} == before
