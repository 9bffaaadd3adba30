"""Several processes find what one finds, bit for bit; with shared samples within rounding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
# Of a round: where an evaluation stops depends on the other workers.
COSTS = ("num_losses", "num_terminated")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the miniature's tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in (ROOT / "models" / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    (folder / "corpus").mkdir()
    for number in range(240):
        words = " ".join(f"word{number}x{place}" for place in range(60))
        (folder / "corpus" / f"text{number}.txt").write_text(words)
    return folder


def command_of(folder: Path, run_name: str, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "launch.search",
        "model=tiny",
        f"model.path={folder / 'model'}",
        "model.name=tiny",
        "target_len=256",
        "corpus=folder",
        f"corpus.folder={folder / 'corpus'}",
        f"run.root={folder}",
        f"run.name={run_name}",
        "tracking.wandb=disabled",
        "search.population=12",
        "search.iterations=4",
        "search.parents=4",
        "search.num_samples=4",
        "search.max_needle_ppl_at_original=1e30",
        "search.min_needle_loss_gain=-1e9",
        "search.min_needle_loss_gain_at_target=null",
        "search.fresh_samples=8",
        *overrides,
    ]


def environment() -> dict[str, str]:
    """One thread everywhere: a matrix product may round differently with more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def searched(folder: Path, run_name: str, *overrides: str) -> Path:
    """Run a search to its end; returns the product."""
    command = command_of(folder, run_name, *overrides)
    ended = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder / run_name / "2_factors"


def result(product: Path) -> dict[str, Any]:
    """Everything that must not depend on the number of workers."""
    history = json.loads((product / "history.json").read_text())
    del history["budget"]
    history["rounds"] = [
        {k: v for k, v in entry.items() if k not in COSTS} for entry in history["rounds"]
    ]
    return {"factors": (product / "factors.json").read_bytes(), "history": history}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The search in one process, without pruning."""
    return searched(folder, "alone", "search.pruning=none")


@pytest.mark.slow
def test_two_workers_find_what_one_finds(folder: Path, alone: Path) -> None:
    product = searched(folder, "two", "parallel.processes=2")
    assert result(product) == result(alone)
    journals = [product / "journal.jsonl", product / "journal.1.jsonl"]
    entries = [
        json.loads(line) for journal in journals for line in journal.read_text().splitlines()[1:]
    ]
    places = [(entry["factors"], entry["batch"]) for entry in entries]
    assert len(places) == len(set(places)), "a loss was computed twice"
    assert len(journals[1].read_text().splitlines()) > 5, "the second worker did next to nothing"


HALVING = ("search=halving", "search.lengths=[0.5,1]", "search.mutations=6")


@pytest.mark.slow
def test_two_workers_halve_as_one_does(folder: Path) -> None:
    """With rows of three candidates: what is computed together does not depend on the workers."""
    rows = (*HALVING, "search.batch_size=3")
    product = searched(folder, "halved_two", *rows, "parallel.processes=2")
    assert result(product) == result(searched(folder, "halved_alone", *rows))
    for name in ("journal", "fresh"):
        lines = [
            line
            for path in product.glob(f"{name}*.jsonl")
            for line in path.read_text().splitlines()[1:]
        ]
        places = [(json.loads(line)["factors"], json.loads(line)["batch"]) for line in lines]
        assert len(places) == len(set(places)), "a loss was computed twice"


@pytest.mark.slow
def test_processes_that_share_samples_halve_within_rounding(folder: Path) -> None:
    """One process reads a haystack of two needles once, two read it for each of them."""
    needles = (*HALVING, "search.needles_per_haystack=2")
    shared = searched(folder, "halved_shared", *needles, "parallel.processes=4",
                      "parallel.sequence=2")  # fmt: skip
    alone = searched(folder, "halved_by_one", *needles)
    ours, theirs = (json.loads((p / "history.json").read_text()) for p in (shared, alone))
    assert ours["kept"][0]["factors"] == theirs["kept"][0]["factors"]
    assert ours["best_value"] == pytest.approx(theirs["best_value"], rel=1e-5)


@pytest.mark.slow
def test_four_workers_find_what_one_finds(folder: Path, alone: Path) -> None:
    assert result(searched(folder, "four", "parallel.processes=4")) == result(alone)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["sequence", "context"])
def test_processes_that_share_samples_find_the_same_within_rounding(
    folder: Path, alone: Path, axis: str
) -> None:
    """Two workers of two processes each; sums are rounded elsewhere, so values agree to 1e-5."""
    product = searched(folder, f"shared_{axis}", "parallel.processes=4", f"parallel.{axis}=2")
    ours, theirs = (json.loads((p / "history.json").read_text()) for p in (product, alone))
    assert ours["critical_index"] == theirs["critical_index"]
    assert ours["kept"][0]["factors"] == theirs["kept"][0]["factors"]
    assert [entry["value"] for entry in ours["kept"]] == pytest.approx(
        [entry["value"] for entry in theirs["kept"]], rel=1e-5
    )
    assert [each["name"] for each in ours["fresh"]["contestants"]] == [
        each["name"] for each in theirs["fresh"]["contestants"]
    ]
    assert [each["value"] for each in ours["fresh"]["contestants"]] == pytest.approx(
        [each["value"] for each in theirs["fresh"]["contestants"]], rel=1e-5
    )


@pytest.mark.slow
def test_a_dead_worker_loses_nothing(folder: Path, alone: Path) -> None:
    """Kill -9 of one ends the search with a message; the same command, with fewer, goes on."""
    with subprocess.Popen(
        command_of(folder, "killed", "parallel.processes=2"),
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        journal = folder / "killed" / "2_factors" / "journal.1.jsonl"
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 4:
            assert running.poll() is None, "the search ended before it could be killed"
            time.sleep(0.001)
        ranks = [
            p
            for p in psutil.Process(running.pid).children(recursive=True)
            if p.environ().get("RANK") == "1"
        ]
        ranks[-1].send_signal(signal.SIGKILL)
        stderr = running.communicate()[1]
    assert running.returncode != 0
    assert "a process of the search ended early" in stderr
    assert "give the same command again to go on" in stderr
    product = folder / "killed" / "2_factors"
    assert not (product / "manifest.json").exists()
    finished = journal.read_bytes()
    assert result(searched(folder, "killed", "parallel.processes=1")) == result(alone)
    assert journal.read_bytes() == finished
