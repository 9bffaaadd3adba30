"""``srun python -m launch.cluster.node_agent TORCHRUN_ARGUMENTS``: torchrun on a node of a job.

The arguments are torchrun's, and its agent does the work. What this adds:

- SIGUSR1 and SIGTERM go on to the ranks, which decide when to end (torchrun kills them after 30
  seconds).
- The exit code is the ranks' own: 75 (stopped by a signal, all saved), 2 (a fault of the user's),
  ...; torchrun's is 1.
- ``--log-dir`` gets ``rank-003.out`` and ``rank-003.err``, by global rank, and
  ``ended-<node>.json`` when ranks failed.
- Ranks are numbered by node name, and the node of the rendezvous is not guessed from addresses: the
  first name is rank 0.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from launch.cluster.rank_environment import set_rank_environment
from longrope2.command import rank_exit_code
from longrope2.files.artifacts import write_text
from longrope2.help import HELP_FLAGS

ENDED_PREFIX = "ended-"
_SECONDS_BETWEEN_LOOKS = 0.5


def main() -> None:
    """Run the agent of this node; ends with the ranks' exit code."""
    if set(sys.argv[1:]) & set(HELP_FLAGS):
        print(__doc__)
        return
    stop = _StopSignals()
    set_rank_environment()
    # torch loads for seconds, in which signals must be caught.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    node = os.environ["SLURMD_NODENAME"]
    parsed = parse_args(sys.argv[1:])
    config, command, arguments = config_from_args(parsed)
    config.local_addr = node
    is_first = parsed.rdzv_endpoint.split(":")[0] == node
    config.rdzv_configs["is_host"] = str(is_first)
    config.signals_to_handle = "SIGINT"
    config.log_line_prefix_template = " "  # one rank is shown: it needs no label
    config.logs_specs = _rank_files(Path(parsed.log_dir), shows_rank_0=is_first)
    try:
        stop.pass_on()
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        ended = {"node": node, "time": time.time(), "exit_codes": codes}
        write_text(Path(parsed.log_dir) / f"{ENDED_PREFIX}{node}.json", json.dumps(ended) + "\n")
        sys.exit(rank_exit_code(codes))


class _StopSignals:
    """Stop signals of this process, passed on to its ranks."""

    def __init__(self) -> None:
        # Ranks inherit the block: one that reaches a rank before it can save is kept until it can.
        # SIGTERM is not blocked, or nothing but SIGKILL could end a rank that is stuck.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._asked: signal.Signals | None = None
        self._told: set[int] = set()

    def pass_on(self) -> None:
        """Start telling the ranks there are, and those still to come."""
        threading.Thread(target=self._wait_for_sigusr1, daemon=True).start()
        threading.Thread(target=self._tell_ranks, daemon=True).start()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.SIGTERM
        if not _children():
            sys.exit(128 + number)

    def _wait_for_sigusr1(self) -> None:
        signal.sigwait({signal.SIGUSR1})
        self._asked = self._asked or signal.SIGUSR1

    def _tell_ranks(self) -> None:
        """Each rank once: a second signal could hit one that has saved and is about to leave."""
        while True:
            if self._asked is not None:
                for child in _children():
                    if child.pid not in self._told:
                        self._told.add(child.pid)
                        with contextlib.suppress(OSError):
                            child.send_signal(self._asked)
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _children() -> list[Any]:
    import psutil

    return psutil.Process().children()


def _rank_files(folder: Path, *, shows_rank_0: bool) -> Any:
    """Files of the ranks' output, by global rank; rank 0's also goes to the job's log."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, Std

    class RankFiles(DefaultLogsSpecs):
        """torchrun's own, renamed: it numbers them by local rank, in a folder for each node."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            """The files of this node's ranks."""
            chosen, renamed = super().reify(envs), {}
            for kind in ("stdouts", "stderrs", "tee_stdouts", "tee_stderrs"):
                ending = "out" if kind.endswith("stdouts") else "err"
                renamed[kind] = {
                    i: str(folder / f"rank-{int(envs[i]['RANK']):03d}.{ending}")
                    for i in getattr(chosen, kind)
                }
            return dataclasses.replace(chosen, **renamed)

    tee = {0: Std.ALL} if shows_rank_0 else Std.NONE
    return RankFiles(log_dir=str(folder / ".torchrun"), redirects=Std.ALL, tee=tee)


if __name__ == "__main__":
    main()
