"""RULER as NVIDIA/RULER@c3f5e3b makes it (``mode=upstream``): its fit around its draws.

Departures: where BOS would bring prompt and answer over the length (RULER does not count it), the
answer gets one token less, ``facts["bos_over"]``; and where RULER would try for ever, there is an
error: once its smallest prompt was drawn often and always far from fitting. The samples of a task
are drawn from one stream, so they are made in one go and tokenized whole: slow beside
``mode=fixed``. Inside a chat template the example of variable tracking stands in the user's turn as
it is for base models, where RULER drops its last word.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.ruler import upstream_draws as draws
from longrope2.evaluation.ruler.config import MAX_NEW_TOKENS, RulerConfig
from longrope2.evaluation.ruler.haystacks import texts_sha256
from longrope2.evaluation.ruler.niah import NIAH_TASKS
from longrope2.evaluation.ruler.qa import read_questions
from longrope2.evaluation.ruler.template import BASE, PromptTemplate
from longrope2.evaluation.samples import Sample, SampleRecipe

_VERSION = 1
# Draws of the smallest prompt before it is asked whether another could fit, and at most.
_TRIES_AT_SMALLEST, _MOST_TRIES_AT_SMALLEST = 100, 10_000
# Standard deviations between the mean prompt and the room, beyond which no draw will fit.
_OUT_OF_REACH = 8.0
_NO_TEMPLATE = PromptTemplate(BASE)
_SMALLEST = "smallest prompt (size {size})"
# Of variable tracking's solved example, in tokens.
_EXAMPLE_LENGTH = 500


class UpstreamRuler:
    """RULER's generators over one tokenizer; ``config`` names a checkout.

    Raises:
        DataError: the checkout or its prompts are missing.
        ArtifactError: its prompts are not RULER's.
    """

    def __init__(
        self, config: RulerConfig, encoder: PromptEncoder, template: PromptTemplate = _NO_TEMPLATE
    ) -> None:
        assert config.upstream_checkout is not None
        self.config, self.encoder, self.template = config, encoder, template
        self.checkout = Path(config.upstream_checkout)
        self.prompts = draws.read_prompts(self.checkout, template.around)
        self._questions = cache(lambda task: read_questions(task, config))

    def recipe(self, task: str, length: int) -> SampleRecipe:
        """How the samples of a task are made; reads the texts that it needs."""
        seed, num_samples = self.config.seed, self.config.num_samples
        kind = {"suite": "ruler", "mode": "upstream", "version": _VERSION, "task": task}
        hashes = {"tokenizer": self.encoder.fingerprint, "texts": self._texts_sha256(task)}
        identity = {**kind, "length": length, "seed": seed, "num_samples": num_samples, **hashes}
        if self.template.name != BASE:
            identity["template"] = [self.template.head, self.template.tail]
        make, place = partial(self._make, task, length), (task, length, num_samples)
        return SampleRecipe(*place, identity=identity, make=make, whole=True)

    def texts(self, task: str, length: int) -> list[tuple[str, list[str], int]]:
        """Prompt, answers and RULER's ``length`` (BOS not counted) of each sample, in its order.

        Raises:
            DataError: the length is too short, where RULER would try for ever.
        """
        streams, new_tokens = draws.Streams(self.config.seed), MAX_NEW_TOKENS[task]
        if task == "fwe":
            return self._coded_words(streams, length)
        search = self._size_search(task, length, streams)
        size = self._largest(search, length - new_tokens, length)
        room: dict[str, Any] = {"length": length, "new_tokens": new_tokens}
        room["smallest"] = search.smallest
        draws_of = (partial(search.generate, index) for index in range(self.config.num_samples))
        return [self._sample(draw, size, search.step, **room) for draw in draws_of]

    def _make(self, task: str, length: int, first: int, stop: int) -> list[Sample]:
        """All samples; ``first`` is 0."""
        samples = []
        for text, answers, used in self.texts(task, length)[first:stop]:
            ids = self._ids(text)
            bos_ids = self.encoder.bos_ids
            # A chat template may start with BOS itself; twice would be no document's start.
            ids = ids if bos_ids and ids[: len(bos_ids)] == bos_ids else [*bos_ids, *ids]
            over = max(len(ids) + MAX_NEW_TOKENS[task] - length, 0)
            facts: dict[str, Any] = {"num_characters": len(text), "fill": used / length}
            facts |= {"bos_over": over} if over else {}
            prompt, new_tokens = np.asarray(ids, dtype=np.int32), MAX_NEW_TOKENS[task] - over
            samples.append(Sample(prompt, tuple(answers), new_tokens, facts))
        return samples

    def _size_search(self, task: str, length: int, streams: draws.Streams) -> "_SizeSearch":
        if task == "vt":
            return self._variables(length, streams)
        if task == "cwe":
            words, further = list(self._words.words), self._words.further_words
            streams.reshuffle(words)
            template = self.prompts["common_words_extraction"]
            choice = {"words": words, "further": further}
            lists = partial(draws.common_words, template, streams, length=length, **choice)
            return _SizeSearch(lambda _, size: lists(size), lists, 10, probe_size=4096)
        if task in ("qa_1", "qa_2"):
            found = self._questions(task)
            if self.config.num_samples > len(found.questions):
                raise DataError(f"there are {len(found.questions)} questions; use fewer samples")
            shown = partial(draws.documents, self.prompts["qa"], streams, found)
            smallest = "smallest prompt ({size} documents, which must hold those of its question)"
            return _SizeSearch(shown, partial(shown, 0), 10, smallest=smallest)
        kind = NIAH_TASKS[task]
        words = self._words if kind.keys == "words" else None
        essay = self._essay if kind.haystack == "essay" else []
        texts = {"words": words, "essay": essay, "sentences_of": _sentences}
        hidden = partial(draws.needles, kind, self.prompts["niah"], streams, **texts)
        small_step = 25 if length >= 4096 else 5
        step = 500 if kind.haystack == "essay" else small_step
        return _SizeSearch(lambda _, size: hidden(size), hidden, step)

    def _variables(self, length: int, streams: draws.Streams) -> "_SizeSearch":
        """First the solved example is fitted, then prompts that leave room for it."""
        template = self.prompts["variable_tracking"]
        bare = draws.read_prompts(self.checkout)["variable_tracking"]
        small = partial(draws.variables, bare, streams, example=True)
        example_search = _SizeSearch(lambda _, size: small(size), small, 5)
        size = self._largest(example_search, _EXAMPLE_LENGTH, _EXAMPLE_LENGTH)
        solved, names, _ = self._sample(small, size, 5, length=_EXAMPLE_LENGTH, new_tokens=0)
        example = f"{solved} {' '.join(names)}\n"
        large = partial(draws.variables, template, streams, example=False)

        def generate(_: int, size: int) -> draws.Text:
            text, answers = large(size)
            return draws.with_example(text, example, streams, self.template.head), answers

        step = 10 if length >= 4096 else 5
        return _SizeSearch(generate, large, step, reserved=self._count(example))

    def _largest(self, search: "_SizeSearch", room: int, length: int) -> int:
        """RULER's binary search for the largest fitting size; every probe is a fresh draw."""
        probe_size, step = search.probe_size or search.step, search.step
        per_unit = self._count(search.probe(probe_size)[0]) / probe_size
        is_own = search.probe_size is None
        bound = int(length / per_unit * 3) if is_own else int(length // per_unit) * 2
        low, high, best = step, max(bound, 2 * step), step
        while low <= high:
            middle = (low + high) // 2
            if self._count(search.probe(middle)[0]) + search.reserved <= room:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def _sample(
        self,
        draw: Callable[[int], draws.Text],
        size: int,
        step: int,
        *,
        length: int,
        new_tokens: int,
        smallest: str = _SMALLEST,
    ) -> tuple[str, list[str], int]:
        """RULER's retries: a step smaller whenever a draw does not fit, or fails."""
        at_smallest: list[int] = []
        num_failed = 0
        while True:
            # More needles than places, a repeated name: RULER catches everything.
            found: draws.Text | None = None
            with contextlib.suppress(ValueError, IndexError):
                found = draw(size)
            used = length + 1 if found is None else self._count(found[0]) + new_tokens
            if found is not None and used <= length:
                return *found, used
            if size > step:
                size -= step
                continue
            num_failed += found is None
            at_smallest += [] if found is None else [used]
            if _is_hopeless(at_smallest, num_failed, length):
                called = smallest.format(size=size)
                raise DataError(_never_ending(called, at_smallest, num_failed, length))

    def _coded_words(self, streams: draws.Streams, length: int) -> list[tuple[str, list[str], int]]:
        """Frequent coded words, whose size RULER searches in steps of a 32nd of the input."""
        room = length - MAX_NEW_TOKENS["fwe"]
        template, step = self.prompts["freq_words_extraction"], room // 32
        text, _ = draws.coded_words(template, streams, room // 50)
        size = room // 6
        while self._count(text(size)) < room:
            size += step
        size -= step
        found = []
        for _ in range(self.config.num_samples):
            text, answers = draws.coded_words(template, streams, room // 50)
            own = size
            while own > 0 and self._count(text(own)) > room:
                own -= step
            if own <= 0:
                fault = f"the length is too short: {room} tokens cannot hold coded words"
                raise DataError(f"{fault}; use a longer one")
            found.append((text(own), answers, self._count(text(own)) + MAX_NEW_TOKENS["fwe"]))
        return found

    def _texts_sha256(self, task: str) -> str:
        """Hash of the texts that a task uses; makes sure that they are there."""
        if task in ("qa_1", "qa_2"):
            return self._questions(task).sha256
        if task == "cwe":
            return texts_sha256([*self._words.words, *self._words.further_words])
        if task not in NIAH_TASKS:
            return "none"
        kind = NIAH_TASKS[task]
        pairs = self._words.pairs if kind.keys == "words" else []
        return texts_sha256([*pairs, *(self._essay if kind.haystack == "essay" else [])])

    @cached_property
    def _words(self) -> draws.UpstreamWords:
        return draws.read_upstream_words(self.checkout, self.config.wordlists)

    @cached_property
    def _essay(self) -> list[str]:
        # Without NLTK an error now, not in the middle.
        _sentences("Punkt is there. Or it is not.")
        text = draws.read_upstream_essays(self.checkout, self.config.essays)
        return re.sub(r"\s+", " ", text).split(" ")

    def _count(self, text: str) -> int:
        return len(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        """Ids of a prompt, control tokens in its template alone."""
        pieces = self.template.pieces(text)
        found = (
            self.encoder.encode_text(piece) if isinstance(piece, str) else [piece]
            for piece in pieces
        )
        return list(itertools.chain.from_iterable(found))


@dataclass(frozen=True)
class _SizeSearch:
    """What the search for a size and the drawing of samples need."""

    generate: Callable[[int, int], draws.Text]
    """Sample (number, size)."""
    probe: Callable[[int], draws.Text]
    """What is measured while the size is searched."""
    step: int
    """Smallest size, and what is taken off a sample that does not fit."""
    reserved: int = 0
    """Tokens that ``generate`` adds to ``probe``."""
    probe_size: int | None = None
    """Size from which tokens per unit are estimated; None is ``step``."""
    smallest: str = _SMALLEST
    """What a draw of the smallest size is called where none fits."""


def _is_hopeless(tokens: Sequence[int], num_failed: int, length: int) -> bool:
    """Whether RULER would go on drawing its smallest prompt without an end.

    ``tokens`` are those of the draws so far, all above ``length``; lengths of words differ, so a
    draw close to it may be followed by one that fits.
    """
    num_tries = len(tokens) + num_failed
    if num_tries < _TRIES_AT_SMALLEST:
        return False
    spread = _OUT_OF_REACH * float(np.std(tokens)) if tokens else 0.0
    out_of_reach = not tokens or float(np.mean(tokens)) - spread > length
    return out_of_reach or num_tries >= _MOST_TRIES_AT_SMALLEST


def _never_ending(smallest: str, tokens: Sequence[int], num_failed: int, length: int) -> str:
    """Why a sample cannot be made."""
    num_tries = len(tokens) + num_failed
    way_out = "use a longer one, or suite.ruler.mode=fixed, whose prompts get smaller"
    if not tokens:
        fault = f"RULER's {smallest} cannot be drawn ({num_tries} tries failed)"
    else:
        fault = (
            f"with its answer RULER's {smallest} took {min(tokens)} tokens at least in "
            f"{num_tries} tries, and {length} are allowed"
        )
    return f"the length is too short: {fault}; RULER itself would go on drawing for ever; {way_out}"


def _sentences(text: str) -> list[str]:
    try:
        from nltk.tokenize import sent_tokenize  # type: ignore[import-not-found]

        return sent_tokenize(text)
    except (ImportError, LookupError):
        raise DataError(
            "mode=upstream cuts essays with NLTK: `pip install nltk`, then "
            "`python -m nltk.downloader punkt_tab`; or leave the essay tasks out of ruler.tasks"
        ) from None
