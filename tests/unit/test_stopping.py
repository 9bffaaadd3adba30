"""Stop signals: remembered, agreed on by all ranks, passed on, and the exit code comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.cluster.torchrun import _send_on, run_under_torchrun
from longrope2.command import REQUEUE_EXIT_CODE
from longrope2.training.heartbeat import STOP_SIGNALS, StopSignals

# Stands in for a rank of launch.train: waits for a stop signal, then ends as its last argument
# says.
RANK_MODULE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
(folder / f"ready_{os.environ['RANK']}").touch()
deadline = time.monotonic() + 60
while not got and not (folder / "fail").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(75 if got else 2)
"""


@pytest.fixture
def one_process_group(tmp_path: Path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_remembered_not_obeyed(number: signal.Signals, one_process_group) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.any_rank_asked("cpu")
        os.kill(os.getpid(), number)
        assert signals.any_rank_asked("cpu")
        assert signals.received is number
    assert signal.getsignal(number) is before


def test_the_first_signal_names_the_stop() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGUSR1


AGREEMENT = """
import os, signal, sys
import torch.distributed as dist
from longrope2.training.heartbeat import StopSignals
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
with StopSignals() as signals:
    before = signals.any_rank_asked("cpu")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    print(before, signals.any_rank_asked("cpu"), signals.received)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_no_rank_stops_alone(tmp_path: Path) -> None:
    """Only rank 1 gets the signal; rank 0 learns of it in the same all-reduce."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AGREEMENT, str(tmp_path / "rendezvous"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert answers == [["False", "True", "None"], ["False", "True", str(int(signal.SIGTERM))]]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the ranks of ``RANK_MODULE`` say that they are ready."""
    (tmp_path / "waiting_rank.py").write_text(RANK_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(
        "TORCHELASTIC_SIGNALS_TO_HANDLE", ""
    )  # the launcher sets it; taken back after the test
    return tmp_path


def when_ready(folder: Path, action) -> threading.Thread:
    """Do something as soon as both ranks have their handlers."""

    def wait_then_act() -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("ready_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait_then_act)
    thread.start()
    return thread


def test_a_signal_to_the_command_reaches_the_ranks_and_their_code_comes_back(ranks: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = when_ready(ranks, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run_under_torchrun("waiting_rank", ranks, 2) == REQUEUE_EXIT_CODE
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_user_error_of_a_rank_keeps_its_code(ranks: Path) -> None:
    thread = when_ready(ranks, lambda: (ranks / "fail").touch())
    assert run_under_torchrun("waiting_rank", ranks, 2) == 2
    thread.join()


def test_a_killed_rank_is_an_ordinary_failure(ranks: Path) -> None:
    import psutil

    def kill_a_rank() -> None:
        rank = next(p for p in psutil.Process().children() if "waiting_rank" in p.cmdline())
        rank.kill()

    thread = when_ready(ranks, kill_a_rank)
    assert run_under_torchrun("waiting_rank", ranks, 2) == 1
    thread.join()


def test_without_ranks_a_signal_ends_the_command() -> None:
    with pytest.raises(SystemExit) as ended:
        _send_on(signal.SIGTERM, None)
    assert ended.value.code == 128 + signal.SIGTERM
