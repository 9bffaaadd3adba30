"""How every command ends: its exit code, and a user's error as one message.

Exit codes: 0 done (or stopped as configured), 1 a fault of this project or a killed rank, and those
below; 143 or 129 where SIGTERM or SIGHUP ended a command that cleans up. 75 and 76 are EX_TEMPFAIL
("try again later") and EX_PROTOCOL of sysexits.h, so that a job script can tell them from all
others (``slurm/common.sh``). Nothing heavy is imported here: a rank's agent reads the codes before
it loads torch.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from longrope2.errors import UserError
from longrope2.system_errors import explain

USER_FAULT_EXIT_CODE = 2
"""Something the user gave cannot be used: no restart mends it."""
REQUEUE_EXIT_CODE = 75
"""Saved and stopped because of a signal: the same command goes on from there."""
HANG_EXIT_CODE = 76
"""A rank saw no progress for ``training.hang_timeout_s``."""
LAUNCHER_VARIABLE = "LONGROPE2_LAUNCHER"
"""In the environment of ranks: the process id of the ``launch`` command that starts them."""
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT


def run_command(main: Callable[[], None]) -> None:
    """Run ``main``; a ``UserError`` becomes one message on stderr and its exit code.

    So does what the system refuses for want of room, rights or files (``system_errors.py``).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text in its encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_FAULT_EXIT_CODE)
    except BrokenPipeError:  # the reader of our output (head, a pager) has gone
        # Or the interpreter's last flush fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if (line := explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(USER_FAULT_EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def cleaning_up_when_ended() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP leave through every ``finally``: Python's default runs none.

    A signal that is ignored (``nohup``) stays ignored; one more does not disturb the cleaning up.
    The exit code is a shell's for the signal, 128 and its number.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        name = signal.Signals(number).name
        print(f"ended by {name}; run the same command again", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_exit_code(codes: Mapping[int, int]) -> int:
    """What a launcher ends with some of whose ranks failed.

    The requeue code when any rank says so: ranks agree on a stop, and none of them leaves before
    all is saved. Else the first failed rank's own code, and 1 when signals ended all of them.

    Args:
        codes: Rank -> exit code; negative where a signal ended it.
    """
    own = [code for _, code in sorted(codes.items()) if code > 0]
    return REQUEUE_EXIT_CODE if REQUEUE_EXIT_CODE in own else next(iter(own), 1)
