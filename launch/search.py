"""``python -m launch.search``: find the rescale factors and the critical dimension of a model for a target window.

Writes ``2_factors/``: the frozen samples, a journal of every loss, ``factors.json``, ``history.json``, metrics and,
last, the manifest. A killed search is resumed by the same command and ends with the same result; a finished one is
not repeated.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.corpora import Document, build_corpus, heldout_documents
from data_prep.needles import build_needle_set
from data_prep.tokenization import DocumentTokenizer
from launch.search_plan import SearchCommand, check, describe, long_factors, sample_len
from launch.torchrun import CONFIG_FLAG, config_path_of_rank, note_config_of_ranks, run_under_torchrun, split_prepare
from longrope2.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    model_identity,
    product_folder,
    read_manifest,
    weights_sha256,
)
from longrope2.command import run_command
from longrope2.config import claim_folder, compose, dump, load
from longrope2.errors import ArtifactError, ConfigError
from longrope2.evaluation.report_plots import factors_figure, search_figure
from longrope2.model import (
    FACTORS_FILE,
    ForwardCost,
    WindowedModel,
    load_tokenizer,
    load_windowed_model,
)
from longrope2.parallel import join_processes, leave_processes, world_size_from_environment
from longrope2.rope import RescaleFactors, RopeMethod, Window, closed_form_factors
from longrope2.search import (
    HISTORY_FILE,
    NEEDLES_FILE,
    NeedleGuidance,
    Objective,
    PreparedSearch,
    SampleLosses,
    SearchBudget,
    SearchSpace,
    Workers,
    check_needle_guidance,
    check_needle_labels,
    cut_documents,
    needle_samples,
    run_search,
)
from longrope2.segments.needle_set import NeedleSet

RANKS_CONFIG = "ranks.yaml"
CHANGEABLE = ("dry_run", "tracking", "parallel.processes", "search.projected_gpus", "search.projected_tflops")


def main() -> None:
    """Compose, check and plan; then search here, or in processes that torchrun starts; then report."""
    arguments = sys.argv[1:]
    if arguments[:1] == [CONFIG_FLAG]:
        search(load(SearchCommand, config_path_of_rank(arguments)))
        return
    if world_size_from_environment() is not None:
        raise ConfigError(["under torchrun, give --config FILE, a search configuration: ranks do not compose"])
    prepare, overrides = split_prepare(arguments)
    config = compose(SearchCommand, "search", overrides)
    model_folder, space = check(config)
    print(describe(config, model_folder, space))
    if config.dry_run:
        return
    folder = product_folder(config.run.folder, "factors")
    if (folder / "config.yaml").is_file():  # refuse the folder of another search before anything is computed
        claim_folder(folder, config, CHANGEABLE)
    if (folder / MANIFEST_NAME).is_file():
        refuse_other_model(folder, identity(model_folder))
        print(f"already complete: {folder / FACTORS_FILE}")
        if prepare is not None:
            note_config_of_ranks(prepare, None)
    elif prepare is not None:  # config.yaml marks a folder as claimed, which the ranks do after their self-tests
        dump(config, folder / RANKS_CONFIG)
        note_config_of_ranks(prepare, folder / RANKS_CONFIG)
        return
    elif config.parallel.processes == 1:
        search(config)
    else:
        search_in_processes(config)
    print_report(folder)


def search(config: SearchCommand) -> None:
    """One process of a search: prepare and test the samples, then take part until the product is written."""
    model_folder, space = check(config)
    workers = Workers(join_processes(config.parallel) if world_size_from_environment() is not None else None)
    folder = product_folder(config.run.folder, "factors")
    prepared = prepare(config, model_folder, space, folder, workers)
    if workers.is_main:
        claim_folder(folder, config, CHANGEABLE)
    workers.wait_for_all("the folder is claimed")
    run_search(config, prepared, folder, workers)
    if workers.is_main:
        write_plots(folder)
    leave_processes()


def search_in_processes(config: SearchCommand) -> None:
    """Run the workers under torchrun on this machine; ends as they end."""
    with tempfile.TemporaryDirectory() as scratch:
        dump(config, Path(scratch) / "config.yaml")
        ended = run_under_torchrun("launch.search", Path(scratch) / "config.yaml", config.parallel.processes)
    if ended != 0:
        print(
            f"error: a process of the search ended early (exit code {ended}; its message stands above). Every loss that "
            "was computed is in the journals: give the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(ended)


def identity(model_folder: Path) -> dict[str, str]:
    """What a search depends on in a model: architecture, tokenizer and weights."""
    return {**model_identity(model_folder), "weights_sha256": weights_sha256(model_folder)}


def refuse_other_model(folder: Path, model: dict[str, str]) -> None:
    """A finished search stands for the model it was made with.

    Raises:
        ArtifactError: architecture, tokenizer or weights differ; names which.
    """
    found = read_manifest(folder, "factors").inputs.get("model", {})
    for name, now in model.items():
        if found.get(name) != now:
            raise ArtifactError(
                f"{folder} was searched with another model: {name} was {found.get(name)}, model.path now has {now}; "
                f"use another run.name, or remove {folder} to search again"
            )


def prepare(
    config: SearchCommand, model_folder: Path, space: SearchSpace, folder: Path, workers: Workers
) -> PreparedSearch:
    """Build the samples (or read the frozen ones), load the model, run the self-tests (a) and (c). Writes nothing.

    The first worker runs (c) for all.

    Raises:
        DataError, ArtifactError: too little text, or a self-test failed.
    """
    search, length = config.search, sample_len(config)
    tokenizer, documents = load_tokenizer(model_folder), heldout_documents(config.corpus)
    encoder = DocumentTokenizer(tokenizer)
    if search.objective is Objective.needle:
        needles = _needles(config, tokenizer, documents, folder)
        check_needle_labels(needles, length, encoder.bos_id, encoder.decode)
        samples = needle_samples(needles)
    else:
        needles = None
        random.Random(f"documents/{config.seed}").shuffle(documents)  # the longest first would be the same few works
        ids = (encoder.encode(document.text) for document in documents)
        samples = cut_documents(ids, encoder.bos_id, length, search.num_samples)
    windowed = load_search_model(model_folder, space)
    losses = SampleLosses(windowed, samples, search.batch_size, sequence_group=workers.sequence_group)
    guidance = None
    if workers.worker == 0 and needles is not None:
        guidance = _check_guidance(config, windowed, tokenizer, documents)
    return PreparedSearch(
        space=space,
        losses=losses,
        cost=ForwardCost.from_config(model_folder),
        sample_len=length,
        long_factors=long_factors(config, space.geometry),
        guidance=guidance,
        needles=needles,
        inputs={"model": identity(model_folder), "corpus": build_corpus(config.corpus).describe()},
    )


def _needles(config: SearchCommand, tokenizer: Any, documents: list[Document], folder: Path) -> NeedleSet:
    """The frozen needle set of this run, or a new one."""
    if (folder / NEEDLES_FILE).is_file():
        return NeedleSet.load(folder / NEEDLES_FILE)
    return _build_needles(config, tokenizer, documents, sample_len(config))


def _build_needles(
    config: SearchCommand, tokenizer: Any, documents: list[Document], length: int, with_needle: bool = True
) -> NeedleSet:
    """Needle samples of a length, or their controls."""
    search = config.search
    return build_needle_set(
        tokenizer, documents, length=length, depths=search.depths, num_samples=search.num_samples, seed=config.seed,
        num_keys=search.num_keys, with_needle=with_needle,
    )  # fmt: skip


def load_search_model(model_folder: Path, space: SearchSpace) -> WindowedModel:
    """The model on the GPU in bf16, or on the CPU in fp32 (bf16 products are hundreds of times slower there)."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    unscaled = closed_form_factors(RopeMethod.none, space.geometry, space.target_len)
    return load_windowed_model(model_folder, unscaled, device=device, dtype=dtype).eval()


def _check_guidance(
    config: SearchCommand, model: WindowedModel, tokenizer: Any, documents: list[Document]
) -> NeedleGuidance:
    """Self-test (c) inside the original window, with and without the needle."""
    original_len, batch_size = config.model.original_len, config.search.batch_size
    with_needle, without_needle = (
        SampleLosses(
            model,
            needle_samples(_build_needles(config, tokenizer, documents, original_len, present)),
            batch_size,
            Window.SHORT,
        )
        for present in (True, False)
    )
    return check_needle_guidance(with_needle, without_needle, model.factors, config.search)


def write_plots(folder: Path) -> None:
    """``factors.svg`` and ``search.svg`` beside the product."""
    factors = RescaleFactors.from_json((folder / FACTORS_FILE).read_text(encoding="utf-8"))
    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    for name, figure in (("factors", factors_figure(factors)), ("search", search_figure(history))):
        with atomic_path(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight")


def print_report(folder: Path) -> None:
    """What the search found, beside the closed-form methods on the same samples, and what it cost."""
    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    budget = SearchBudget(**history["budget"])
    table = Table(title=f"training-free, {history['sample_len']} tokens", title_justify="left")
    table.add_column("method")
    table.add_column(history["value_name"], justify="right")
    for method, value in history["baselines"].items():
        table.add_row(method, f"{value:.4g}")
    table.add_row(f"{history['algorithm']} (searched)", f"{history['best_value']:.4g}")
    Console().print(table)
    if history["critical_index"] is not None:
        print(f"critical index {history['critical_index']} (theoretical {history['theoretical_critical_index']})")
    rate = f", {budget.sustained_tflops:.3g} TFLOP/s a process" if budget.sustained_tflops else ""
    print(
        f"{budget.num_candidates} candidates, {budget.num_terminated} stopped early; {budget.num_forwards:,} forward "
        f"passes ({budget.forward_tokens:,} tokens), {budget.num_forwards_saved:,} saved by stopping\n"
        f"last run {budget.seconds:g} s, {budget.device_hours:.3g} device hours{rate}; all of it on the hardware of "
        f"search.projected_*: {budget.projected_hours:.3g} h\n"
        f"factors in {folder / FACTORS_FILE}"
    )


if __name__ == "__main__":
    run_command(main)
