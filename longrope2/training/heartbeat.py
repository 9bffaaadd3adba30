"""Who hangs, where, and how a run is stopped.

The training thread marks its progress in memory. A thread beside it writes the latest mark to
``heartbeats/rank_00003.json`` every few seconds: a rank that is stopped or dead can be told from
one that waits. Ranks make the same marks in the same order, so the others wait for the one with the
fewest.

A mark is progress. So are bytes in a phase that moves them (hashing, converting and loading a
checkpoint, writing one: hours for a slow disk), as the system counts them for this process and its
children. When no rank has made progress for ``training.hang_timeout_s``, another thread, which a
stalled file system cannot hold, prints which ranks are behind, where, and the stacks of its own
threads (also to ``rank_00003.stacks``), and ends the process with ``HANG_EXIT_CODE``.

Stop signals, SIGTERM (cancelled, preempted), SIGUSR1 (``#SBATCH --signal=USR1@900``: the time limit
is near) and SIGINT (Ctrl-C), are remembered. Between two micro-steps all ranks agree whether any of
them was asked to stop: none stops alone while others wait in a collective. A second SIGINT ends the
process at once.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from longrope2.command import HANG_EXIT_CODE
from longrope2.parallel.flight_record import write_flight_record

FOLDER = "heartbeats"
_WRITE_SECONDS = 5.0
REPORT_SECONDS = 60.0
"""Time to say who hangs: a stalled file system must not keep the process for ever."""
_MARKS_TO_LIVE = 4
"""A rank whose file is older than this many intervals gives no sign of life."""
_LEAST_BYTES = 2**20
"""Less than this is the watch's own reading and writing."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BEGAN = time.time() - time.monotonic()
_CTRL_C = "Ctrl-C: saves and ends; once more ends at once, without saving"


@dataclass(frozen=True)
class Beat:
    """What a rank was doing when it last wrote; times are seconds since 1970."""

    rank: int
    host: str
    pid: int
    marks: int
    """Marks made since the start: the order in which ranks get to their phases."""
    step: int
    phase: str
    since: float
    """When the phase began."""
    written: float
    """When this was written."""
    progress: float = 0.0
    """When the latest mark was made, or bytes were last seen to move."""

    def describe(self, now: float, sign_of_life_seconds: float) -> str:
        """One line."""
        line = f"rank {self.rank} (host {self.host}, process {self.pid}): step {self.step}, "
        line += f"{self.phase}, for {now - self.since:.0f} s"
        if self.progress > self.since:
            line += f" (bytes last moved {now - self.progress:.0f} s ago)"
        silent = now - self.written
        if silent <= sign_of_life_seconds:
            return line
        line = f"{line}; no sign of life for {silent:.0f} s"
        return f"{line}: stopped, dead, or its file system stalls"


def steady_now() -> float:
    """Seconds since 1970 by the clock as it stood when this process began.

    The system's clock may be set while a run goes on; a jump is no hang.
    """
    return _BEGAN + time.monotonic()


class Heartbeat:
    """Marks and watches one rank, from ``with`` to the end of it."""

    def __init__(
        self,
        product: Path,
        *,
        rank: int,
        world_size: int,
        timeout_s: float | None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """For one rank of a run with its ``3_checkpoints`` in ``product``.

        After ``timeout_s`` seconds without a mark the process ends (None: never) by ``leave``: at
        once, without the clean-up that may hang too.
        """
        self._folder, self._rank, self._world_size = product / FOLDER, rank, world_size
        self._timeout_s, self._leave = timeout_s, leave
        self._interval = min(_WRITE_SECONDS, (timeout_s or math.inf) / 10)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._now, self._stop = (0, 0, "start", steady_now()), threading.Event()
        self._progress, self._moves_bytes, self._bytes = steady_now(), False, 0
        work = {"heartbeat": self._write_often, "hang watch": self._watch}
        self._threads = [threading.Thread(target=work[n], name=n, daemon=True) for n in work]

    def __enter__(self) -> "Heartbeat":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.mark("ended")
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._write()

    def mark(self, phase: str, step: int | None = None, *, moves_bytes: bool = False) -> None:
        """Note what comes next, at which step (None: the latest); all ranks make the same marks.

        ``moves_bytes``: while the phase lasts, bytes that this process and its children read and
        write are progress too.
        """
        marks, latest_step, _, _ = self._now
        now = steady_now()
        self._now = (marks + 1, latest_step if step is None else step, phase, now)
        self._bytes = bytes_moved() if moves_bytes else 0
        self._progress, self._moves_bytes = now, moves_bytes

    def _write_often(self) -> None:
        while not self._stop.wait(self._interval):
            self._write()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            if self._moves_bytes:
                self._look_at_bytes()
            if self._timeout_s is not None and self._nobody_moves(self._timeout_s):
                self._end_hung_process(self._timeout_s)
                return

    def _look_at_bytes(self) -> None:
        moved = bytes_moved()
        # Not only more: the count of a child may go with it.
        if abs(moved - self._bytes) >= _LEAST_BYTES:
            self._bytes, self._progress = moved, steady_now()

    def _nobody_moves(self, timeout_s: float) -> bool:
        """Whether neither this rank nor, as far as their files tell, another has made progress.

        A file system that stalls must not keep this thread: the others are asked in a thread.
        """
        if steady_now() - self._progress <= timeout_s:
            return False
        latest: list[float] = []
        ask = threading.Thread(target=lambda: latest.append(self._latest_progress()), daemon=True)
        ask.start()
        ask.join(REPORT_SECONDS)
        return not latest or steady_now() - latest[0] > timeout_s

    def _latest_progress(self) -> float:
        return max(beat.progress for beat in self._read() if beat is not None)

    def _beat(self) -> Beat:
        marks, step, phase, since = self._now
        return Beat(
            self._rank,
            host=self._host,
            pid=self._pid,
            marks=marks,
            step=step,
            phase=phase,
            since=since,
            written=steady_now(),
            progress=self._progress,
        )

    def _write(self) -> None:
        """Replace this rank's file; a full or absent disk must not end a run that trains."""
        path = self._file(self._rank)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(self._beat())), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            print(f"rank {self._rank}: {path} could not be written: {error}", file=sys.stderr)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _read(self) -> list[Beat | None]:
        """Every rank's file; None for one that is not there or not whole."""
        beats: list[Beat | None] = []
        for rank in range(self._world_size):
            try:
                beats.append(Beat(**json.loads(self._file(rank).read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                beats.append(None)
        beats[self._rank] = self._beat()
        return beats

    def _leave_without_report(self) -> None:
        text = f"rank {self._rank}: no progress, and {self._folder} cannot be read or written"
        print(text, file=sys.stderr, flush=True)
        self._leave(HANG_EXIT_CODE)

    def _end_hung_process(self, timeout_s: float) -> None:
        """Say who is behind and where this process is; then leave."""
        # The report below reads and writes files, and the file system may be what hangs.
        out_of_time = threading.Timer(REPORT_SECONDS, self._leave_without_report)
        out_of_time.daemon = True
        out_of_time.start()
        text = describe_hang(self._read(), self._rank, timeout_s, _MARKS_TO_LIVE * self._interval)
        print(f"{text}\nstacks of rank {self._rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        try:
            with self._file(self._rank).with_suffix(".stacks").open("w", encoding="utf-8") as file:
                print(text, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"the stacks could not be written to {self._folder}: {error}", file=sys.stderr)
        print(write_flight_record(self._folder, self._rank), file=sys.stderr, flush=True)
        out_of_time.cancel()
        self._leave(HANG_EXIT_CODE)


def describe_hang(
    beats: Sequence[Beat | None], rank: int, timeout_s: float, sign_of_life_seconds: float
) -> str:
    """Which ranks the others wait for, as ``rank`` noticed; a beat is None where none is known.

    A file older than ``sign_of_life_seconds`` counts as left behind.
    """
    mine = beats[rank]
    assert mine is not None
    known = [beat for beat in beats if beat is not None]
    fewest = min(beat.marks for beat in known)
    behind = [beat for beat in known if beat.marks == fewest]
    lines = [
        f"rank {rank}: no progress for training.hang_timeout_s={timeout_s:g} s "
        f"at step {mine.step}, {mine.phase}"
    ]
    lines += [f"rank {n}: wrote no heartbeat" for n, beat in enumerate(beats) if beat is None]
    if len(behind) == len(beats):
        lines.append("all ranks are at the same place; the stacks tell what they wait for:")
    else:
        lines.append(f"{len(behind)} of {len(beats)} ranks are behind:")
    lines += [f"  {beat.describe(mine.written, sign_of_life_seconds)}" for beat in behind]
    return "\n".join(lines)


def bytes_moved() -> int:
    """Bytes that this process and its living children have read and written; 0 if nobody counts.

    Reads that the page cache answers count (``rchar``), and those of mapped files that it does not
    (``read_bytes``).
    """
    total = 0
    with contextlib.suppress(psutil.Error):
        this = psutil.Process()
        for process in [this, *this.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError, AttributeError):
                count: Any = process.io_counters()
                total += count.read_chars + count.write_chars + count.read_bytes
    return total


class StopSignals:
    """Remembers that a stop was asked for, from ``with`` to the end of it; main thread only."""

    def __init__(self, *, says_so: bool = True) -> None:
        """``says_so``: whether this process answers Ctrl-C; of ranks, their launcher does."""
        self.received: signal.Signals | None = None
        """The first stop signal this process got."""
        self._says_so = says_so

    def __enter__(self) -> "StopSignals":
        # A shell's background job ignores SIGINT, and goes on doing so.
        heard = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in heard}
        # A launcher may start ranks with these blocked, so that one which comes while they import
        # is kept until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def any_rank_asked(self, device: torch.device | str) -> bool:
        """Whether any rank was asked to stop, the same answer on all ranks.

        One all-reduce of one number, on the device where the backend wants it; every rank calls
        this at the same point of its steps.
        """
        asked = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; the first signal names the stop, a second SIGINT is the system's."""
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            # Not by this handler: Python runs none while the main thread waits in a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._says_so:
                os.write(2, f"{_CTRL_C}\n".encode())  # print may be what was interrupted
