"""Start the processes of a command on this machine, and read what each of them is given."""

import os
import subprocess
import sys
from pathlib import Path

from longrope2.errors import ConfigError

__all__ = ["CONFIG_FLAG", "config_path_of_rank", "run_under_torchrun"]

CONFIG_FLAG = "--config"


def config_path_of_rank(arguments: list[str]) -> Path:
    """The path after ``--config``: ranks read a written configuration, they do not compose.

    Raises:
        ConfigError: no path, or more than that.
    """
    if len(arguments) != 2:
        raise ConfigError(
            [f"{CONFIG_FLAG} takes one path and no overrides; got {' '.join(arguments[1:]) or 'nothing'}"]
        )
    return Path(arguments[1])


def run_under_torchrun(module: str, config_path: Path, processes: int) -> int:
    """Run ``python -m <module> --config <path>`` in ``processes`` processes; returns torchrun's exit code."""
    environment = os.environ.copy()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # DeepSpeed uses torch names that are deprecated
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", module, CONFIG_FLAG, str(config_path)]  # fmt: skip
    return subprocess.run(command, env=environment, check=False).returncode
