"""Kill -9 at random moments of every stage; the run that goes on ends with the bytes of one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_prep.verification import verify_folder

NUM_KILLS = 24
# Every write of the command goes through os.replace, so a child that dies at its n-th replace dies in a known stage; the
# rest of the kills strike at random times, between writes and inside them.
DIES_AT_A_RENAME = """
import os, pathlib, signal, sys
calls, last = 0, int(sys.argv[1])
rename = pathlib.Path.replace
def replace(self, target):
    global calls
    calls += 1
    if calls == last: os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.replace = replace
from data_prep import pack
pack.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(5)
    for number in range(12):
        lines = [
            json.dumps(
                {"text": " ".join(rng.choices(["one", "two", "</s>", "é", "42"], k=rng.choice([20, 200, 2000])))}
            )
            for _ in range(20)
        ]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def arguments_for(texts, root, workers):
    return [
        "--target", "512", "--corpus", "folder", f"corpus.folder={texts}", f"run.root={root}", "run.name=x", "align=2",
        "tokens_per_shard=8192", "tokens_per_unit=32768", "corpus.short_overlong=split", f"workers={workers}",
        "corpus.quotas.folder.short=60000", "corpus.quotas.folder.long=90000", "corpus.quotas.retrieval.long=4000",
    ]  # fmt: skip


def products(root):
    """Bytes of everything but the manifest's and configuration's place and time."""
    folder = root / "x" / "1_segments"
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("config.yaml", "manifest.json")}
    manifest = json.loads((folder / "manifest.json").read_text())
    return files, {key: manifest[key] for key in ("counts", "files", "details", "inputs")}


def stage_of(root):
    """How far a killed run came."""
    folder = root / "x" / "1_segments"
    work = next(iter((folder / "work").glob("*")), None) if (folder / "work").is_dir() else None
    if work is None:
        return "start"
    if list(folder.glob("segments-*.arrow")):
        return "pack"
    if (work / "plan").is_dir():
        return "plan"
    return "tokenize" if list(work.glob("*.tokens")) else "scan"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_and_resumed(texts, tmp_path, workers):
    command = [sys.executable, "-m", "data_prep.pack"]
    began = time.monotonic()
    subprocess.run([*command, *arguments_for(texts, tmp_path / "whole", workers)], check=True, capture_output=True)
    whole_seconds = time.monotonic() - began
    expected = products(tmp_path / "whole")
    arguments, rng, stages = arguments_for(texts, tmp_path / "killed", workers), random.Random(workers), []
    kills = 0
    while kills < NUM_KILLS:
        if workers == 1 and kills % 2 == 0:
            # In one process all renames are our own: early ones fall into tokenizing, late ones into packing.
            died = subprocess.run(
                [sys.executable, "-c", DIES_AT_A_RENAME, str(rng.randint(1, 12)), *arguments], capture_output=True
            )
            assert died.returncode in (0, -signal.SIGKILL), died.stderr.decode()
            finished = died.returncode == 0
        else:
            finished = _killed_after(command + arguments, rng.uniform(0.3, 1.0) * whole_seconds)
        kills += not finished
        if finished:  # start over, so that every stage is struck again
            assert products(tmp_path / "killed") == expected
            subprocess.run(["rm", "-rf", str(tmp_path / "killed")], check=True)
        else:
            stages.append(stage_of(tmp_path / "killed"))
    assert {"tokenize", "pack"} <= set(stages), stages
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    assert products(tmp_path / "killed") == expected
    verify_folder(tmp_path / "killed" / "x" / "1_segments")


def _killed_after(command, seconds):
    """Run in a process group of its own and kill all of it; whether it had finished before."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode == 0
