"""How every command ends: user errors become one message and exit code 2, everything else keeps its traceback."""

import os
import sys
from collections.abc import Callable

from longrope2.errors import UserError


def run_command(main: Callable[[], None]) -> None:
    """Run ``main``; on a ``UserError`` print ``error: <text>`` to stderr and exit with code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output (head, a pager) has gone
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter's last flush fails again
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
