"""What stands before a search: its faults, its plan in words, and its samples and model, tested."""

import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longrope2.claim import require_same
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.corpus import text_hashes
from longrope2.corpora.haystacks import Haystack, build_texts, halve_documents
from longrope2.corpora.held_out import find_overlap
from longrope2.corpora.needle_wording import choose_wording
from longrope2.corpora.needles import build_needle_set, guess_perplexity
from longrope2.corpora.run_corpus import (
    HeldoutText,
    corpus_label,
    corpus_of_run,
    heldout_text,
    missing_corpus,
    segments_of,
)
from longrope2.corpora.tokenizer import DocumentTokenizer, load_document_tokenizer
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.files.artifacts import read_manifest
from longrope2.model.factors_source import RopeConfig, resolve_factors
from longrope2.model.folder import given_folder, look_before, model_identity, weights_sha256
from longrope2.model.loading import (
    check_model,
    find_weights,
    load_to_run,
    load_tokenizer,
    rope_geometry,
)
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.processes import world_size_from_environment
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search import config as settings
from longrope2.search import selftests
from longrope2.search.before import known_faults, parallel_faults
from longrope2.search.config import Algorithm, Objective, SearchConfig, SearchRoot
from longrope2.search.confirm import MOST_FOUND
from longrope2.search.family import Limits
from longrope2.search.halving import most_halving_forwards
from longrope2.search.objective import SampleLosses, ScoredSample, needle_samples
from longrope2.search.selftests import Control, NeedleGuidance
from longrope2.search.space import SearchSpace
from longrope2.search.workers import Workers
from longrope2.segments.needle_set import NeedleSet

NEEDLES_FILE = "needles.arrow"
FRESH_FILE = "fresh_needles.arrow"
SECONDS_PER_HOUR = 3600.0
# Tokens of one forward that leave no part of a GPU idle.
_FULL_FORWARD = 131_072
# Where the needles of the other half of the fresh samples stand.
_FRESH_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class PreparedSearch:
    """What a search works on, after the self-tests.

    The longest samples have ``sample_len`` tokens: L, or L0 for the short window's factors, which
    go with the given ``long_factors``. The plain-perplexity objective has neither guidance, control
    nor needles. ``inputs`` are ``model`` and ``corpus`` for the manifest.
    """

    config: SearchRoot
    space: SearchSpace
    losses: SampleLosses
    fresh: SampleLosses | None
    """Of the comparison at the end; None without one."""
    shape: ModelShape
    sample_len: int
    long_factors: RescaleFactors | None
    guidance: NeedleGuidance | None
    control: Control | None
    needles: dict[str, NeedleSet]
    """What is to be kept of the samples, by file name."""
    inputs: dict[str, dict[str, Any]]
    text: HeldoutText
    """Which text the samples are of."""
    text_hashes: list[str]
    """Of the documents that the samples are made of; none where needles stand in noise."""


def check(config: SearchRoot) -> tuple[Path, SearchSpace]:
    """The model's folder and the search space, once all that needs no forward pass is checked.

    Takes the corpus of the run's segments where none is given.

    Raises:
        ConfigError: every fault found, together.
    """
    if faults := known_faults(config, look_before(config.model)):
        raise ConfigError(faults)
    if not (config.dry_run and missing_corpus(config.corpus, config.run.folder)):
        config.corpus = corpus_of_run(config.corpus, config.run.folder)
    try:
        model_folder = given_folder(config.model, config.target_len)
        geometry = rope_geometry(model_folder, config.model.original_len)
        load_document_tokenizer(model_folder, config.model.document_start)
        if world_size_from_environment() is None:  # ranks compare what they load
            check_model(model_folder, config.model.original_len)
            find_weights(model_folder)
        # Of a model that had to be fetched or converted it was not known before.
        if faults := parallel_faults(config.parallel, ModelShape.from_folder(model_folder)):
            raise ConfigError(faults)
        _long_factors(config, geometry)
        return model_folder, SearchSpace.from_config(config.search, geometry, config.target_len)
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError([str(error)]) from None


def describe(config: SearchRoot, model_folder: Path, space: SearchSpace) -> str:
    """The plan in a few lines."""
    search, parallel, lengths = config.search, config.parallel, sample_lengths(config)
    most = settings.most_candidates(search)
    forwards = {length: most * search.num_samples for length in lengths}
    if search.algorithm is Algorithm.halving:
        forwards = most_halving_forwards(search, lengths)
    projected = _time_in_words(config, ModelShape.from_folder(model_folder), forwards)
    tokens = sum(length * count for length, count in forwards.items())
    scored = "the value of a needle" if search.objective is Objective.needle else "every token"
    if search.needles_per_haystack > 1:
        scored = f"the values of {search.needles_per_haystack} needles in a haystack"
    listed = ", ".join(map(str, lengths))
    corpus = "the segments' corpus, not packed yet"
    if config.corpus is not None:
        corpus = f"corpus {corpus_label(config.corpus)}"
    fresh = "not compared on fresh samples (search.fresh_samples=0)"
    if compares_fresh(search):
        fresh = (
            f"the best {MOST_FOUND} against every closed form on {2 * search.fresh_samples} fresh "
            f"samples of {lengths[-1]} tokens"
        )
    return (
        f"model      {config.model.name}, window {config.model.original_len} -> "
        f"{config.target_len}\n"
        f"space      {_space_in_words(config, space)}\n"
        f"objective  {search.objective.value}: {scored}, {search.num_samples} samples of {listed} "
        f"tokens, held out of {corpus}\n"
        f"workers    {parallel.processes // parallel.segment_ranks}, each of "
        f"{parallel.segment_ranks} processes\n"
        f"budget     at most {most:,} candidates, {tokens:,} forward tokens; {projected}\n"
        f"end        {fresh}"
    )


def _space_in_words(config: SearchRoot, space: SearchSpace) -> str:
    search = config.search
    if search.algorithm is Algorithm.halving:
        limits = Limits.of(space.geometry, config.target_len, search.highest_attention_scale)
        return (
            f"a rise from 1 to a level between indices 0 and {limits.last_index + 1}, a slope above"
            f", an attention scale of 1 .. {limits.highest_attention_scale:.3g}"
        )
    lowest, highest = (n / space.steps_per_unit for n in (space.lowest_step, space.highest_step))
    if not space.is_bounded:
        return f"no critical index; every factor 1 .. {highest:g}"
    critical = f"critical index {', '.join(map(str, space.critical_indices))}"
    return f"{critical}; factors {lowest:g} .. {highest:g} from it up; dims={search.dims.value}"


def _time_in_words(config: SearchRoot, shape: ModelShape, forwards: Mapping[int, int]) -> str:
    hours, search = projected_hours(config, shape, forwards), config.search
    if hours is None:
        unknown = "how long that takes is unknown without a GPU here"
        return f"{unknown} (search.projected_gpus=N projects it to some)"
    gpus = "1 GPU" if (number := projected_gpus(config)) == 1 else f"{number} GPUs"
    return f"about {hours:.2g} h on {gpus} at {search.projected_tflops:g} TFLOP/s each"


def projected_gpus(config: SearchRoot) -> int:
    """GPUs that the time is projected to: those given, or else those here that the search uses."""
    here = min(config.parallel.processes, torch.cuda.device_count())
    return here if config.search.projected_gpus is None else config.search.projected_gpus


def projected_hours(
    config: SearchRoot, shape: ModelShape, forwards: Mapping[int, int]
) -> float | None:
    """Hours of so many forwards by length on ``projected_gpus``; None where there are none."""
    rate = projected_gpus(config) * config.search.projected_tflops * 1e12
    flops = sum(shape.forward_flops(length) * count for length, count in forwards.items())
    return flops / rate / SECONDS_PER_HOUR if rate else None


def sample_lengths(config: SearchRoot) -> list[int]:
    """Tokens of the samples, ascending: shares of L, or of L0 for the short window's factors."""
    is_long = config.search.short_window_of is None
    longest = config.target_len if is_long else config.model.original_len
    return sorted({round(share * longest) for share in config.search.lengths})


def compares_fresh(search: SearchConfig) -> bool:
    """Whether the result is compared on fresh samples; short-window factors are not."""
    return search.fresh_samples > 0 and search.short_window_of is None


def _long_factors(config: SearchRoot, geometry: RopeGeometry) -> RescaleFactors | None:
    """The long window's factors when the search is for the short window's."""
    if config.search.short_window_of is None:
        return None
    rope = RopeConfig(method=RopeMethod.from_file, factors=config.search.short_window_of)
    try:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder)
    except ArtifactError as error:
        raise ArtifactError(f"search.short_window_of: {error}") from None


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
    """Build (or read) the samples, load the model, run self-tests (a) to (c); writes nothing.

    The first worker runs (b) and (c) for all.

    Raises:
        DataError, ArtifactError: too little text, or a self-test failed.
    """
    search = config.search
    makers = _SampleMaker(config, model_folder, folder, is_first=workers.worker == 0)
    samples, fresh = makers.samples(), makers.fresh() if compares_fresh(search) else None
    corpus = build_corpus(config.text).describe()
    unscaled = closed_form_factors(RopeMethod.none, space.geometry, space.target_len)
    model = load_to_run(model_folder, unscaled)
    shape = ModelShape.from_folder(model_folder)
    size = search.batch_size or rows_that_fit(model, shape, sample_lengths(config)[-1])
    guess = makers.guess_ppl
    clip = math.log(guess) if search.clip_losses and guess is not None else math.inf

    def losses(chosen: Sequence[ScoredSample], highest: float = math.inf) -> SampleLosses:
        shared_by = workers.processes
        return SampleLosses(model, chosen, size, processes=shared_by, highest_loss=highest)

    guidance = control = None
    if workers.worker == 0:
        selftests.check_factors_matter(losses(samples), space.geometry, space.target_len)
        if guess is not None:
            guidance = makers.guidance(model, size)
            if search.min_needle_loss_gain_at_target is not None:
                with_needle, without = makers.longest_with_and_without()
                control = Control(losses(with_needle, clip), losses(without, clip), guess)
    return PreparedSearch(
        config=config,
        space=space,
        losses=losses(samples, clip),
        fresh=None if fresh is None else losses(fresh),
        shape=shape,
        sample_len=sample_lengths(config)[-1],
        long_factors=_long_factors(config, space.geometry),
        guidance=guidance,
        control=control,
        needles=makers.needles,
        inputs={"model": _identity(model_folder), "corpus": {"name": config.text.name, **corpus}},
        text=heldout_text(config.text, corpus, config.run.folder),
        text_hashes=makers.text_hashes,
    )


def rows_that_fit(model: WindowedModel, shape: ModelShape, length: int) -> int:
    """Rows of ``length`` tokens for one forward: 1 on a CPU, where more are no faster.

    On a GPU half of its memory, less the weights, over a generous count of what a layer holds for a
    token; at most ``_FULL_FORWARD`` tokens, which fill any GPU.
    """
    if not torch.cuda.is_available():
        return 1
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    room = total / 2 - 4 * sum(p.numel() for p in model.parameters())
    per_token = 4 * (8 * shape.hidden + 3 * shape.mlp)
    return max(1, min(int(room / (per_token * length)), _FULL_FORWARD // length))


class _SampleMaker:
    """The samples of a search: those to choose by, fresh ones, and those of the self-tests.

    The held-out text is halved: what is chosen by and what is reported share no text and no keys.
    """

    def __init__(
        self, config: SearchRoot, model_folder: Path, folder: Path, *, is_first: bool
    ) -> None:
        self._config, self._search, self._folder = config, config.search, folder
        self._tokenizer = load_tokenizer(model_folder)
        self._encoder = DocumentTokenizer(self._tokenizer, config.model.document_start)
        # Always: what is chosen by does not depend on whether it is compared afterwards.
        documents = heldout_documents(config.text)
        overlap = find_overlap(documents, segments_of(config.run.folder))
        if overlap is not None and is_first:
            print(f"warning: {overlap}", file=sys.stderr)
        in_noise = self._is_needle and self._search.haystack is Haystack.noise
        self.text_hashes = [] if in_noise else text_hashes(documents)
        halves = halve_documents(documents, config.seed)
        self._chosen_by, self._unseen = halves
        self.needles: dict[str, NeedleSet] = {}

    @property
    def _is_needle(self) -> bool:
        return self._search.objective is Objective.needle

    def samples(self) -> list[ScoredSample]:
        """Samples to choose by, of every length, the shortest first; after self-test (a)."""
        lengths = sample_lengths(self._config)
        if not self._is_needle:
            num = self._search.num_samples
            return [sample for length in lengths for sample in self._texts(length, num)]
        for length in lengths:
            name = NEEDLES_FILE if length == lengths[-1] else f"needles_{length}.arrow"
            self._keep(name, length, partial(self._draw, length))
        sets = (self.needles[name] for name in self.needles)
        return [sample for needles in sets for sample in needle_samples(needles)]

    def fresh(self) -> list[ScoredSample]:
        """Samples of other texts and keys: needles at the start and at spread depths in turn."""
        length, num = sample_lengths(self._config)[-1], self._search.fresh_samples
        if not self._is_needle:
            return self._texts(length, 2 * num, unseen=True)
        taken = {sample.key for needles in self.needles.values() for sample in needles.samples}
        depths = [depth for spread in _FRESH_DEPTHS for depth in (0.0, spread)]
        draw = partial(
            self._draw,
            length,
            unseen=True,
            num_samples=2 * num * self._search.needles_per_haystack,
            num_keys=None,
            depths=depths,
            excluded_keys=taken,
        )
        return needle_samples(self._keep(FRESH_FILE, length, draw))

    @property
    def guess_ppl(self) -> float | None:
        """Perplexity of a value for who guesses its digits; None without needles."""
        return guess_perplexity(self.needles[NEEDLES_FILE]) if self.needles else None

    def longest_with_and_without(self) -> tuple[list[ScoredSample], list[ScoredSample]]:
        """The samples of the target length, and the same without the needle."""
        length = sample_lengths(self._config)[-1]
        without = self._draw(length, with_needle=False)
        return needle_samples(self.needles[NEEDLES_FILE]), needle_samples(without)

    def guidance(self, model: WindowedModel, batch_size: int) -> NeedleGuidance:
        """Self-test (c) inside the original window, with and without the needle."""

        def losses(with_needle: bool) -> SampleLosses:
            needles = self._draw(self._config.model.original_len, with_needle=with_needle)
            return SampleLosses(model, needle_samples(needles), batch_size, Window.SHORT)

        both = losses(True), losses(False)
        return selftests.check_needle_guidance(*both, model.factors, self._search)

    def _keep(self, name: str, length: int, draw: Callable[[], NeedleSet]) -> NeedleSet:
        """The frozen set of that name, else a new one; checked."""
        frozen = self._folder / name
        needles = NeedleSet.load(frozen) if frozen.is_file() else draw()
        encoder = self._encoder
        selftests.check_needle_labels(needles, length, encoder.bos_id, encoder.decode)
        self.needles[name] = needles
        return needles

    def _draw(self, length: int, unseen: bool = False, **kinds: Any) -> NeedleSet:
        search, config = self._search, self._config
        given: dict[str, Any] = {
            "length": length,
            "depths": search.depths,
            "num_keys": search.num_keys,
            "num_samples": search.num_samples * search.needles_per_haystack,
            "needles_per_haystack": search.needles_per_haystack,
            "seed": self._seed(length, unseen),
            "document_start": config.model.document_start,
            "wording": choose_wording(search.wording, config.model.original_len),
            "haystack": search.haystack,
        }
        books = self._unseen if unseen else self._chosen_by
        return build_needle_set(self._tokenizer, books, **{**given, **kinds})

    def _texts(self, length: int, num: int, unseen: bool = False) -> list[ScoredSample]:
        """Text scored on every token: the documents that a needle search would hide needles in."""
        texts = build_texts(
            self._tokenizer,
            self._unseen if unseen else self._chosen_by,
            length=length,
            num_samples=num,
            seed=self._seed(length, unseen),
            document_start=self._config.model.document_start,
        )
        return [ScoredSample(text, first_scored=1) for text in texts]

    def _seed(self, length: int, unseen: bool) -> int:
        """The target's samples come from the seed itself, all others from one of their own."""
        is_own = length == sample_lengths(self._config)[-1] and not unseen
        seed = self._config.seed
        return seed if is_own else _other_seed(seed, length, unseen)


def _other_seed(seed: int, length: int, unseen: bool) -> int:
    """A seed that no other set of samples of this search has."""
    return zlib.crc32(f"needles/{seed}/{length}/{unseen}".encode())
