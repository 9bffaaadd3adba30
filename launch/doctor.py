"""``python -m launch.doctor WORD ...``: look before computing. ``rope``: periods, factors and the bound, per dimension."""

import sys
from collections.abc import Callable

from launch.doctor_rope import rope_command
from longrope2.command import run_command
from longrope2.errors import ConfigError

SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {"rope": rope_command}


def main() -> None:
    """Run the subcommand that the first word names.

    Raises:
        ConfigError: there is none, or an unknown one.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in SUBCOMMANDS:
        given = f"got {word!r}" if word else "got nothing"
        raise ConfigError([f"the first word must be one of {', '.join(SUBCOMMANDS)}; {given}"])
    SUBCOMMANDS[word](sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
