"""``python -m launch.doctor [WORD ...]``: look before computing.

Without a word, or with settings only (``model=llama3_8b``): what this machine has for the whole
flow, green or with what to do about it; exit code 1 when something stops a run. ``rope``: periods,
factors and the bound, per dimension. ``node`` and its siblings: fitness of a cluster's nodes.
"""

import sys
from collections.abc import Callable

from longrope2.command import run_command
from longrope2.errors import ConfigError
from longrope2.help import HELP_FLAGS


def _machine(arguments: list[str]) -> None:
    from launch.doctor.machine import machine_command

    machine_command(arguments)


def _rope(arguments: list[str]) -> None:
    from launch.doctor.rope import rope_command  # each word loads its own imports only

    rope_command(arguments)


def _node(arguments: list[str]) -> None:
    from launch.doctor.node import node_command

    node_command(arguments)


def _nodes(arguments: list[str]) -> None:
    from launch.doctor.node import nodes_command

    nodes_command(arguments)


def _network(arguments: list[str]) -> None:
    from launch.doctor.network import network_command

    network_command(arguments)


def _links(arguments: list[str]) -> None:
    from launch.doctor.network import links_command

    links_command(arguments)


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {
    "rope": _rope,
    # For the job scripts of slurm/: the fitness of each node, and of what is between them.
    "node": _node,
    "nodes": _nodes,
    "network": _network,
    "links": _links,
}


def main() -> None:
    """Run the subcommand that the first word names; without one look at the machine.

    Raises:
        ConfigError: an unknown word.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if not word or "=" in word or word in HELP_FLAGS:
        _machine(sys.argv[1:])
        return
    if word not in SUBCOMMANDS:
        raise ConfigError(
            [f"the first word must be one of {', '.join(SUBCOMMANDS)}, or none; got {word!r}"]
        )
    SUBCOMMANDS[word](sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
