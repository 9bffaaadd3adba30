"""``make demo`` for real: every stage, the order of the table, reuse, and what stands on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parent.parent.parent
UNTRAINED = ("base", "pi", "ntk", "yarn", "llama3", "halving-searched")
SUBJECTS = (*UNTRAINED, "halving-trained")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("demo")
    return root, run_demo(root)


def run_demo(root: Path) -> str:
    command = [sys.executable, "-m", "launch.demo", "--root", str(root)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=2000, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def rows(root: Path, part: str) -> dict[str, dict]:
    """Subject -> its row at the target length, or inside L0 for ``retention``."""
    summary = json.loads((root / "demo" / "4_evaluations" / "evaluations.json").read_text())
    length = summary["original_len"] if part == "retention" else summary["target_len"]
    return {row["subject"]: row for row in summary[part] if row["length"] == length}


def test_the_searched_factors_retrieve_untrained(runs: tuple[Path, str]) -> None:
    """At 16-fold, where no closed form finds a needle; README's three seeds have 31 to 45 %."""
    needles = rows(runs[0], "needle")
    assert needles["halving-searched"]["accuracy"] >= 0.25
    closed = [needles[subject]["accuracy"] for subject in UNTRAINED[:-1]]
    assert max(closed) < 0.1, closed
    history = json.loads((runs[0] / "demo" / "2_factors" / "history.json").read_text())
    assert history["fresh"]["found"].startswith("found")


def test_training_makes_the_long_window_readable(runs: tuple[Path, str]) -> None:
    needles, texts = (
        {subject: row["perplexity"] for subject, row in rows(runs[0], part).items()}
        for part in ("needle", "perplexity")
    )
    assert rows(runs[0], "needle")["halving-trained"]["accuracy"] >= 0.85
    for untrained in UNTRAINED:
        assert needles["halving-trained"] < needles[untrained]
        assert texts["halving-trained"] < 0.75 * texts[untrained], texts


def test_every_subject_is_in_the_summary(runs: tuple[Path, str]) -> None:
    assert set(rows(runs[0], "needle")) == set(rows(runs[0], "retention")) == set(SUBJECTS)


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
    assert again.count("already complete") >= 3
    assert {p: p.stat().st_mtime_ns for p in root.glob("demo*/3_checkpoints/final/*")} == before
