"""``python -m launch.train``: mixed-window training under DeepSpeed ZeRO and sequence parallelism.

Composes and checks the configuration, prints the plan, writes ``3_checkpoints/config.yaml``, then
trains: in this process, or in ``parallel.processes`` processes that torchrun starts here. Under
torchrun or Slurm, first give ``--prepare FILE`` (it stops after writing), then start the ranks with
``--config RUN/3_checkpoints/config.yaml``: ranks never compose.

Exit codes (``longrope2.command``): 0 done (or stopped at ``training.stop_after_step``), 2 a fault
of the user's, 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C with everything saved (a second Ctrl-C ends
at once), 76 no progress for ``training.hang_timeout_s``; after both the same command goes on. A
torchrun of your own ends with 1 instead of 75 and kills its ranks 30 seconds after SIGTERM;
``launch.cluster.node_agent`` is a torchrun that does neither (``slurm/`` uses it).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.torchrun import note_config_of_ranks, read_arguments, run_under_torchrun
from longrope2.claim import claim_folder
from longrope2.command import REQUEUE_EXIT_CODE, run_command
from longrope2.errors import ArtifactError, ConfigError, DamagedError
from longrope2.evaluation.before import require_unchanged_subject
from longrope2.files.artifacts import MANIFEST_NAME, read_manifest
from longrope2.files.guide import write_guide
from longrope2.files.lease import only_writer
from longrope2.model.folder import look_before
from longrope2.training.before import known_faults
from longrope2.training.config import CHANGEABLE_TRAINING_KEYS, TrainRoot

if TYPE_CHECKING:
    from longrope2.training.plan import ResolvedRun
    from longrope2.training.run import RunEnd

# What may change between the parts of one run without making it another run.
CHANGEABLE = ("dry_run", "tracking", "parallel", "zero", "attention")
CHANGEABLE += tuple(f"training.{key}" for key in CHANGEABLE_TRAINING_KEYS)


def main() -> None:
    """Compose, check, describe, then train here or in processes of torchrun."""
    file = "RUN/3_checkpoints/config.yaml"
    given = read_arguments(TrainRoot, "train", sys.argv[1:], file=file)
    config = given.config
    if not given.is_rank:
        _refuse_what_is_known(config)
    # Only now: torch and DeepSpeed load for seconds.
    from data_prep.heldout import heldout_corpus
    from longrope2.export.hugging_face import check_exportable
    from longrope2.training.forecast import make_forecast
    from longrope2.training.plan import resolve_run
    from longrope2.training.run import train

    if given.is_rank:
        _exit_unless_done(train(config))
        return
    run = resolve_run(config, config.parallel.processes)
    check_exportable(run.model_folder, config.model.original_len, config.target_len)
    if not config.dry_run:
        run.refuse_what_is_missing()
    if config.training.heldout_every and not run.misses("segments"):
        heldout_corpus(run.segments_folder)
    print(run.describe(), make_forecast(run).line(), *run.describe_missing(), sep="\n")
    if config.dry_run:
        return
    with only_writer(config.run.folder, run.folder.name):
        complete = _is_complete(run.folder, config)
        claim_folder(run.folder, config, changeable=CHANGEABLE)
        write_guide(config.run.folder)
        if not complete:
            _prepare_what_takes_long(run)
    config_file = run.folder / "config.yaml"
    if given.note is not None:
        note_config_of_ranks(given.note, None if complete else config_file)
    if complete:
        print(f"already complete: {run.folder / 'final'}")
    if complete or given.note is not None:
        return
    if run.world_size == 1:
        _exit_unless_done(train(config))
    elif ended := run_under_torchrun("launch.train", config_file, run.world_size):
        sys.exit(ended)
    print(f"checkpoints in {run.folder}")


def _refuse_what_is_known(config: TrainRoot) -> None:
    """Look before anything is loaded.

    Raises:
        ConfigError: all faults together.
    """
    look = look_before(config.model, takes_copy=config.dry_run)
    if faults := known_faults(config, look):
        raise ConfigError(faults)
    look.print_notes()


def _prepare_what_takes_long(run: "ResolvedRun") -> None:
    """Before ranks hold GPUs: a checkpoint of another number of ranks, held-out segments."""
    from longrope2.training.checkpoint import convert_before_ranks

    stage, identity = run.config.parallel.zero_stage, run.identity()
    convert_before_ranks(run.folder, identity, world_size=run.world_size, zero_stage=stage)
    if run.config.training.heldout_every:
        print(_write_heldout(run))


def _write_heldout(run: "ResolvedRun") -> str:
    """Held-out segments, once, before any rank starts; how many, in a line."""
    from data_prep.heldout import pack_heldout
    from longrope2.corpora.tokenizer import load_document_tokenizer

    encoder = load_document_tokenizer(run.model_folder, run.config.model.document_start)
    number = run.config.training.heldout_segments
    return pack_heldout(run.heldout_folder, run.segments_folder, encoder, number)


def _exit_unless_done(end: "RunEnd") -> None:
    """End with the requeue code when a signal stopped the run."""
    from longrope2.training.run import RunEnd  # is loaded by now

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
    """Whether the run has reached its end, with ``final/`` in the number format asked for."""
    try:
        manifest = read_manifest(folder, "checkpoints")
    except DamagedError as error:
        print(f"note: {error}: written again from the newest checkpoint")
        return False
    except ArtifactError:
        return False
    written, wanted = manifest.config["training"]["final_dtype"], config.training.final_dtype.value
    if written != wanted:
        other = f"training.final_dtype={wanted}, but {folder / 'final'} is complete and was written"
        again = "to write it again from the newest checkpoint"
        raise ConfigError([f"{other} with {written}; {again}, remove {folder / MANIFEST_NAME}"])
    require_unchanged_subject(folder / "final")
    return True


if __name__ == "__main__":
    run_command(main)
