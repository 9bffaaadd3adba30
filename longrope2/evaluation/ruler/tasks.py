"""RULER as generation tasks: all tasks at all lengths, from the store or made now.

The generators fit their prompts by sums over tokens counted once. Whether joined pieces give the
ids of the whole text is a property of the tokenizer, so it is confirmed on thousands of words in
random order and on the first prompt of every file of samples. If it does not hold, prompts are
tokenized whole every time, and the budget falls until they fit or the length is too short.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longrope2.config import DocumentStart
from longrope2.errors import ConfigError
from longrope2.evaluation.prompts import Draft, Piece, PromptEncoder, text_of
from longrope2.evaluation.ruler import counting, haystacks, niah
from longrope2.evaluation.ruler.config import MAX_NEW_TOKENS, RulerConfig, RulerMode, ruler_faults
from longrope2.evaluation.ruler.qa import QaDocuments, qa_prompt, read_questions
from longrope2.evaluation.ruler.template import choose_template
from longrope2.evaluation.ruler.upstream import UpstreamRuler
from longrope2.evaluation.samples import GenerationTask, Sample, SampleRecipe, SampleStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every sample's identity: raise it with any change to what the generators write.
GENERATOR_VERSION = 1
# Steps of the golden ratio cover [0, 1) evenly, however many there are.
_GOLDEN_STEP = 0.6180339887498949
# Of the tokens of a right answer.
_SPARE = 1.25
# A prompt that is tokenized whole may leave one percent of its room, and is built so often.
_ENOUGH, _TRIES = 0.99, 10


def ruler_tasks(
    config: RulerConfig,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
    document_start: DocumentStart = DocumentStart.auto,
) -> list[GenerationTask]:
    """All tasks of ``config`` at all lengths, task by task.

    Samples are made once per tokenizer, settings and texts, and found again in ``cache_folder``.
    With ``mode=fixed`` the first 100 of 500 samples are the samples that ``num_samples=100`` gives.
    ``texts`` are those of the essay tasks if ``config.essays`` is null; with
    ``mode=upstream`` the checkout's are taken instead.

    ``Sample.facts`` holds ``fill`` (share of the length taken by prompt and ``max_new_tokens``),
    ``num_characters``, and for tasks with a place ``depth`` (realised, of the first asked-for
    needle or document, 0 start to 1 end of the haystack in tokens), ``depths`` (of all) and
    ``requested_depth``.

    ``lengths`` are the tokens that BOS, prompt and answer may take together; ``workers`` and
    ``progress`` are those of ``SampleStore``.

    Raises:
        ConfigError: settings that cannot be; all of them.
        DataError: texts or questions that are missing or too few, or a length that is too short,
            naming the task.
        ArtifactError: a file of the store that is damaged, or prompts of RULER that are not the
            known ones.
    """
    if faults := ruler_faults(config, list(lengths)):
        raise ConfigError(faults)
    encoder = PromptEncoder(tokenizer, document_start)
    upstream = config.mode is RulerMode.upstream
    if upstream:
        ruler = UpstreamRuler(config, encoder, choose_template(config, tokenizer))
    else:
        ruler = FixedRuler(config, encoder, texts)
    recipes = [ruler.recipe(task, length) for task in config.tasks for length in lengths]
    found = SampleStore(cache_folder, workers).samples(recipes, progress)
    tasks = []
    for recipe, samples in zip(recipes, found, strict=True):
        place, score = (recipe.name, recipe.length), partial(niah.ruler_score, recipe.name)
        tasks.append(GenerationTask("ruler", *place, samples=samples, score=score))
    return tasks


def fitted_samples(
    draft_of: Callable[[int, int], Draft],
    encoder: PromptEncoder,
    first: int,
    stop: int,
    *,
    length: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Samples first .. stop - 1, which fill ``length`` and never exceed it.

    ``draft_of`` makes the prompt of a sample from its number and the most tokens that it may take,
    BOS not counted; the same two give the same prompt. On the first sample the joining of pieces is
    confirmed. ``max_new_tokens`` are kept free for the answer.

    Raises:
        DataError: the length is too short for the task, as the generator says.
    """
    budget = length - max_new_tokens - len(encoder.bos_ids)
    joins = _joins_words(encoder) and _joins(draft_of(first, budget).pieces, encoder)
    samples = []
    for number in range(first, stop):
        if joins:
            draft = draft_of(number, budget)
            ids = encoder.join(draft.pieces)
        else:
            draft, ids = _fit_whole(partial(draft_of, number), encoder, budget)
        assert len(ids) <= budget, f"a prompt of {len(ids)} tokens was built for {budget}"
        prompt = np.concatenate([np.asarray(encoder.bos_ids, dtype=np.int32), ids])
        sizes = [len(p) if isinstance(p, str) else p.num_characters for p in draft.pieces]
        fill = (len(prompt) + max_new_tokens) / length
        facts = {**draft.facts, "num_characters": sum(sizes), "fill": fill}
        samples.append(Sample(prompt, draft.answers, max_new_tokens, facts))
    return samples


def _joins(pieces: Sequence[Piece], encoder: PromptEncoder) -> bool:
    """Whether the ids of a prompt's pieces are those of its text."""
    return np.array_equal(encoder.join(pieces), encoder.encode_text(text_of(pieces)))


@lru_cache(maxsize=8)
def _joins_words(encoder: PromptEncoder) -> bool:
    """The same for thousands of words, numbers, uuids and line ends: no prompt shows it all."""
    rng = random.Random("joins")
    pieces: list[Piece] = ["Text:"]
    for pair in haystacks.draw_pairs(rng, 1000):
        number = str(rng.randrange(10 ** rng.randint(1, 7)))
        spaced, glued = pair.replace("-", " "), pair.replace("-", "")
        unique = str(uuid.UUID(int=rng.getrandbits(128)))
        shapes = [pair, spaced, glued, f"({pair})", number, f"{number}.", "...", pair.upper()]
        word = rng.choice([*shapes, unique])
        endings = [[f" {word}"], [f" {word}.\n", pair], [f" {word},"], [f" {word}\n", pair.upper()]]
        pieces += rng.choice(endings)
    return _joins(pieces, encoder)


def _fit_whole(
    draft_of: Callable[[int], Draft], encoder: PromptEncoder, limit: int
) -> tuple[Draft, np.ndarray]:
    """Lower the budget until the prompt fits, then close in on the largest that does."""

    def attempt(budget: int) -> tuple[Draft, np.ndarray]:
        draft = draft_of(budget)
        return draft, np.asarray(encoder.encode_text(text_of(draft.pieces)), dtype=np.int32)

    fitting, exceeding = limit, None
    best = attempt(fitting)
    while len(best[1]) > limit:
        exceeding = fitting
        fitting -= len(best[1]) - limit
        best = attempt(fitting)
    for _ in range(_TRIES):
        if len(best[1]) >= _ENOUGH * limit:
            break
        stretched = int(fitting * limit / len(best[1]))
        budget = stretched if exceeding is None else (fitting + exceeding) // 2
        draft, ids = attempt(budget)
        if len(ids) > limit:
            exceeding = budget
        elif len(ids) > len(best[1]):
            fitting, best = budget, (draft, ids)
    return best


class FixedRuler:
    """Our generators over one tokenizer; texts are tokenized when a task first needs them."""

    def __init__(self, config: RulerConfig, encoder: PromptEncoder, texts: Sequence[str]) -> None:
        self.config, self.encoder, self._given_texts = config, encoder, texts
        self._lines = cache(partial(niah.NeedleLines, encoder))
        self._coded_words = cache(partial(counting.coded_words, encoder))
        self._documents = cache(lambda task: QaDocuments(read_questions(task, config), encoder))
        self._lists: counting.WordLists | None = None

    def recipe(self, task: str, length: int) -> SampleRecipe:
        """How the samples of a task are made; reads and tokenizes the texts that it needs."""
        kind = {"suite": "ruler", "mode": "fixed", "version": GENERATOR_VERSION, "task": task}
        hashes = {"tokenizer": self.encoder.fingerprint, "texts": self._prepare(task, length)}
        identity = {**kind, "length": length, "seed": self.config.seed, **hashes}
        fitted = partial(fitted_samples, partial(self.draft, task, length), self.encoder)
        make = partial(fitted, length=length, max_new_tokens=self.max_new_tokens(task))
        num_samples = self.config.num_samples
        return SampleRecipe(task, length, num_samples, identity=identity, make=make)

    def max_new_tokens(self, task: str) -> int:
        """RULER's, or more for a tokenizer that needs more for a right answer."""
        rng, joint = random.Random(f"answer/{task}"), ", "
        if task in niah.NIAH_TASKS:
            kind = niah.NIAH_TASKS[task]
            num_values = kind.num_values * kind.num_queries
            answers = [niah.random_value(rng, kind.values) for _ in range(num_values)]
        elif task == "vt":
            answers = counting.draw_names(rng, counting.VT_NUM_HOPS + 1, counting.VT_LETTERS)
        elif task == "cwe":
            words, joint = haystacks.draw_pairs(rng, counting.CWE_NUM_COMMON, joint=""), " "
            answers = [f"{n}. {word}" for n, word in enumerate(words, start=1)]
        elif task == "fwe":
            answers = counting.draw_names(rng, 3, counting.FWE_LETTERS, upper=False)
        else:
            return MAX_NEW_TOKENS[task]
        needed = self.encoder.total([f" {joint.join(answers)}"])
        return max(MAX_NEW_TOKENS[task], round(needed * _SPARE))

    def draft(self, task: str, length: int, index: int, budget: int) -> Draft:
        """The prompt of sample ``index``, at most ``budget`` tokens, BOS not counted."""
        encoder, seed = self.encoder, self.config.seed
        rng = random.Random(f"ruler/{task}/{length}/{seed}/{index}")
        # Any number of first samples covers all depths evenly.
        depth = (random.Random(f"depth/{seed}").random() + index * _GOLDEN_STEP) % 1.0
        if task == "vt":
            return counting.vt_prompt(encoder, self._noise, rng, depth=depth, budget=budget)
        if task == "cwe":
            return counting.cwe_prompt(self._word_lists(length), rng, budget)
        if task == "fwe":
            return counting.fwe_prompt(encoder, self._coded_words(length), rng, budget)
        if task in ("qa_1", "qa_2"):
            documents = self._documents(task)
            question = documents.question(index, seed)
            return qa_prompt(encoder, documents, question, rng=rng, depth=depth, budget=budget)
        kind, haystack = niah.NIAH_TASKS[task], self._haystack(task, length)
        return niah.niah_prompt(kind, encoder, haystack, rng=rng, depth=depth, budget=budget)

    def _prepare(self, task: str, length: int) -> str:
        """Tokenize what a task uses, so that worker processes inherit it; the hash of its texts."""
        if task == "cwe":
            self._word_lists(length)
        if task == "fwe":
            self._coded_words(length)
        if task in ("qa_1", "qa_2"):
            return self._documents(task).sha256
        if task in niah.NIAH_TASKS:
            self._haystack(task, length)
            if niah.NIAH_TASKS[task].haystack == "essay":
                return haystacks.texts_sha256(self._texts)
        return "none"

    def _haystack(self, task: str, length: int) -> niah.Haystack:
        kind = niah.NIAH_TASKS[task]
        if kind.haystack == "needle":
            return self._lines(kind, length)
        return self._noise if kind.haystack == "noise" else self._essays

    def _word_lists(self, length: int) -> counting.WordLists:
        """Words and list numbers for up to ``length`` tokens; an entry takes at least four."""
        if self._lists is None or self._lists.num_numbers < length // 4:
            self._lists = counting.WordLists(self.encoder, max(length // 4, 256))
        return self._lists

    @cached_property
    def _texts(self) -> Sequence[str]:
        essays = self.config.essays
        return self._given_texts if essays is None else haystacks.read_texts(Path(essays))

    @cached_property
    def _essays(self) -> haystacks.WordHaystack:
        return haystacks.WordHaystack(self._texts, self.encoder)

    @cached_property
    def _noise(self) -> haystacks.NoiseHaystack:
        return haystacks.NoiseHaystack(self.encoder)
