"""``python -m launch.search``: find a model's rescale factors and critical dimension for a window.

Writes ``2_factors/``: the frozen samples, a journal of every loss, ``factors.json``,
``history.json``, metrics and, last, the manifest. A killed search is resumed by the same command
and ends with the same result; a finished one is not repeated.
"""

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.cluster.torchrun import note_config_of_ranks, read_arguments, run_under_torchrun
from longrope2.claim import claim_folder
from longrope2.command import REQUEUE_EXIT_CODE, run_command
from longrope2.config import dump
from longrope2.corpora.run_corpus import missing_corpus
from longrope2.errors import ConfigError, waiting_lines
from longrope2.files.artifacts import MANIFEST_NAME, atomic_path, product_folder, read_manifest
from longrope2.files.guide import write_guide
from longrope2.files.lease import only_writer, refuse_second_writer
from longrope2.files.unchanged import require_unchanged
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.folder import look_before
from longrope2.rope.factors import VERDICT, RescaleFactors
from longrope2.search.before import known_faults
from longrope2.search.config import SearchRoot

_ANEW = "the same command makes it again from the journals"
_RANKS_CONFIG = "ranks.yaml"
_PROJECTION = ("search.projected_gpus", "search.projected_tflops")
CHANGEABLE = ("dry_run", "tracking", "parallel.processes", *_PROJECTION)


def main() -> None:
    """Compose, check and plan; then search here, or in processes of torchrun; then report."""
    file = "FILE, a search configuration"
    given = read_arguments(SearchRoot, "search", sys.argv[1:], file=file)
    config, note = given.config, given.note
    if given.is_rank:
        _search(config)
        return
    look = look_before(config.model)
    if faults := known_faults(config, look):
        raise ConfigError(faults)
    look.print_notes()
    # Only now: torch and transformers load for seconds.
    from longrope2.export.hugging_face import check_exportable
    from longrope2.search.prepare import check, describe, refuse_other_model

    model_folder, space = check(config)
    check_exportable(model_folder, config.model.original_len, config.target_len)
    print(describe(config, model_folder, space))
    if config.dry_run:
        if missing := missing_corpus(config.corpus, config.run.folder):
            print(waiting_lines("search", [missing]))
        return
    folder = product_folder(config.run.folder, "factors")
    refuse_second_writer(config.run.folder, folder.name)
    # Refuse the folder of another search before anything is computed.
    if (folder / "config.yaml").is_file():
        claim_folder(folder, config, CHANGEABLE)
    if (folder / MANIFEST_NAME).is_file():
        refuse_other_model(folder, model_folder)
        way_out = f"bring it back, or remove {folder / MANIFEST_NAME}: {_ANEW}"
        require_unchanged(folder, read_manifest(folder, "factors").files, way_out)
        print(f"already complete: {folder / FACTORS_FILE}")
        if note is not None:
            note_config_of_ranks(note, None)
    elif note is not None:
        # config.yaml marks a folder as claimed, which the ranks do after their self-tests.
        dump(config, folder / _RANKS_CONFIG)
        note_config_of_ranks(note, folder / _RANKS_CONFIG)
        return
    elif config.parallel.processes == 1:
        _search(config)
    else:
        _search_in_processes(config)
    _print_report(folder)


def _search(config: SearchRoot) -> None:
    """One process of a search: prepare, test the samples, and take part to the end."""
    from longrope2.parallel import processes
    from longrope2.search.prepare import check, prepare
    from longrope2.search.run import run_search
    from longrope2.search.workers import Workers

    model_folder, space = check(config)
    is_rank = processes.world_size_from_environment() is not None
    workers = Workers(processes.join_processes(config.parallel) if is_rank else None)
    folder = product_folder(config.run.folder, "factors")
    with only_writer(config.run.folder, folder.name) if workers.is_main else nullcontext():
        prepared = prepare(config, model_folder, space, folder=folder, workers=workers)
        if workers.is_main:
            claim_folder(folder, config, CHANGEABLE)
            write_guide(config.run.folder)
        workers.wait_for_all("the folder is claimed")
        run_search(prepared, folder, workers)
        if workers.is_main:
            _write_plots(folder)
    processes.leave_processes()


def _search_in_processes(config: SearchRoot) -> None:
    """Run the workers under torchrun on this machine; ends as they end."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        dump(config, path)
        ended = run_under_torchrun("launch.search", path, config.parallel.processes)
    if ended == REQUEUE_EXIT_CODE:  # before anything was computed, and it said so
        sys.exit(ended)
    if ended != 0:
        early = f"a process of the search ended early (exit code {ended}; its message stands above)"
        kept = (
            "Every loss that was computed is in the journals: give the same command again to go on"
        )
        print(f"error: {early}. {kept}", file=sys.stderr)
        sys.exit(ended)


def _write_plots(folder: Path) -> None:
    """``factors.svg``, ``search.svg`` and ``fresh.svg`` beside the product."""
    from longrope2.report.plots import factors_figure, fresh_figure, search_figure
    from longrope2.search.run import HISTORY_FILE

    factors = RescaleFactors.from_json((folder / FACTORS_FILE).read_text(encoding="utf-8"))
    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    figures = {"factors": factors_figure(factors), "search": search_figure(history)}
    if history["fresh"] is not None:
        figures["fresh"] = fresh_figure(history)
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight")


def _print_report(folder: Path) -> None:
    """What was found beside everything else on fresh samples, what it cost, and the verdict."""
    from longrope2.search.run import HISTORY_FILE, SearchBudget, shares_in_words

    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    budget = SearchBudget(**history["budget"])
    if history["fresh"] is not None:
        Console().print(_fresh_table(history))
    if (critical := history["critical_index"]) is not None:
        print(f"critical index {critical} (theoretical {history['theoretical_critical_index']})")
    if history["critical_index_shares"]:
        shares = shares_in_words(history["critical_index_shares"])
        print(f"best critical index in resamplings of the samples: {shares}")
    rate = f", {budget.sustained_tflops:.3g} TFLOP/s a process" if budget.sustained_tflops else ""
    projected = ""
    if budget.projected_hours is not None:
        projected = f"; all of it on the GPUs of search.projected_*: {budget.projected_hours:.3g} h"
    print(
        f"{budget.num_candidates} candidates, {budget.num_terminated} stopped early; "
        f"{budget.num_forwards:,} forward passes ({budget.forward_tokens:,} tokens), "
        f"{budget.num_forwards_saved:,} saved by stopping; {budget.confirm_tokens:,} tokens of "
        "fresh samples\n"
        f"last run {budget.seconds:g} s, {budget.device_hours:.3g} device hours{rate}{projected}\n"
        f"factors in {folder / FACTORS_FILE}"
    )
    factors = RescaleFactors.from_json((folder / FACTORS_FILE).read_text(encoding="utf-8"))
    print(factors.provenance[VERDICT])


def _fresh_table(history: dict[str, Any]) -> Table:
    """Every contestant, best first."""
    fresh, length = history["fresh"], history["sample_len"]
    table = Table(
        title=f"untrained, fresh samples of {length} tokens",
        caption=f"{history.get('text', '')} *: in factors.json. Above the line the half of the "
        "samples that nobody chose by; below it those who were not carried so far, on the first "
        "of the other half.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("factors", no_wrap=True)
    for heading in ("scale", history["value_name"], "95 %", "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    num_carried = sum(contestant["num_reported"] > 0 for contestant in fresh["contestants"])
    for place, contestant in enumerate(fresh["contestants"], start=1):
        name, num = contestant["name"], contestant["num_reported"]
        table.add_row(
            f"{name} *" if name == fresh["found"] else name,
            f"{contestant['attention_scale']:.2f}",
            f"{contestant['value']:.4g}",
            "{:.3g} - {:.3g}".format(*contestant["interval"]),
            str(num or contestant["num_choosing"]),
            end_section=place == num_carried,
        )
    return table


if __name__ == "__main__":
    run_command(main)
