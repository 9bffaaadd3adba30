"""``python -m launch.doctor [WORD ...]``: look before computing.

Without a word, or with settings only (``model=llama3_8b``): what this machine has for the whole
flow, green or with what to do about it; exit code 1 when something stops a run.

``rope [METHOD ...]``: periods, factors and the bound, per dimension.

``node``, ``nodes``, ``network``, ``links``: whether the nodes of a job are fit, one by one, beside
each other, and between them; for the job scripts of ``slurm/``. ``--help`` after each says more.
"""

import sys

from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError
from longrope2.help import HELP_FLAGS

WORDS = ("rope", "node", "nodes", "network", "links")


def main() -> None:
    """Run the command that the first word names; without one look at the machine.

    Raises:
        ConfigError: an unknown word.
    """
    # Each word loads its own imports only.
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if not word or "=" in word or word in HELP_FLAGS:
        from launch.doctor.rope import DoctorRoot

        config = compose(DoctorRoot, "doctor", sys.argv[1:])
        from launch.doctor.machine import machine_command  # only now: torch loads for seconds

        machine_command(config)
        return
    if word == "rope":
        from launch.doctor.rope import rope_command as command
    elif word == "node":
        from launch.doctor.node import node_command as command
    elif word == "nodes":
        from launch.doctor.node import nodes_command as command
    elif word == "network":
        from launch.doctor.network import network_command as command
    elif word == "links":
        from launch.doctor.network import links_command as command
    else:
        known = f"the first word must be one of {', '.join(WORDS)}, or none"
        raise ConfigError([f"{known}; got {word!r}"])
    command(sys.argv[2:])


if __name__ == "__main__":
    run_command(main)
