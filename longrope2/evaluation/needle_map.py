"""The needle map: one needle at every depth of every length, several times, to be answered.

The paper shows it as a heat map of depth by length with 10 samples a cell. Prompts are those of
RULER's single needle in our wording, so a cell's samples differ in key, value and haystack. A
sample's realised depth, in tokens of haystack in front of the needle, is in its facts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.errors import ConfigError
from longrope2.evaluation.prompts import Draft, PromptEncoder
from longrope2.evaluation.ruler.haystacks import NoiseHaystack, WordHaystack, texts_sha256
from longrope2.evaluation.ruler.niah import NiahTask, niah_prompt, string_match_all
from longrope2.evaluation.ruler.tasks import GENERATOR_VERSION, fitted_samples
from longrope2.evaluation.samples import GenerationTask, Sample, SampleRecipe, SampleStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALUE_DIGITS = 7
# Words that a model may put in front of the value.
SPARE_TOKENS = 8


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
    checks = [
        (
            not (distinct and inside),
            f"{key}.depths={depths} must be distinct numbers from 0 to 1, at least one",
        ),
        (config.repeats < 1, f"{key}.repeats={config.repeats} must be at least 1"),
        (
            not lengths or min(lengths) < 1,
            f"{key}: lengths={list(lengths)} must be at least one, all above 0",
        ),
    ]
    return [message for wrong, message in checks if wrong]


def needle_map_tasks(
    config: NeedleMapConfig,
    tokenizer: "PreTrainedTokenizerBase",
    haystacks: Sequence[str],
    lengths: Sequence[int],
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> list[GenerationTask]:
    """One task per length: ``repeats`` times all depths, one after the other.

    ``Sample.facts`` holds ``requested_depth`` (a value of ``config.depths``), ``depth`` (realised),
    ``repeat``, ``fill`` and ``num_characters``. The score is 1 if the value is in the answer.

    Args:
        config: Settings.
        tokenizer: The model's tokenizer.
        haystacks: Texts to hide needles in; not used with ``haystack=noise``.
        lengths: Tokens that BOS, prompt and answer may take together.
        cache_folder: Where samples are kept.
        workers: Processes; 0 works in this one. Changes no sample.
        progress: Called with a task's name and a number of samples as they are made.

    Raises:
        ConfigError: settings that cannot be; all of them.
        DataError: no texts, or a length that is too short.
        ArtifactError: a file of the store that is damaged.
    """
    if faults := needle_map_faults(config, lengths):
        raise ConfigError(faults)
    encoder = PromptEncoder(tokenizer)
    noise = config.haystack is MapHaystack.noise
    haystack = NoiseHaystack(encoder) if noise else WordHaystack(haystacks, encoder)
    texts = "none" if noise else texts_sha256(haystacks)
    recipes = [_Maker(config, encoder, haystack, length).recipe(texts) for length in lengths]
    found = SampleStore(cache_folder, workers).samples(recipes, progress)
    return [
        GenerationTask("needle_map", "needle_map", length, samples, _score)
        for length, samples in zip(lengths, found, strict=True)
    ]


@dataclass(frozen=True)
class _Maker:
    """The samples of one length."""

    config: NeedleMapConfig
    encoder: PromptEncoder
    haystack: WordHaystack | NoiseHaystack
    length: int

    def recipe(self, texts: str) -> SampleRecipe:
        """How they are made, from texts of this hash."""
        config = self.config
        identity = {
            "suite": "needle_map",
            "version": GENERATOR_VERSION,
            "length": self.length,
            "seed": config.seed,
            "depths": config.depths,
            "haystack": config.haystack.value,
            "texts": texts,
            "tokenizer": self.encoder.fingerprint,
        }
        num_samples = len(config.depths) * config.repeats
        return SampleRecipe("needle_map", self.length, num_samples, identity, self._make)

    def _make(self, first: int, stop: int) -> list[Sample]:
        new_tokens = self.encoder.total([" " + "8" * VALUE_DIGITS]) + SPARE_TOKENS
        numbers = range(first, stop)
        return fitted_samples(
            self._draft, self.encoder, numbers, length=self.length, max_new_tokens=new_tokens
        )

    def _draft(self, index: int, budget: int) -> Draft:
        """The prompt of one sample, at most ``budget`` tokens."""
        config, encoder, kind = self.config, self.encoder, NiahTask(self.config.haystack.value)
        repeat, place = divmod(index, len(config.depths))
        depth = config.depths[place]
        rng = random.Random(f"needle map/{config.seed}/{self.length}/{depth}/{repeat}")
        draft = niah_prompt(kind, encoder, self.haystack, rng=rng, depth=depth, budget=budget)
        draft.facts["repeat"] = repeat
        return draft


def _score(sample: Sample, text: str) -> float:
    """1 if the value is in the answer."""
    return string_match_all(sample.answers, text)
