"""The needle map: one needle at every depth of every length, several times, to be answered.

The paper shows it as a heat map of depth by length with 10 samples a cell. Prompts are those of
RULER's single needle in our wording; a cell's samples differ in key, value and haystack.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.config import DocumentStart
from longrope2.errors import ConfigError
from longrope2.evaluation.prompts import Draft, PromptEncoder
from longrope2.evaluation.ruler.haystacks import NoiseHaystack, WordHaystack, texts_sha256
from longrope2.evaluation.ruler.niah import NiahTask, niah_prompt, ruler_score
from longrope2.evaluation.ruler.tasks import GENERATOR_VERSION, fitted_samples
from longrope2.evaluation.samples import GenerationTask, SampleRecipe, SampleStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VALUE_DIGITS = 7
# Words that a model may put in front of the value.
_SPARE_TOKENS = 8


class MapHaystack(Enum):
    """What the needles of the map are hidden in."""

    essay = "essay"
    noise = "noise"


@dataclass
class NeedleMapConfig:
    """A heat map of needle retrieval by depth and length."""

    depths: list[float] = field(default_factory=lambda: [round(step / 10, 1) for step in range(11)])
    """Where the needle stands: 0 is the start of the haystack, 1 its end."""
    repeats: int = 10
    """Samples of every depth and length: 10 in the paper."""
    haystack: MapHaystack = MapHaystack.essay
    """``essay``: the evaluation's texts. ``noise``: repeated lines, which small models manage
    further out."""
    seed: int = 7002
    """Seed of keys, values and haystacks."""


def needle_map_faults(
    config: NeedleMapConfig, lengths: Sequence[int], key: str = "evaluation.needle_map"
) -> list[str]:
    """What is wrong with the values, each fault naming its key below ``key``."""
    depths = config.depths
    distinct = depths and len(set(depths)) == len(depths)
    inside = all(0 <= depth <= 1 for depth in depths)
    no_length = not lengths or min(lengths) < 1
    bad_depths = not (distinct and inside)
    faults = {
        f"{key}.depths={depths} must be distinct numbers from 0 to 1, at least one": bad_depths,
        f"{key}.repeats={config.repeats} must be at least 1": config.repeats < 1,
        f"{key}: lengths={list(lengths)} must be at least one, all above 0": no_length,
    }
    return [fault for fault, is_there in faults.items() if is_there]


def needle_map_tasks(
    config: NeedleMapConfig,
    tokenizer: "PreTrainedTokenizerBase",
    haystacks: Sequence[str],
    lengths: Sequence[int],
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
    document_start: DocumentStart = DocumentStart.auto,
) -> list[GenerationTask]:
    """One task per length: ``repeats`` times all depths; scored 1 if the value is in the answer.

    Takes what ``ruler_tasks`` takes; ``haystacks`` are not used with ``haystack=noise``. Facts of a
    sample are ``requested_depth``, ``depth`` (realised, in tokens), ``repeat``, ``fill`` and
    ``num_characters``.

    Raises:
        ConfigError: settings that cannot be; all of them.
        DataError: no texts, or a length that is too short.
        ArtifactError: a file of the store that is damaged.
    """
    if faults := needle_map_faults(config, lengths):
        raise ConfigError(faults)
    encoder = PromptEncoder(tokenizer, document_start)
    noise = config.haystack is MapHaystack.noise
    haystack = NoiseHaystack(encoder) if noise else WordHaystack(haystacks, encoder)
    texts = "none" if noise else texts_sha256(haystacks)
    new_tokens = encoder.total([" " + "8" * _VALUE_DIGITS]) + _SPARE_TOKENS
    num_samples, recipes = len(config.depths) * config.repeats, []
    chosen = {"seed": config.seed, "depths": config.depths, "haystack": config.haystack.value}
    shared = {"suite": "needle_map", "version": GENERATOR_VERSION, **chosen, "texts": texts}
    for length in lengths:
        identity = {**shared, "length": length, "tokenizer": encoder.fingerprint}
        draft_of = partial(_draft, config, encoder, haystack, length)
        fitted = partial(fitted_samples, draft_of, encoder)
        make = partial(fitted, length=length, max_new_tokens=new_tokens)
        place = "needle_map", length, num_samples
        recipes.append(SampleRecipe(*place, identity=identity, make=make))
    found = SampleStore(cache_folder, workers).samples(recipes, progress)
    place, score = ("needle_map", "needle_map"), partial(ruler_score, "needle_map")
    by_length = zip(lengths, found, strict=True)
    return [GenerationTask(*place, length, samples, score=score) for length, samples in by_length]


def _draft(
    config: NeedleMapConfig,
    encoder: PromptEncoder,
    haystack: WordHaystack | NoiseHaystack,
    length: int,
    index: int,
    budget: int,
) -> Draft:
    repeat, place = divmod(index, len(config.depths))
    kind, depth = NiahTask(config.haystack.value), config.depths[place]
    rng = random.Random(f"needle map/{config.seed}/{length}/{depth}/{repeat}")
    draft = niah_prompt(kind, encoder, haystack, rng=rng, depth=depth, budget=budget)
    draft.facts["repeat"] = repeat
    return draft
