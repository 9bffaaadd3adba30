"""Ranks of ``train``, forked from one process that has imported everything.

A launch costs a second or two, not twenty.

Run as a script, it reads one JSON request a line (config.yaml, number of ranks, and whom to kill
when) and answers each with the exit codes of the ranks. ``ForkedRanks`` is the tests' end of it.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
POLL_SECONDS = 0.002
TIMEOUT_SECONDS = 900
# What a run imports sooner or later; the optimizer module is DeepSpeed's, and brings the compiler
# of torch with it.
SLOW_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3",
                "pyarrow",
                "deepspeed.runtime.zero.stage_1_and_2", "longrope2.training.run",
                "transformers.models.llama.modeling_llama")  # fmt: skip


class ForkedRanks:
    """A process that forks ranks on request; what they print goes to ``log``."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> "ForkedRanks":
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.log)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)

    def run(
        self,
        config: Path,
        ranks: int,
        kill: dict[str, Any] | None = None,
        before: dict[str, Any] | None = None,
    ) -> list[int]:
        """Exit codes (negative: signals) of ``ranks`` ranks of ``train`` on a written config.

        Args:
            config: A ``config.yaml``.
            ranks: Processes.
            kill: ``{"rank": r, "after_steps": n, "writing": bool, "delay": seconds}``: SIGKILL rank
                r that long after n more metric records are there and, with ``writing``, a
                checkpoint is being written; then all others.
            before: ``{"name": function of rank_faults.py, ...: its arguments}``, called in every
                rank before it trains.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"config": str(config), "ranks": ranks, "kill": kill, "before": before}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that forks ended: {self.printed()[-3000:]}"
        return json.loads(answer)

    def printed(self) -> str:
        """All that the ranks printed."""
        return self.log.read_text()


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        request["config"] = Path(request["config"])
        answers.write(json.dumps(run_ranks(**request)) + "\n")
        answers.flush()


def run_ranks(
    config: Path, ranks: int, kill: dict[str, Any] | None, before: dict[str, Any] | None
) -> list[int]:
    """Fork, watch, kill when it is time, collect."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = config.parent
    start = Start.of(folder)
    pids = [fork_rank(config, rank, ranks, port, before) for rank in range(ranks)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(codes) < ranks:
        if kill is not None and is_time(kill, folder, start):
            time.sleep(kill["delay"])
            kill_process(pids[kill["rank"]])
            time.sleep(random.uniform(0, 0.3))  # as long as an agent may need to notice
            kill, deadline = None, 0.0
        if time.monotonic() > deadline:
            for pid in pids:
                kill_process(pid)
        for rank, pid in enumerate(pids):
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] not in (0, 75):
                        deadline = min(deadline, time.monotonic() + 1.0)
        time.sleep(POLL_SECONDS)
    return [codes[rank] for rank in range(ranks)]


@dataclass(frozen=True)
class Start:
    """Where a run stood before its ranks began: they remove the records of steps to be repeated."""

    steps: int
    """Of the newest checkpoint."""
    changed: int
    """When the metrics were last written."""

    @classmethod
    def of(cls, folder: Path) -> "Start":
        """Of the run whose checkpoints stand in ``folder``."""
        steps = [int(path.name.removeprefix("step_")) for path in folder.glob("step_*")]
        return cls(max(steps, default=0), last_change(folder))


def is_time(kill: dict[str, Any], folder: Path, start: Start) -> bool:
    """Whether the moment of a kill has come."""
    if kill["after_steps"]:
        if last_change(folder) == start.changed:
            return False
        lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        if lines < start.steps + kill["after_steps"]:
            return False
    return not kill["writing"] or any(folder.glob(".step_*.writing"))


def last_change(folder: Path) -> int:
    """Of the metrics file, in ns; 0 where there is none."""
    file = folder / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.is_file() else 0


def kill_process(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def fork_rank(config: Path, rank: int, ranks: int, port: int, before: dict[str, Any] | None) -> int:
    """One rank; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        if before is not None:
            faults = importlib.import_module("rank_faults")
            getattr(faults, before["name"])(**{k: v for k, v in before.items() if k != "name"})
        from longrope2.config import load
        from longrope2.training.config import TrainRoot
        from longrope2.training.run import RunEnd, train

        ended = train(load(TrainRoot, config))
        code = 75 if ended is RunEnd.interrupted else 0
        if "wandb" in sys.modules:
            sys.modules[
                "wandb"
            ].teardown()  # what the end of an interpreter does: its service writes the rest
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
