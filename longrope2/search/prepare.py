"""What a search is asked for: its configuration, the faults of it, and the plan in words."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longrope2.config import target_faults
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.corpus import Document
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.files.artifacts import read_manifest
from longrope2.model.factors_source import RopeConfig, resolve_factors
from longrope2.model.folder import model_identity, resolve_model_folder, weights_sha256
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import head_faults
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search.config import Objective, search_faults
from longrope2.search.objective import (
    NeedleGuidance,
    SampleLosses,
    check_needle_guidance,
    check_needle_labels,
    cut_documents,
    needle_samples,
)
from longrope2.search.run import (
    NEEDLES_FILE,
    PreparedSearch,
    SearchRoot,
    most_candidates,
    projected_hours,
)
from longrope2.search.space import SearchSpace
from longrope2.search.workers import Workers
from longrope2.segments.needle_set import NeedleSet


@dataclass
class SearchCommand(SearchRoot):
    """Configuration of the command: the search and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def check(config: SearchCommand) -> tuple[Path, SearchSpace]:
    """Check everything that needs no forward pass.

    Returns:
        The model's folder and the search space.

    Raises:
        ConfigError: every fault found, together.
    """
    faults = search_faults(config.search)
    original_len = config.model.original_len
    faults += target_faults(config.model, config.target_len, extends=True)
    try:
        build_corpus(config.corpus)
    except ConfigError as error:
        faults += error.faults
    try:
        model_folder = resolve_model_folder(config.model.path)
        geometry = rope_geometry(model_folder, original_len)
        faults += parallel_faults(config, model_folder)
        if not faults:
            long_factors(config, geometry)
            return model_folder, SearchSpace.from_config(config.search, geometry, config.target_len)
    except UserError as error:
        faults.append(str(error))
    raise ConfigError(faults)


def describe(config: SearchCommand, model_folder: Path, space: SearchSpace) -> str:
    """The plan in a few lines."""
    search, length = config.search, sample_len(config)
    num_candidates = most_candidates(search)
    num_forwards = num_candidates * search.num_samples
    scored = "the value of a needle" if search.objective is Objective.needle else "every token"
    hours = projected_hours(ModelShape.from_folder(model_folder), length, num_forwards, search)
    lowest, highest = (
        step / space.steps_per_unit for step in (space.lowest_step, space.highest_step)
    )
    if space.is_bounded:
        critical = ", ".join(map(str, space.critical_indices))
        where = f"critical index {critical}; factors {lowest:g} .. {highest:g} from it up; dims={search.dims.value}"
    else:
        where = f"no critical index; every factor 1 .. {highest:g}"
    workers = config.parallel.processes // config.parallel.sequence
    return "\n".join(
        [
            f"model      {config.model.name}, window {config.model.original_len} -> {config.target_len}",
            f"space      {where}",
            f"objective  {search.objective.value}: {scored}, {search.num_samples} samples of {length} tokens, "
            f"held out of corpus {config.corpus.name}",
            f"workers    {workers}, each of {config.parallel.sequence} processes",
            f"budget     at most {num_candidates:,} candidates, {num_forwards * length:,} forward tokens; about "
            f"{hours:.2g} h on {search.projected_gpus} GPUs at {search.projected_tflops:g} TFLOP/s each",
        ]
    )


def parallel_faults(config: SearchCommand, model_folder: Path) -> list[str]:
    """Faults of the process grid."""
    parallel = config.parallel
    shape = ModelShape.from_folder(model_folder)
    faults = head_faults(parallel.sequence, shape.num_heads, shape.num_kv_heads)
    if parallel.processes < 1 or parallel.processes % parallel.sequence:
        faults.append(
            f"parallel.processes={parallel.processes}: must be a multiple of parallel.sequence={parallel.sequence}"
        )
    return faults


def long_factors(config: SearchCommand, geometry: RopeGeometry) -> RescaleFactors | None:
    """The long window's factors when the search is for the short window's.

    Raises:
        ArtifactError: ``search.short_window_of`` is missing, or for another model or target.
    """
    if config.search.short_window_of is None:
        return None
    rope = RopeConfig(method=RopeMethod.from_file, factors=config.search.short_window_of)
    try:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder)
    except ArtifactError as error:
        raise ArtifactError(f"search.short_window_of: {error}") from None


def sample_len(config: SearchCommand) -> int:
    """Tokens of a sample: L, or L0 for the short window's factors."""
    return config.target_len if config.search.short_window_of is None else config.model.original_len


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
    """Build the samples (or read the frozen ones), load the model, run the self-tests (a) and (c).
    Writes nothing.

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
        random.Random(f"documents/{config.seed}").shuffle(
            documents
        )  # the longest first would be the same few works
        ids = (encoder.encode(document.text) for document in documents)
        samples = cut_documents(ids, encoder.bos_id, length, search.num_samples)
    windowed = load_search_model(model_folder, space)
    losses = SampleLosses(
        windowed, samples, search.batch_size, sequence_group=workers.sequence_group
    )
    guidance = None
    if workers.worker == 0 and needles is not None:
        guidance = _check_guidance(config, windowed, tokenizer, documents)
    return PreparedSearch(
        space=space,
        losses=losses,
        shape=ModelShape.from_folder(model_folder),
        sample_len=length,
        long_factors=long_factors(config, space.geometry),
        guidance=guidance,
        needles=needles,
        inputs={"model": identity(model_folder), "corpus": build_corpus(config.corpus).describe()},
    )


def _needles(
    config: SearchCommand, tokenizer: Any, documents: list[Document], folder: Path
) -> NeedleSet:
    """The frozen needle set of this run, or a new one."""
    if (folder / NEEDLES_FILE).is_file():
        return NeedleSet.load(folder / NEEDLES_FILE)
    return _build_needles(config, tokenizer, documents, sample_len(config))


def _build_needles(
    config: SearchCommand,
    tokenizer: Any,
    documents: list[Document],
    length: int,
    with_needle: bool = True,
) -> NeedleSet:
    """Needle samples of a length, or their controls."""
    search = config.search
    return build_needle_set(
        tokenizer,
        documents,
        length=length,
        depths=search.depths,
        num_samples=search.num_samples,
        seed=config.seed,
        num_keys=search.num_keys,
        with_needle=with_needle,
    )


def load_search_model(model_folder: Path, space: SearchSpace) -> WindowedModel:
    """The model on the GPU in bf16, or on the CPU in fp32 (bf16 products are hundreds of times slower there)."""
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
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
