"""``python -m launch.train``: mixed-window training under DeepSpeed ZeRO and sequence parallelism.

Composes and checks the configuration, prints the plan, writes ``3_checkpoints/config.yaml``, then trains: in this process,
or in ``parallel.processes`` processes that torchrun starts here. Under torchrun or Slurm, start the ranks with
``--config RUN/3_checkpoints/config.yaml``: ranks read that file and never compose.
"""

import os
import subprocess
import sys
from pathlib import Path

from longrope2.artifacts import product_folder, read_manifest
from longrope2.command import run_command
from longrope2.config import claim_folder, compose, load
from longrope2.errors import ArtifactError, ConfigError
from longrope2.training import TrainRoot, make_plan, train, world_size_from_environment

CONFIG_FLAG = "--config"
# What may change between the parts of one run without making it another run.
CHANGEABLE = ("dry_run", "tracking", "parallel", "training.stop_after_step", "training.log_steps",
              "training.checkpoint_steps", "training.keep_checkpoints", "training.recompute")  # fmt: skip


def main() -> None:
    """Compose, check, plan, then train here or in processes of torchrun."""
    arguments = sys.argv[1:]
    if arguments[:1] == [CONFIG_FLAG]:
        train(_config_of_rank(arguments))
        return
    if world_size_from_environment() is not None:
        raise ConfigError(["under torchrun, give --config RUN/3_checkpoints/config.yaml: ranks do not compose"])
    config = compose(TrainRoot, "train", arguments)
    plan = make_plan(config, config.parallel.processes)
    print(plan.describe(config, config.parallel.processes))
    folder = product_folder(config.run.folder, "checkpoints")
    if config.dry_run:
        return
    claim_folder(folder, config, changeable=CHANGEABLE)
    if _is_complete(folder):
        print(f"already complete: {folder / 'final'}")
        return
    if config.parallel.processes == 1:
        train(config)
    else:
        _start_processes(folder / "config.yaml", config.parallel.processes)
    print(f"checkpoints in {folder}")


def _config_of_rank(arguments: list[str]) -> TrainRoot:
    """The configuration that the composing process wrote."""
    if len(arguments) != 2:
        raise ConfigError(
            [f"{CONFIG_FLAG} takes one path and no overrides; got {' '.join(arguments[1:]) or 'nothing'}"]
        )
    return load(TrainRoot, Path(arguments[1]))


def _start_processes(config_path: Path, processes: int) -> None:
    """Run the ranks under torchrun on this machine and end as they end."""
    environment = os.environ.copy()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # DeepSpeed uses torch names that are deprecated
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "launch.train", CONFIG_FLAG, str(config_path)]  # fmt: skip
    ended = subprocess.run(command, env=environment, check=False).returncode
    if ended != 0:
        sys.exit(ended)


def _is_complete(folder: Path) -> bool:
    """Whether the run has reached its end."""
    try:
        read_manifest(folder, "checkpoints")
    except ArtifactError:
        return False
    return True


if __name__ == "__main__":
    run_command(main)
