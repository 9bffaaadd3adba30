"""``python -m launch.evaluate``: compare models by what ``suite=`` names.

By default these are needles, perplexity and retention. Every finished measurement is a line of
``4_evaluations/results.jsonl`` and every answer a line of ``answers/``, so the same command resumes
after a kill and a second run measures only what is new. Needles and text come from the held-out
split of the corpus. Requests are spread over torchrun's ranks, and over Slurm arrays with
``evaluation.shard=i/n``; the shard that ends last sums up.
"""

import sys

from rich.console import Console

from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError, waiting_lines
from longrope2.evaluation.before import known_faults, missing_inputs
from longrope2.evaluation.config import EvaluateRoot, check, use_checkpoint
from longrope2.files.artifacts import product_folder
from longrope2.files.lease import only_writer
from longrope2.model.folder import look_before


def main() -> None:
    """Compose, check, print the plan, run, print what was found."""
    config = compose(EvaluateRoot, "evaluate", sys.argv[1:])
    use_checkpoint(config)
    look = look_before(config.model)
    if faults := known_faults(config, look):
        raise ConfigError(faults)
    look.print_notes()
    # Only now: torch and transformers load for seconds.
    from longrope2.evaluation.run import check_seed, describe, own_shard, run_evaluation
    from longrope2.evaluation.subjects import resolve_subjects
    from longrope2.report.paper import paper_text

    base_folder = check(config)
    check_seed(config)
    missing = missing_inputs(config) if config.dry_run else {}
    shard, folder = own_shard(config), product_folder(config.run.folder, "evaluations")
    subjects = resolve_subjects(config, base_folder, missing=missing)
    if shard.index == 0:
        print(describe(config, subjects, base_folder))
        if missing:
            print(waiting_lines("evaluation", list(missing.values())))
    if config.dry_run:
        return
    part = f".{shard.index + 1}_of_{shard.count}" if shard.count > 1 else ""
    with only_writer(config.run.folder, f"{folder.name}{part}"):
        is_finished, suite = run_evaluation(config, base_folder, subjects)
    if suite is not None:
        Console(width=160).print(paper_text(suite), markup=False, highlight=False)
    if is_finished:
        print(f"evaluations in {folder}")


if __name__ == "__main__":
    run_command(main)
