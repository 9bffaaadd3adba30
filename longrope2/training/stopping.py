"""Stop signals: a cluster that wants its nodes back gets a checkpoint, not a dead run.

SIGTERM (cancelled, preempted) and SIGUSR1 (``#SBATCH --signal=USR1@300``: the time limit is near) are remembered, not obeyed
at once. Between two optimizer steps all ranks agree whether any of them was asked to stop; so none stops alone while
the others wait in a collective, and what is saved is a whole step.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["REQUEUE_EXIT_CODE", "STOP_SIGNALS", "StopSignals"]

REQUEUE_EXIT_CODE = 75
"""Exit code of a run that saved and stopped because of a signal: the same command goes on from there.

It is EX_TEMPFAIL of sysexits.h ("try again later"), apart from 0 (done or stopped as configured), 1 (a fault of this project,
or a killed rank) and 2 (a fault of the user's), so that a job script can requeue on it and on nothing else.
"""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers that a stop was asked for, from ``with`` to the end of it; main thread only."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first stop signal this process got."""

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        # A launcher may start ranks with these blocked, so that one which comes while they import is kept until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def any_rank_asked(self, device: torch.device | str) -> bool:
        """Whether any rank was asked to stop, the same answer on all ranks; one all-reduce of one number.

        Every rank calls this at the same point of its steps.

        Args:
            device: Where the process group's backend wants its tensors.
        """
        asked = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; the first signal names the stop."""
        self.received = self.received or signal.Signals(number)
