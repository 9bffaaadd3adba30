"""``python -m launch.search``: find the rescale factors and the critical dimension of a model for a target window.

Writes ``2_factors/``: the frozen samples, a journal of every loss, ``factors.json``, ``history.json``, metrics and,
last, the manifest. A killed search is resumed by the same command and ends with the same result; a finished one is
not repeated.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.corpora import CorpusConfig, build_corpus, heldout_texts
from data_prep.needles import build_needle_set
from data_prep.tokenization import DocumentTokenizer
from longrope2.artifacts import (
    MANIFEST_NAME,
    model_identity,
    product_folder,
    read_manifest,
    resolve_model_folder,
    weights_sha256,
)
from longrope2.command import run_command
from longrope2.config import claim_folder, compose
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.model import FACTORS_FILE, WindowedModel, load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope import RopeMethod, Window, closed_form_factors
from longrope2.search import (
    HISTORY_FILE,
    NEEDLES_FILE,
    NeedleGuidance,
    Objective,
    PreparedSearch,
    SampleLosses,
    SearchRoot,
    SearchSpace,
    check_factors_matter,
    check_needle_guidance,
    check_needle_labels,
    cut_documents,
    needle_samples,
    run_search,
    search_faults,
)
from longrope2.segments.needle_set import NeedleSet

CHANGEABLE = ("dry_run", "tracking")


@dataclass
class SearchCommand(SearchRoot):
    """Configuration of the command: the search and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def main() -> None:
    """Compose, check, plan, prepare and test the samples, search, report."""
    config = compose(SearchCommand, "search", sys.argv[1:])
    model_folder, space = check(config)
    print(describe(config, space))
    if config.dry_run:
        return
    folder = product_folder(config.run.folder, "factors")
    if (folder / "config.yaml").is_file():  # refuse the folder of another search before anything is computed
        claim_folder(folder, config, CHANGEABLE)
    model = {**model_identity(model_folder), "weights_sha256": weights_sha256(model_folder)}
    if (folder / MANIFEST_NAME).is_file():
        refuse_other_model(folder, model)
        print(f"already complete: {folder / FACTORS_FILE}")
    else:
        prepared = prepare(config, model_folder, model, space, folder)
        claim_folder(folder, config, CHANGEABLE)
        run_search(config, prepared, folder)
    print_report(folder)


def check(config: SearchCommand) -> tuple[Path, SearchSpace]:
    """Check everything that needs no forward pass.

    Returns:
        The model's folder and the search space.

    Raises:
        ConfigError: every fault found, together.
    """
    faults = search_faults(config.search)
    original_len = config.model.original_len
    if config.target_len <= original_len or config.target_len % original_len:
        faults.append(
            f"target_len={config.target_len}: must be a multiple, 2 or more, of model.original_len={original_len}"
        )
    try:
        build_corpus(config.corpus)
    except ConfigError as error:
        faults += error.faults
    try:
        model_folder = resolve_model_folder(config.model.path)
        geometry = rope_geometry(model_folder, original_len)
        if not faults:
            return model_folder, SearchSpace.from_config(config.search, geometry, config.target_len)
    except UserError as error:
        faults.append(str(error))
    raise ConfigError(faults)


def describe(config: SearchCommand, space: SearchSpace) -> str:
    """The plan in a few lines."""
    search = config.search
    num_candidates = search.population + search.iterations * search.parents
    num_tokens = num_candidates * search.num_samples * config.target_len
    scored = "the value of a needle" if search.objective is Objective.needle else "every token"
    critical = ", ".join(map(str, space.critical_indices))
    lowest, highest = (step / space.steps_per_unit for step in (space.lowest_step, space.highest_step))
    return "\n".join([
        f"model      {config.model.name}, window {config.model.original_len} -> {config.target_len}",
        f"space      critical index {critical}; factors {lowest:g} .. {highest:g} from it up; dims={search.dims.value}",
        f"objective  {search.objective.value}: {scored}, {search.num_samples} samples of {config.target_len} tokens, "
        f"held out of corpus {config.corpus.name}",
        f"budget     at most {num_candidates:,} candidates, {num_tokens:,} forward tokens",
    ])  # fmt: skip


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
    config: SearchCommand, model_folder: Path, model: dict[str, str], space: SearchSpace, folder: Path
) -> PreparedSearch:
    """Build the samples (or read the frozen ones), load the model, run the self-tests. Writes nothing.

    Raises:
        DataError, ArtifactError: too little text, or a self-test failed.
    """
    search = config.search
    tokenizer, texts = load_tokenizer(model_folder), heldout_texts(config.corpus)
    encoder = DocumentTokenizer(tokenizer)
    if search.objective is Objective.needle:
        needles = _needles(config, tokenizer, texts, folder)
        check_needle_labels(needles, config.target_len, encoder.bos_id, encoder.decode)
        samples = needle_samples(needles)
    else:
        needles = None
        documents = (encoder.encode(text) for text in sorted(texts, key=len, reverse=True))
        samples = cut_documents(documents, encoder.bos_id, config.target_len, search.num_samples)
    windowed = _load_model(model_folder, space)
    losses = SampleLosses(windowed, samples, search.batch_size)
    check_factors_matter(losses, space.geometry, config.target_len)
    guidance = _check_guidance(config, windowed, tokenizer, texts) if needles is not None else None
    inputs = {"model": model, "corpus": build_corpus(config.corpus).describe()}
    return PreparedSearch(space, losses, guidance, needles, inputs)


def _needles(config: SearchCommand, tokenizer: Any, texts: list[str], folder: Path) -> NeedleSet:
    """The frozen needle set of this run, or a new one."""
    if (folder / NEEDLES_FILE).is_file():
        return NeedleSet.load(folder / NEEDLES_FILE)
    return _build_needles(config, tokenizer, texts, config.target_len)


def _build_needles(
    config: SearchCommand, tokenizer: Any, texts: list[str], length: int, with_needle: bool = True
) -> NeedleSet:
    """Needle samples of a length, or their controls."""
    search = config.search
    return build_needle_set(
        tokenizer, texts, length=length, depths=search.depths, num_samples=search.num_samples, seed=config.seed,
        with_needle=with_needle,
    )  # fmt: skip


def _load_model(model_folder: Path, space: SearchSpace) -> WindowedModel:
    """The model on the GPU in bf16, or on the CPU in fp32 (bf16 products are hundreds of times slower there)."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    unscaled = closed_form_factors(RopeMethod.none, space.geometry, space.target_len)
    return load_windowed_model(model_folder, unscaled, device=device, dtype=dtype).eval()


def _check_guidance(config: SearchCommand, model: WindowedModel, tokenizer: Any, texts: list[str]) -> NeedleGuidance:
    """Self-test (c) inside the original window, with and without the needle."""
    original_len, batch_size = config.model.original_len, config.search.batch_size
    with_needle, without_needle = (
        SampleLosses(
            model,
            needle_samples(_build_needles(config, tokenizer, texts, original_len, present)),
            batch_size,
            Window.SHORT,
        )
        for present in (True, False)
    )
    return check_needle_guidance(with_needle, without_needle, model.factors, config.search)


def print_report(folder: Path) -> None:
    """What the search found, beside the closed-form methods on the same samples."""
    history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    counts = read_manifest(folder, "factors").counts
    table = Table(title=f"training-free, {history['target_len']} tokens", title_justify="left")
    table.add_column("method")
    table.add_column(history["value_name"], justify="right")
    for method, value in history["baselines"].items():
        table.add_row(method, f"{value:.4g}")
    table.add_row("longrope2 (searched)", f"{history['best_value']:.4g}")
    Console().print(table)
    print(
        f"critical index {history['critical_index']} (theoretical {history['theoretical_critical_index']}); "
        f"{counts['num_candidates']} candidates, {counts['num_terminated']} stopped early; "
        f"{counts['search_tokens']:,} forward tokens; last process {counts['seconds_of_last_process']} s\n"
        f"factors in {folder / FACTORS_FILE}"
    )


if __name__ == "__main__":
    run_command(main)
