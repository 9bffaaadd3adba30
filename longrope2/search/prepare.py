"""What stands before a search: its faults, its plan in words, and its samples and model, tested."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longrope2.config import require_same, target_faults
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.tokenizer import DocumentTokenizer, load_document_tokenizer
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.files.artifacts import read_manifest
from longrope2.model.factors_source import RopeConfig, resolve_factors
from longrope2.model.folder import given_folder, model_identity, weights_sha256
from longrope2.model.loading import (
    check_model,
    find_weights,
    load_to_run,
    load_tokenizer,
    rope_geometry,
)
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import head_faults
from longrope2.parallel.processes import world_size_from_environment
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search import config as settings
from longrope2.search import objective
from longrope2.search.config import Objective, SearchConfig, SearchRoot
from longrope2.search.objective import NeedleGuidance, SampleLosses
from longrope2.search.space import SearchSpace
from longrope2.search.workers import Workers
from longrope2.segments.needle_set import NeedleSet

NEEDLES_FILE = "needles.arrow"
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class PreparedSearch:
    """What a search works on, after the self-tests.

    A sample has ``sample_len`` tokens: L, or L0 for the short window's factors, which go with the
    given ``long_factors``. The plain-perplexity objective has neither guidance nor needles.
    ``inputs`` are ``model`` and ``corpus`` for the manifest.
    """

    config: SearchRoot
    space: SearchSpace
    losses: SampleLosses
    shape: ModelShape
    sample_len: int
    long_factors: RescaleFactors | None
    guidance: NeedleGuidance | None
    needles: NeedleSet | None
    inputs: dict[str, dict[str, Any]]


def check(config: SearchRoot) -> tuple[Path, SearchSpace]:
    """The model's folder and the search space, once all that needs no forward pass is checked.

    Raises:
        ConfigError: every fault found, together.
    """
    faults = settings.search_faults(config.search)
    faults += target_faults(config.model, config.target_len, extends=True)
    try:
        build_corpus(config.corpus)
    except ConfigError as error:
        faults += error.faults
    try:
        model_folder = given_folder(config.model, config.target_len)
        geometry = rope_geometry(model_folder, config.model.original_len)
        load_document_tokenizer(model_folder, config.model.document_start)
        if world_size_from_environment() is None:  # ranks compare what they load
            check_model(model_folder, config.model.original_len)
            find_weights(model_folder)
        shape, parallel = ModelShape.from_folder(model_folder), config.parallel
        faults += head_faults(parallel.sequence, shape.num_heads, shape.num_kv_heads)
        if parallel.processes < 1 or parallel.processes % max(1, parallel.sequence):
            given = f"parallel.processes={parallel.processes}"
            faults.append(f"{given}: must be a multiple of parallel.sequence={parallel.sequence}")
        if not faults:
            _long_factors(config, geometry)
            return model_folder, SearchSpace.from_config(config.search, geometry, config.target_len)
    except UserError as error:
        faults.append(str(error))
    raise ConfigError(faults)


def describe(config: SearchRoot, model_folder: Path, space: SearchSpace) -> str:
    """The plan in a few lines."""
    search, parallel, length = config.search, config.parallel, _sample_len(config)
    most = settings.most_candidates(search)
    num_forwards = most * search.num_samples
    hours = projected_hours(ModelShape.from_folder(model_folder), length, num_forwards, search)
    scored = "the value of a needle" if search.objective is Objective.needle else "every token"
    lowest, highest = (n / space.steps_per_unit for n in (space.lowest_step, space.highest_step))
    where = f"no critical index; every factor 1 .. {highest:g}"
    if space.is_bounded:
        critical = f"critical index {', '.join(map(str, space.critical_indices))}"
        where = f"{critical}; factors {lowest:g} .. {highest:g} from it up"
        where = f"{where}; dims={search.dims.value}"
    windows = f"window {config.model.original_len} -> {config.target_len}"
    return (
        f"model      {config.model.name}, {windows}\n"
        f"space      {where}\n"
        f"objective  {search.objective.value}: {scored}, {search.num_samples} samples of {length} "
        f"tokens, held out of corpus {config.corpus.name}\n"
        f"workers    {parallel.processes // parallel.sequence}, each of {parallel.sequence} "
        "processes\n"
        f"budget     at most {most:,} candidates, {num_forwards * length:,} forward tokens; about "
        f"{hours:.2g} h on {search.projected_gpus} GPUs at {search.projected_tflops:g} TFLOP/s each"
    )


def projected_hours(
    shape: ModelShape, target_len: int, num_forwards: int, config: SearchConfig
) -> float:
    """Hours on the hardware of ``search.projected_*``; loading not included."""
    rate = config.projected_gpus * config.projected_tflops * 1e12
    return shape.forward_flops(target_len) * num_forwards / rate / SECONDS_PER_HOUR


def _long_factors(config: SearchRoot, geometry: RopeGeometry) -> RescaleFactors | None:
    """The long window's factors when the search is for the short window's."""
    if config.search.short_window_of is None:
        return None
    rope = RopeConfig(method=RopeMethod.from_file, factors=config.search.short_window_of)
    try:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder)
    except ArtifactError as error:
        raise ArtifactError(f"search.short_window_of: {error}") from None


def _sample_len(config: SearchRoot) -> int:
    """Tokens of a sample: L, or L0 for the short window's factors."""
    is_long = config.search.short_window_of is None
    return config.target_len if is_long else config.model.original_len


def _identity(model_folder: Path) -> dict[str, str]:
    """What a search depends on in a model: architecture, tokenizer and weights."""
    return {**model_identity(model_folder), "weights_sha256": weights_sha256(model_folder)}


def refuse_other_model(folder: Path, model_folder: Path) -> None:
    """A finished search stands for the model it was made with.

    Raises:
        ArtifactError: architecture, tokenizer or weights differ; names which.
    """
    found = read_manifest(folder, "factors").inputs.get("model", {})
    what = f"{folder} was searched with another model"
    require_same(what, found, _identity(model_folder), folder)


def prepare(
    config: SearchRoot, model_folder: Path, space: SearchSpace, folder: Path, workers: Workers
) -> PreparedSearch:
    """Build (or read) the samples, load the model, run self-tests (a) and (c); writes nothing.

    The first worker runs (c) for all.

    Raises:
        DataError, ArtifactError: too little text, or a self-test failed.
    """
    search, length = config.search, _sample_len(config)
    tokenizer, documents = load_tokenizer(model_folder), heldout_documents(config.corpus)
    start = config.model.document_start
    encoder = DocumentTokenizer(tokenizer, start)
    kinds: dict[str, Any] = {"depths": search.depths, "num_keys": search.num_keys}
    kinds |= {"num_samples": search.num_samples, "seed": config.seed, "document_start": start}
    draw_needles = partial(build_needle_set, tokenizer, documents, **kinds)
    needles = None
    if search.objective is Objective.needle:
        frozen = folder / NEEDLES_FILE
        needles = NeedleSet.load(frozen) if frozen.is_file() else draw_needles(length=length)
        objective.check_needle_labels(needles, length, encoder.bos_id, encoder.decode)
        samples = objective.needle_samples(needles)
    else:
        # The longest first would be the same few works.
        random.Random(f"documents/{config.seed}").shuffle(documents)
        ids = (encoder.encode(document.text) for document in documents)
        samples = objective.cut_documents(ids, encoder.start_ids, length, search.num_samples)
    unscaled = closed_form_factors(RopeMethod.none, space.geometry, space.target_len)
    model = load_to_run(model_folder, unscaled)
    group = workers.sequence_group
    tests_guidance = workers.worker == 0 and needles is not None
    return PreparedSearch(
        config=config,
        space=space,
        losses=SampleLosses(model, samples, search.batch_size, sequence_group=group),
        shape=ModelShape.from_folder(model_folder),
        sample_len=length,
        long_factors=_long_factors(config, space.geometry),
        guidance=_guidance(config, model, draw_needles) if tests_guidance else None,
        needles=needles,
        inputs={"model": _identity(model_folder), "corpus": build_corpus(config.corpus).describe()},
    )


def _guidance(
    config: SearchRoot, model: WindowedModel, draw_needles: Callable[..., NeedleSet]
) -> NeedleGuidance:
    """Self-test (c) inside the original window, with and without the needle."""

    def losses(with_needle: bool) -> SampleLosses:
        needles = draw_needles(length=config.model.original_len, with_needle=with_needle)
        samples, batch_size = objective.needle_samples(needles), config.search.batch_size
        return SampleLosses(model, samples, batch_size, Window.SHORT)

    both = losses(True), losses(False)
    return objective.check_needle_guidance(*both, model.factors, config.search)
