"""``python -m launch.export``: the run's trained model as Hugging Face folders.

``5_exports/hugging_face``, or one folder per ``export.variants``; each is checked by loading it
again with plain transformers before it appears. With ``export.trained=false`` the base model with
the factors of ``rope=``, which nobody trained, in ``5_exports/untrained``.
"""

import sys

from longrope2.claim import claim_folder
from longrope2.command import cleaning_up_when_ended, run_command
from longrope2.config import compose
from longrope2.errors import ConfigError, waiting_lines
from longrope2.export.variants import ExportRoot, final_folders, known_faults, missing_input
from longrope2.files.guide import write_guide
from longrope2.files.lease import only_writer
from longrope2.model.folder import look_before
from longrope2.rope.factors import VERDICT


def main() -> None:
    """Compose, check, find the checkpoint, then write, verify and publish."""
    config = compose(ExportRoot, "export", sys.argv[1:])
    look = look_before(config.model)
    if faults := known_faults(config, look):
        raise ConfigError(faults)
    look.print_notes()
    if config.dry_run and (missing := missing_input(config)):
        print(_waiting(config, missing))
        return
    with cleaning_up_when_ended():
        _export(config)


def _export(config: ExportRoot) -> None:
    """Find, print the plan, and unless that is all that is wanted, write, verify and publish."""
    # Only now: torch and transformers load for seconds.
    from longrope2.export.run import cost_in_words, find_export, is_complete, publish

    export = find_export(config)
    factors, places = export.factors, ", ".join(map(str, export.finals))
    window = f"window {factors.geometry.original_len} -> {factors.target_len}"
    if config.export.trained:
        print(f"checkpoint {export.checkpoint}: {window}")
    else:
        print(f"base model {export.checkpoint}: {window}, not trained for it")
    for final in export.finals:
        print(f"export     {final}, {config.export.dtype.value}, rope {factors.method}")
    if not config.export.trained and VERDICT in factors.provenance:
        print(f"factors    {' '.join(factors.provenance[VERDICT].split())}")
    print(f"cost       {cost_in_words(export)}")
    if config.dry_run:
        return
    with only_writer(config.run.folder, export.folder.name):
        if is_complete(export):
            print(f"already complete: {places}")
            return
        claim_folder(export.folder, config, changeable=("dry_run", "export", "corpus"))
        write_guide(config.run.folder)
        verified = publish(export)
    for name, by_length in verified.items():
        for length, difference in by_length.items():
            differs = f"{name} differs by at most {difference:.1e} of the largest logit"
            print(f"verified   at {length} tokens: {differs}")
    print(f"export in {places}")


def _waiting(config: ExportRoot, missing: str) -> str:
    """What a dry run says before there is anything to export."""
    is_from = "checkpoint" if config.export.trained else "base model with factors"
    lines = [f"{is_from} not there yet: window {config.model.original_len} -> {config.target_len}"]
    dtype = config.export.dtype.value
    lines += [f"export     {final}, {dtype}" for final in final_folders(config)]
    return "\n".join([*lines, waiting_lines("export", [missing])])


if __name__ == "__main__":
    run_command(main)
