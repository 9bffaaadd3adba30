"""``python -m launch.cluster.attempts begin|end|terminated|lead ...``: what a job does about ranks.

For ``slurm/common.sh``. Each attempt of a stage leaves a line in ``attempts.jsonl`` of its product
folder when it begins and one when it ends. Slurm starts some again by itself (preemption, a dead
node); for the others ``end`` decides, on what is written down and never on hope:

- exit code 0: done; 2: a fault of the user's, which no restart mends: stop;
- anything else: start again from the last checkpoint, without the node to blame where there is one;
  but stop when three attempts in a row ended where they had begun. Progress is a newer checkpoint
  (other stages: more files or journal lines).

``end`` prints one line for the job script: ``done``, ``stop`` or ``requeue [node,...]``; what a
person should read goes to stderr, the failing rank's last lines at the very end.

``lead`` prints how many seconds before its time limit a training must be told to stop.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launch.cluster.node_agent import ENDED_PREFIX
from longrope2.command import HANG_EXIT_CODE, REQUEUE_EXIT_CODE, USER_FAULT_EXIT_CODE, run_command
from longrope2.errors import ArtifactError
from longrope2.files.append_log import AppendLog, damaged_line, read_log
from longrope2.files.artifacts import PRODUCT_FOLDERS, read_manifest
from longrope2.tracking.metrics import METRICS_FILE, read_metrics

_ATTEMPTS_FILE = "attempts.jsonl"
_MOST_ATTEMPTS_WITHOUT_PROGRESS = 3
TRACEBACK_LINES, READ_LINES = 40, 1000
UNKNOWN_LEAD_SECONDS = 900
_LATEST_STEPS = 100
# What a rank says whose peer went away: the consequence, not the cause.
_PEER_IS_GONE = re.compile(
    r"Connection (closed|reset|refused)|DistNetworkError|DistBackendError|DistStoreError|"
    r"remote process exited|NCCL (error|communicator was aborted)|Socket Timeout|Broken pipe|"
    r"Watchdog caught collective"
)
# What a rank that waited in vain says of a stopped or dead one (longrope2.training.heartbeat).
_SILENT_RANK = re.compile(r"rank \d+ \(host ([^,.]+)[^,]*, process \d+\): .*; no sign of life")
# What a rank says whose hardware is at fault; CUDA's and the driver's words.
_HARDWARE = re.compile(
    r"uncorrectable ECC|ECC error|Xid|NVLink error|device.{0,20}(unavailable|lost)|"
    r"fallen off the bus|unspecified launch failure|hardware stack error|"
    r"No CUDA GPUs are available|CUDA-capable device.{0,20}busy"
)


@dataclass(frozen=True)
class Attempt:
    """One attempt that ended, or (``outcome`` "begun") that was heard of no more."""

    job: str
    """Slurm's job id; attempts of other jobs do not count."""
    restart: int
    """Times that Slurm had started the job before."""
    nodes: str
    found: int
    """Finished steps when it began; for stages without steps see ``progress_of``."""
    left: int
    """The same when it ended."""
    outcome: str
    """``begun``, ``done``, ``stopped`` (by a signal or the time limit), ``failed``, or
    ``terminated`` by Slurm itself."""
    exit_code: int = 0
    blamed: list[str] = field(default_factory=list)
    """Nodes that the next attempt leaves out."""
    time: float = field(default_factory=lambda: round(time.time(), 1))


@dataclass(frozen=True)
class FirstFailure:
    """The rank that is the cause of a failed attempt."""

    node: str
    rank: int
    exit_code: int
    text: str
    """The end of what it wrote to stderr."""

    @property
    def is_consequence(self) -> bool:
        """Whether it only says that a peer has gone."""
        misses_peer = self.exit_code > 0 and _PEER_IS_GONE.search(self.text) is not None
        return misses_peer or self.exit_code == -signal.SIGTERM

    @property
    def is_the_nodes_fault(self) -> bool:
        """Whether another node may do better: the rank was killed, or its hardware failed."""
        killed = self.exit_code < 0 and self.exit_code != -signal.SIGTERM
        return killed or _HARDWARE.search(self.text) is not None


def main() -> None:
    """Record the begin or the end of an attempt; see the module's docstring."""
    raw, prog = argparse.RawDescriptionHelpFormatter, "python -m launch.cluster.attempts"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("event", choices=("begin", "end", "terminated", "lead"))
    add("product", type=Path, help="product folder of the stage, e.g. runs/NAME/3_checkpoints")
    add("--logs", type=Path, help="folder of this attempt's rank files")
    add("--nodes", type=lambda text: text.split(","), default=[], help="nodes of the job")
    add("--code", type=int, default=0, help="exit code of the ranks")
    add("--stopped", action="store_true", help="the ranks had been asked to stop")
    given = parser.parse_args()
    product, logs = given.product, given.logs
    if given.event == "lead":
        print(stop_lead(product))
        return
    known = read_attempts(product, job=os.environ["SLURM_JOB_ID"])
    if given.event == "begin":
        begin(product, known)
    elif given.event == "terminated":
        _append(product, _ended(product, known, "terminated"))
    else:
        silent = nodes_without_end(logs, given.nodes) if logs is not None else []
        end(product, known, given.code, stopped=given.stopped, logs=logs, silent=silent)


def stop_lead(product: Path) -> int:
    """Seconds that a stop takes at most: the micro-step that runs, writing the state, and a margin.

    Twice what was measured (the longest micro-step of the latest steps, the newest checkpoint), and
    a minute; ``UNKNOWN_LEAD_SECONDS`` where nothing was.
    """
    saving = None
    with contextlib.suppress(ArtifactError):  # none, or a damaged one, which the ranks tell
        newest = read_manifest(product / f"step_{_newest_steps(product):08d}", "training_state")
        saving = newest.details.get("write_seconds")
    micro_steps = [
        seconds
        for record in read_metrics(product)[-_LATEST_STEPS:]
        for key, seconds in record.items()
        if key.startswith("perf/micro_step_seconds_")
    ]
    if saving is None or not micro_steps:
        return UNKNOWN_LEAD_SECONDS
    return math.ceil(2 * (max(micro_steps) + saving)) + 60


def begin(product: Path, known: list[Attempt]) -> None:
    """Note that an attempt begins; exits with 1 when those before were lost too often from here."""
    here = progress_of(product)
    lost = known and known[-1].outcome == "begun"
    if lost and _without_progress(known, here) >= _MOST_ATTEMPTS_WITHOUT_PROGRESS:
        how = "The last was cut off without a word, as when its node dies"
        sys.exit(f"error: {_in_vain(known, here)}. {how}")
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job, nodes = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NODELIST", "")
    begun = Attempt(job, restart, nodes, found=here, left=here, outcome="begun")
    _append(product, begun)


def end(
    product: Path,
    known: list[Attempt],
    code: int,
    *,
    stopped: bool,
    logs: Path | None,
    silent: list[str],
) -> None:
    """Note how an attempt ended, say it, and print what the job does next.

    ``silent`` nodes did not say how they ended.
    """
    outcome = "stopped" if stopped or code == REQUEUE_EXIT_CODE else "failed"
    failure = first_failure(logs) if logs is not None and code and outcome == "failed" else None
    blamed = []
    if failure is not None and failure.exit_code == HANG_EXIT_CODE:
        blamed = sorted(set(_SILENT_RANK.findall(failure.text)))
    elif failure is not None and failure.is_the_nodes_fault:
        blamed = [failure.node]
    elif failure is not None and failure.is_consequence:  # every rank that spoke misses a peer
        blamed = silent
    outcome = "done" if code == 0 else outcome
    ended = _ended(product, known, outcome, code=code, blamed=blamed)
    _append(product, ended)
    verdict, reason = decide([*known[:-1], ended], failure)
    print(reason, file=sys.stderr)
    if failure is not None:
        code = failure.exit_code
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        last_words = "\n".join(failure.text.splitlines()[-TRACEBACK_LINES:])
        print(f"--- rank {failure.rank} on {failure.node} ended first ({how}):", file=sys.stderr)
        print(last_words or "(it wrote nothing)", file=sys.stderr)
    print(verdict)


def decide(attempts: list[Attempt], failure: FirstFailure | None) -> tuple[str, str]:
    """What the job does next, ``done``, ``stop`` or ``requeue [node,...]``, and why.

    Of this job's ``attempts``, the latest last, none is ``begun`` unless it was lost; ``failure``
    is the cause of the latest, where it failed and ranks were started.
    """
    last = attempts[-1]
    if last.outcome == "done":
        return "done", "done"
    if USER_FAULT_EXIT_CODE in (last.exit_code, failure.exit_code if failure else 0):
        return "stop", "stopped: a fault that no restart mends; its message stands in this log"
    if _without_progress(attempts, last.left) >= _MOST_ATTEMPTS_WITHOUT_PROGRESS:
        return "stop", f"stopped: {_in_vain(attempts, last.left)}"
    next_start = "in the next start of this job"
    if last.exit_code == REQUEUE_EXIT_CODE:
        return "requeue", f"all is saved at {last.left}: goes on {next_start}"
    if last.outcome == "stopped":
        lost = "asked to stop, but the ranks had not saved in time"
        return "requeue", f"{lost}: goes on from {last.left} {next_start}"
    without = f" without {', '.join(last.blamed)}" if last.blamed else ""
    again = f"failed: starts again{without}, from {last.left}"
    return f"requeue {','.join(last.blamed)}".strip(), again


def first_failure(logs: Path) -> FirstFailure | None:
    """The cause among the ranks that failed, of ``ended-<node>.json`` and the ranks' files.

    The first in time; those last that only say that a peer has gone.
    """
    found: list[tuple[float, FirstFailure]] = []
    for path in sorted(logs.glob(f"{ENDED_PREFIX}*.json")):
        ended = json.loads(path.read_text(encoding="utf-8"))
        for rank, code in ended["exit_codes"].items():
            file = logs / f"rank-{int(rank):03d}.err"
            text, when = "", ended["time"]
            if file.is_file():
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                text, when = "\n".join(lines[-READ_LINES:]), file.stat().st_mtime
            found.append((when, FirstFailure(ended["node"], int(rank), code, text)))
    return min(found, key=lambda entry: (entry[1].is_consequence, entry[0]))[1] if found else None


def nodes_without_end(logs: Path, nodes: list[str]) -> list[str]:
    """Nodes whose agent left no word of how its ranks ended."""
    return [node for node in nodes if not (logs / f"{ENDED_PREFIX}{node}.json").is_file()]


def progress_of(product: Path) -> int:
    """Steps of the newest checkpoint; of other stages the files and lines of journals."""
    if product.name == PRODUCT_FOLDERS["checkpoints"]:
        return _newest_steps(product)
    count = 0
    for path in product.rglob("*"):
        if path.is_file() and path.name not in (_ATTEMPTS_FILE, METRICS_FILE):
            count += 1 + (path.read_bytes().count(b"\n") if path.suffix == ".jsonl" else 0)
    return count


def _newest_steps(product: Path) -> int:
    """Steps of the checkpoint that ``latest`` names; 0 without one, or where it names none."""
    latest = product / "latest"
    text = latest.read_bytes().strip() if latest.is_file() else b""
    return int(text[5:]) if re.fullmatch(rb"step_\d+", text) else 0


def read_attempts(product: Path, *, job: str) -> list[Attempt]:
    """Attempts of one job, oldest first: one entry each, ``begun`` replaced by how it ended."""
    path = product / _ATTEMPTS_FILE
    attempts: list[Attempt] = []
    for number, fields in enumerate(read_log(path), start=1):
        try:
            attempt = Attempt(**fields)
        except TypeError:
            raise damaged_line(path, number) from None
        if attempt.job == job:
            if attempts and attempt.outcome != "begun" and attempts[-1].outcome == "begun":
                attempts.pop()
            attempts.append(attempt)
    return attempts


def _ended(
    product: Path, known: list[Attempt], outcome: str, *, code: int = 0, blamed: Sequence[str] = ()
) -> Attempt:
    """The record of the end of the attempt that was begun last."""
    now, left = round(time.time(), 1), progress_of(product)
    last = replace(known[-1], left=left, outcome=outcome, exit_code=code, time=now)
    return replace(last, blamed=list(blamed))


def _without_progress(attempts: list[Attempt], here: int) -> int:
    """Latest attempts in a row that began and ended at ``here``, without those Slurm terminated."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.left != here or attempt.found != here:
            break
        count += attempt.outcome != "terminated"
    return count


def _in_vain(attempts: list[Attempt], here: int) -> str:
    nodes = dict.fromkeys(attempt.nodes for attempt in attempts[-_MOST_ATTEMPTS_WITHOUT_PROGRESS:])
    return (
        f"{_without_progress(attempts, here)} attempts in a row ended where they had begun, with "
        f"progress at {here} (on {', '.join(nodes)}); see what they say, mend it, and submit the "
        "same command again: it goes on from there"
    )


def _append(product: Path, attempt: Attempt) -> None:
    """Add one line and force it to disk."""
    with AppendLog(product / _ATTEMPTS_FILE, durable=True) as log:
        log.append(asdict(attempt))


if __name__ == "__main__":
    run_command(main)
