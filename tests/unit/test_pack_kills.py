"""Kill -9 at random moments; the run that goes on ends with the bytes of one never killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from data_prep.verification import audit_folder

COMMAND = (sys.executable, "-m", "data_prep.pack")
NUM_KILLS = 12  # for each number of workers
# Every file of the command gets its name by a rename, so a process that dies at its n-th rename
# dies just before something is declared done; with workers, all processes are killed at a random
# moment after so many new files.
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
                {
                    "text": " ".join(
                        rng.choices(
                            ["one", "two", "</s>", "é", "42"], k=rng.choice([20, 200, 2000])
                        )
                    )
                }
            )
            for _ in range(20)
        ]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def arguments_for(texts, root, workers):
    return [
        "--target",
        "512",
        "--corpus",
        "folder",
        f"corpus.folder={texts}",
        f"run.root={root}",
        "run.name=x",
        "align=2",
        "tokens_per_shard=8192",
        "tokens_per_unit=32768",
        "short_overlong=split",
        f"workers={workers}",
        "quotas.folder.short=60000",
        "quotas.folder.long=90000",
        "quotas.retrieval.long=4000",
    ]


def products(root):
    """Bytes of everything but the manifest's and configuration's place and time."""
    folder = root / "x" / "1_segments"
    files = {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name not in ("config.yaml", "manifest.json")
    }
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
    if (work / "list").is_dir():
        return "list"
    return "tokenize" if list(work.glob("*.tokens")) else "scan"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_at_random_and_resumed(texts, tmp_path, workers):
    whole, killed = (
        arguments_for(texts, tmp_path / "whole", workers),
        arguments_for(texts, tmp_path / "killed", workers),
    )
    subprocess.run([*COMMAND, *whole], check=True, capture_output=True)
    expected, rng, stages = products(tmp_path / "whole"), random.Random(workers), []
    while len(stages) < NUM_KILLS:
        if workers == 1:
            finished = _died_at_a_rename(killed, rng.randint(1, 14))
        else:
            finished = _killed_after_files(
                killed, tmp_path / "killed", rng.randint(0, 9), rng.uniform(0, 0.1)
            )
        if finished:  # start over, so that every stage is struck again
            assert products(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
        else:
            stages.append(stage_of(tmp_path / "killed"))
    print(f"workers={workers}: killed {len(stages)} times, in {Counter(stages)}")
    assert {"tokenize", "pack"} <= set(stages), stages
    subprocess.run([*COMMAND, *killed], check=True, capture_output=True)
    assert products(tmp_path / "killed") == expected
    audit_folder(tmp_path / "killed" / "x" / "1_segments")


def _died_at_a_rename(arguments, last):
    """Run until the ``last``-th rename kills the process; whether it had finished before."""
    died = subprocess.run(
        [sys.executable, "-c", DIES_AT_A_RENAME, str(last), *arguments], capture_output=True
    )
    assert died.returncode in (0, -signal.SIGKILL), died.stderr.decode()
    return died.returncode == 0


def _killed_after_files(arguments, root, more, seconds):
    """Kill run and workers ``seconds`` after ``more`` new files; whether it had finished before."""
    before = len(_files(root))
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while child.poll() is None and len(_files(root)) < before + 1 + more:
        time.sleep(0.01)
    time.sleep(seconds)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait() == 0


def _files(root):
    return [name for _, _, names in os.walk(root) for name in names]
