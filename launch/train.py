"""``python -m launch.train``: mixed-window training under DeepSpeed ZeRO and sequence parallelism.

Composes and checks the configuration, prints the plan, writes ``3_checkpoints/config.yaml``, then trains: in this process,
or in ``parallel.processes`` processes that torchrun starts here. Under torchrun or Slurm, start the ranks with
``--config RUN/3_checkpoints/config.yaml``: ranks read that file and never compose.
"""

import sys
from pathlib import Path

from launch.torchrun import CONFIG_FLAG, config_path_of_rank, run_under_torchrun
from longrope2.artifacts import product_folder, read_manifest
from longrope2.command import run_command
from longrope2.config import claim_folder, compose, load
from longrope2.errors import ArtifactError, ConfigError
from longrope2.parallel import world_size_from_environment
from longrope2.training import TrainRoot, make_plan, train

# What may change between the parts of one run without making it another run.
CHANGEABLE = ("dry_run", "tracking", "parallel", "training.stop_after_step", "training.log_steps",
              "training.checkpoint_steps", "training.keep_checkpoints", "training.recompute")  # fmt: skip


def main() -> None:
    """Compose, check, plan, then train here or in processes of torchrun."""
    arguments = sys.argv[1:]
    if arguments[:1] == [CONFIG_FLAG]:
        train(load(TrainRoot, config_path_of_rank(arguments)))
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
        ended = run_under_torchrun("launch.train", folder / "config.yaml", config.parallel.processes)
        if ended != 0:
            sys.exit(ended)
    print(f"checkpoints in {folder}")


def _is_complete(folder: Path) -> bool:
    """Whether the run has reached its end."""
    try:
        read_manifest(folder, "checkpoints")
    except ArtifactError:
        return False
    return True


if __name__ == "__main__":
    run_command(main)
