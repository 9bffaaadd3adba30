"""``python -m launch.train``: mixed-window training under DeepSpeed ZeRO and sequence parallelism.

Composes and checks the configuration, prints the plan, writes ``3_checkpoints/config.yaml``, then
trains: in this process, or in ``parallel.processes`` processes that torchrun starts here. Under
torchrun or Slurm, first give ``--prepare FILE`` (it stops after writing), then start the ranks with
``--config RUN/3_checkpoints/config.yaml``: ranks never compose.

Exit codes (``longrope2.command``): 0 done (or stopped at ``training.stop_after_step``), 2 a fault
of the user's, 75 stopped by SIGTERM or SIGUSR1 with everything saved: the same command goes on, 76
no progress for ``training.hang_timeout_s``: what was printed names the rank, the same command goes
on from the newest checkpoint. A torchrun of your own ends with 1 instead of 75 and kills its ranks
30 seconds after SIGTERM; ``launch.cluster.node_agent`` is a torchrun that does neither (``slurm/``
uses it).
"""

import os
import sys
from pathlib import Path

from launch.cluster.torchrun import (
    CONFIG_FLAG,
    config_path_of_rank,
    note_config_of_ranks,
    run_under_torchrun,
    split_prepare,
)
from longrope2.command import REQUEUE_EXIT_CODE, run_command
from longrope2.config import claim_folder, compose, load
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import MANIFEST_NAME, product_folder, read_manifest
from longrope2.parallel.processes import world_size_from_environment
from longrope2.training.config import TrainRoot
from longrope2.training.plan import CHANGEABLE_TRAINING_KEYS, check_machine, make_plan, preview_plan
from longrope2.training.run import RunEnd, train

# What may change between the parts of one run without making it another run.
CHANGEABLE = (
    "dry_run",
    "tracking",
    "parallel",
    "zero",
    "attention",
    *(f"training.{key}" for key in CHANGEABLE_TRAINING_KEYS),
)


def main() -> None:
    """Compose, check, plan, then train here or in processes of torchrun."""
    arguments = sys.argv[1:]
    if arguments[:1] == [CONFIG_FLAG]:
        _exit_unless_done(train(load(TrainRoot, config_path_of_rank(arguments))))
        return
    if world_size_from_environment() is not None:
        raise ConfigError(
            ["under torchrun, give --config RUN/3_checkpoints/config.yaml: ranks do not compose"]
        )
    prepare, overrides = split_prepare(arguments)
    config = compose(TrainRoot, "train", overrides)
    if config.dry_run:
        print(preview_plan(config, config.parallel.processes))
        return
    plan = make_plan(config, config.parallel.processes)
    print(plan.describe(config, config.parallel.processes))
    folder = product_folder(config.run.folder, "checkpoints")
    check_machine(config)
    complete = _is_complete(folder, config)
    claim_folder(folder, config, changeable=CHANGEABLE)
    if prepare is not None:
        note_config_of_ranks(prepare, None if complete else folder / "config.yaml")
    if complete:
        print(f"already complete: {folder / 'final'}")
    if complete or prepare is not None:
        return
    if config.parallel.processes == 1:
        _exit_unless_done(train(config))
    else:
        ended = run_under_torchrun(
            "launch.train", folder / "config.yaml", config.parallel.processes
        )
        if ended != 0:
            sys.exit(ended)
    print(f"checkpoints in {folder}")


def _exit_unless_done(end: RunEnd) -> None:
    """End with the requeue code when a signal stopped the run."""
    if end is not RunEnd.interrupted:
        return
    if os.environ.get("RANK", "0") != "0":
        # All is saved and this rank has no log to close. Leaving by the interpreter's shut-down was
        # once seen to abort (presumably a communication thread whose peers had just gone), and 75
        # was lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REQUEUE_EXIT_CODE)
    sys.exit(REQUEUE_EXIT_CODE)


def _is_complete(folder: Path, config: TrainRoot) -> bool:
    """Whether the run has reached its end.

    Raises:
        ConfigError: it has, with ``final/`` in another number format than this command asks for.
    """
    try:
        manifest = read_manifest(folder, "checkpoints")
    except ArtifactError:
        return False
    written, wanted = manifest.config["training"]["final_dtype"], config.training.final_dtype.value
    if written != wanted:
        raise ConfigError(
            [
                f"training.final_dtype={wanted}, but {folder / 'final'} is complete and was written with {written}; to write it "
                f"again from the newest checkpoint, remove {folder / MANIFEST_NAME}"
            ]
        )
    return True


if __name__ == "__main__":
    run_command(main)
