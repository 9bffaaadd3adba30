"""docs/your_own.md line by line, on a model and documents that are made here; so is the README's.

The lines for Slurm compose in tests/unit/test_shown_commands.py; its chain of jobs runs on real
daemons in tests/slurm/test_own_jobs.py.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_model import make_documents, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope2.files.artifacts import read_manifest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_after(text: str, page: str = PAGE) -> list[str]:
    """Lines of the first fenced block after ``text``."""
    block = re.search(re.escape(text) + r".*?```\n(.*?)```", page, re.DOTALL)
    assert block is not None, text
    return block[1].splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of one's own with a model, documents and a prompt."""
    folder = tmp_path / "my work"
    make_model(folder / "my model")
    make_documents(folder / "my documents", short=120, long=80, long_words=(500, 900, 1200))
    (folder / "prompt.txt").write_text("The with statement is used to wrap", encoding="utf-8")
    return folder


def run(place: Path, line: str) -> str:
    """What a line prints, for the model and documents here; it must end well."""
    program, *words = shlex.split(line)
    assert program == "python"
    here = {
        "model.path=/models/mine": "model.path=my model",
        "corpus.folder=/data/texts": "corpus.folder=my documents",
        "target_len=32768": "target_len=1024",
    }
    ended = subprocess.run(
        [sys.executable, *(here.get(word, word) for word in words)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{line}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def test_the_readmes_lines_are_among_them() -> None:
    found = lines_after("## Your own model and documents", README)
    assert len(found) == 6 and [x for x in lines_after("## One process") if x in found] == found


def take_the_road(place: Path) -> None:
    """All lines; what comes out is a model that transformers loads, with both kinds trained."""
    printed = {line: run(place, line) for line in lines_after("## One process")}
    assert "window 256 -> 1024" in printed["python -m launch.train experiment=mine dry_run=true"]
    counts = read_manifest(place / "runs/mine/1_segments", "segments").counts
    assert counts["num_short_segments"] > 0 and counts["num_long_segments"] > 0
    read = read_manifest(place / "runs/mine/1_segments", "segments").inputs["corpus"]["files"]
    assert {Path(name).suffix for name in read} == {".txt", ".md", ".jsonl"}
    exported = next((place / "runs/mine/5_exports").glob("hugging_face*/config.json")).parent
    tokens = AutoTokenizer.from_pretrained(exported)("a text", return_tensors="pt").input_ids
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(exported)(tokens).logits.isfinite().all()
    assert (place / "runs/mine/report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_process(place: Path) -> None:
    take_the_road(place)
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").write_text((place / "conf/experiment/mine.yaml").read_text())
    text = "name: mine\npath: my model\noriginal_len: 256\n"
    (elsewhere / "my_model.yaml").write_text(text)
    by_file, by_model = lines_after("A file elsewhere")
    assert "window 256 -> 1024" in run(place, by_file)
    own = " training.global_batch_tokens=8192 rope=yarn"
    assert "window 256 -> 1024" in run(place, by_model + own)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes(place: Path) -> None:
    *_, train = [run(place, line) for line in lines_after("## Two processes")]
    assert "processes  2: 2 data x 1 sequence" in train
    assert (place / "runs/mine_two/3_checkpoints/final/config.json").is_file()


@pytest.mark.slow
def test_the_line_for_another_machine(place: Path) -> None:
    (line,) = lines_after("## A GPU")
    assert "experiment in conf/experiment/mine_cluster.yaml" in run(
        place, line.replace("processes=8", "processes=3")
    )


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu(place: Path) -> None:
    take_the_road(place)
