"""Stop signals: remembered, agreed on by all ranks, passed on, and the exit code comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.cluster.torchrun import _send_on, run_under_torchrun
from longrope2.attention.layout import build_layout
from longrope2.command import REQUEUE_EXIT_CODE
from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.training.batch import RankBatch
from longrope2.training.heartbeat import STOP_SIGNALS, StopSignals
from longrope2.training.step import SkippedSteps, StepAbandoned, run_step

# Stands in for a rank of launch.train: waits for a stop signal, then ends as its last argument
# says.
RANK_MODULE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
got = []
if not (folder / "deaf").exists():
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
(folder / f"ready_{os.environ['RANK']}").touch()
deadline = time.monotonic() + 60
stubborn = (folder / "stubborn").exists()
while (stubborn or not got) and not (folder / "fail").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
(folder / f"got_{os.environ['RANK']}").write_text(str(got))
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


@pytest.mark.parametrize(("asked_at", "done"), [(1, 1), (3, 3), (None, 4)])
def test_a_step_is_left_between_micro_steps(
    asked_at: int | None, done: int, one_process_group
) -> None:
    """Asked during micro-step ``asked_at`` of four; in the last one the step is finished."""
    work: list[str] = []
    layout = build_layout(Window.LONG, [2])
    tokens_BT = torch.zeros(1, 2, dtype=torch.int64)
    batch = RankBatch(
        tokens_BT,
        labels_BT=tokens_BT,
        window=Window.LONG,
        layout=layout,
        segment_id=0,
        num_targets=2,
        squared_lengths=4,
    )

    def forward(*unused: object) -> torch.Tensor:
        work.append("forward")
        return torch.ones((), requires_grad=True)

    engine: Any = forward
    engine.optimizer, engine.device = SimpleNamespace(param_groups=[{}]), "cpu"
    engine.zero_optimization_stage, engine.backward = lambda: 0, torch.Tensor.backward
    engine.step, engine.get_global_grad_norm = lambda: work.append("step"), lambda: 1.0
    guard: Any = SimpleNamespace(
        engine=engine, clipped_norm=lambda: 1.0, skipped=SkippedSteps(),
        step=lambda loss, norm: work.append("update") is None,
    )  # fmt: skip
    dims = ParallelDims.from_world(1, 1)
    where = "step 7, before micro-step"
    with pytest.raises(StepAbandoned, match=where) if asked_at else nullcontext():
        run_step(
            guard,
            [batch] * 4,
            dims,
            learning_rate=0.1,
            step=7,
            stop_asked=lambda: work.count("forward") == asked_at,
        )
    assert work.count("forward") == done and work.count("update") == (asked_at is None)


def ends_by_itself(act) -> int:
    """Exit code of a forked process that does ``act`` and is still there afterwards: 3."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def press(times: int) -> None:
        with StopSignals():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    assert ends_by_itself(lambda: press(1)) == 3
    assert capfd.readouterr().err == (
        "Ctrl-C: saves and ends; once more ends at once, without saving\n"
    )
    assert ends_by_itself(lambda: press(2)) == -signal.SIGINT


def test_a_rank_leaves_the_answer_to_its_launcher(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals(says_so=False) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_background_job_of_a_shell_ignores_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


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


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_asks_ranks_that_can_save(ranks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = when_ready(ranks, press_ctrl_c)
    assert run_under_torchrun("waiting_rank", ranks, 2) == REQUEUE_EXIT_CODE
    thread.join()
    assert {(ranks / f"got_{rank}").read_text() for rank in range(2)} == {"[2]"}
    # No report of the agent that its ranks have failed.
    assert capfd.readouterr().err == (
        "Ctrl-C: the ranks save and end; once more ends them at once, without saving\n"
    )
    assert signal.getsignal(signal.SIGINT) is before and "LONGROPE2_LAUNCHER" not in os.environ


@pytest.mark.parametrize("kind", ["deaf", "stubborn"])
def test_ctrl_c_ends_ranks_that_cannot_save_or_do_not(ranks: Path, kind: str) -> None:
    """Ranks that have not come to where they catch signals; a second Ctrl-C."""
    (ranks / kind).touch()

    def act() -> None:
        press_ctrl_c()
        if kind == "stubborn":
            time.sleep(0.5)
            press_ctrl_c()

    thread = when_ready(ranks, act)
    with pytest.raises(KeyboardInterrupt):
        run_under_torchrun("waiting_rank", ranks, 2)
    thread.join()
    assert not list(ranks.glob("got_*"))


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
