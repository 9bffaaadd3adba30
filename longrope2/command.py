"""How every command ends: its exit code, and a user's error as one message.

Exit codes: 0 done (or stopped as configured), 1 a fault of this project or a killed rank, and those
below. 75 and 76 are EX_TEMPFAIL ("try again later") and EX_PROTOCOL of sysexits.h, so that a job
script can tell them from all others (``slurm/common.sh``). Nothing heavy is imported here: a rank's
agent reads the codes before it loads torch.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping

from longrope2.errors import DiskFullError, UserError, is_disk_full

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

    So does a full disk, wherever it was met.
    """
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
        if not is_disk_full(error):
            raise
        print(f"error: {DiskFullError(error.filename or 'a file', error)}", file=sys.stderr)
        sys.exit(USER_FAULT_EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


def rank_exit_code(codes: Mapping[int, int]) -> int:
    """What a launcher ends with some of whose ranks failed.

    The requeue code when any rank says so: ranks agree on a stop, and none of them leaves before
    all is saved. Else the first failed rank's own code, and 1 when signals ended all of them.

    Args:
        codes: Rank -> exit code; negative where a signal ended it.
    """
    own = [code for _, code in sorted(codes.items()) if code > 0]
    return REQUEUE_EXIT_CODE if REQUEUE_EXIT_CODE in own else next(iter(own), 1)
