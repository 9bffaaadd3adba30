"""RULER as generation tasks: all tasks at all lengths, from the store or made now.

From a draft to a sample that fills its length and never exceeds it.

The generators fit their prompts by sums over tokens counted once. Whether joined pieces give the
ids of the whole text is a property of the tokenizer, so it is confirmed by tokenizing whole texts:
thousands of words in random order, and the first prompt of every file of samples. If it does not
hold, prompts are tokenized whole every time and the budget is lowered by what they exceed it, which
ends: a budget only falls until the prompt fits or the generator says that the length is too short.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope2.errors import ConfigError
from longrope2.evaluation.prompts import Draft, Piece, PromptEncoder, text_of
from longrope2.evaluation.ruler.config import MAX_NEW_TOKENS, RulerConfig, RulerMode, ruler_faults
from longrope2.evaluation.ruler.counting import (
    CodedWords,
    WordLists,
    cwe_prompt,
    fwe_prompt,
    vt_prompt,
)
from longrope2.evaluation.ruler.haystacks import (
    NoiseHaystack,
    WordHaystack,
    draw_pairs,
    read_texts,
    texts_sha256,
)
from longrope2.evaluation.ruler.niah import (
    NIAH_TASKS,
    NeedleLines,
    niah_prompt,
    random_value,
    ruler_score,
)
from longrope2.evaluation.ruler.qa import (
    QaDocuments,
    QuestionSet,
    qa_prompt,
    read_hotpotqa,
    read_squad,
)
from longrope2.evaluation.ruler.upstream import UpstreamRuler
from longrope2.evaluation.samples import GenerationTask, Sample, SampleRecipe, SampleStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Build = Callable[[int], Draft]
"""A prompt of at most so many tokens, BOS not counted; the same budget gives the same prompt."""
ENOUGH = 0.99
TRIES = 10
GENERATOR_VERSION = (
    1  # part of every sample's identity: raise it with any change to what the generators write
)
GOLDEN_STEP = (
    0.6180339887498949  # steps of the golden ratio cover [0, 1) evenly, however many there are
)
SPARE = 1.25  # of the tokens of a right answer


def joins_exactly(build: Build, encoder: PromptEncoder, budget: int) -> bool:
    """Whether the ids of a prompt's pieces are those of its text: for this prompt, and for words of all kinds."""
    if not _joins_words(encoder):
        return False
    draft = build(budget)
    return np.array_equal(encoder.join(draft.pieces), encoder.encode_text(text_of(draft.pieces)))


@lru_cache(maxsize=8)
def _joins_words(encoder: PromptEncoder) -> bool:
    """The same for a few thousand words, numbers, uuids and line ends in random order: no single prompt shows it all."""
    rng = random.Random("joins")
    pieces: list[Piece] = ["Text:"]
    for pair in draw_pairs(rng, 1000):
        number = str(rng.randrange(10 ** rng.randint(1, 7)))
        word = rng.choice(
            [
                pair,
                pair.replace("-", " "),
                pair.replace("-", ""),
                f"({pair})",
                number,
                f"{number}.",
                "...",
                pair.upper(),
                str(uuid.UUID(int=rng.getrandbits(128))),
            ]
        )
        pieces += rng.choice(
            [[f" {word}"], [f" {word}.\n", pair], [f" {word},"], [f" {word}\n", pair.upper()]]
        )
    return np.array_equal(encoder.join(pieces), encoder.encode_text(text_of(pieces)))


def fitted_sample(
    build: Build,
    encoder: PromptEncoder,
    *,
    length: int,
    max_new_tokens: int,
    tokenize_whole: bool = False,
) -> Sample:
    """The sample of a generator at a length.

    Args:
        build: The generator.
        encoder: Tokenizer of the model.
        length: Tokens that BOS, prompt and answer may take together.
        max_new_tokens: Tokens kept free for the answer.
        tokenize_whole: The tokenizer's ids are not those of joined pieces (``joins_exactly``).

    Raises:
        DataError: the length is too short for the task, as the generator says.
    """
    budget = length - max_new_tokens - len(encoder.bos_ids)
    if tokenize_whole:
        draft, ids = _fit_whole(build, encoder, budget)
    else:
        draft = build(budget)
        ids = encoder.join(draft.pieces)
    assert len(ids) <= budget, f"a prompt of {len(ids)} tokens was built for {budget}"
    prompt = np.concatenate([np.asarray(encoder.bos_ids, dtype=np.int32), ids])
    characters = sum(
        len(piece) if isinstance(piece, str) else piece.num_characters for piece in draft.pieces
    )
    facts = {
        **draft.facts,
        "num_characters": characters,
        "fill": (len(prompt) + max_new_tokens) / length,
    }
    return Sample(prompt, draft.answers, max_new_tokens, facts)


def _fit_whole(build: Build, encoder: PromptEncoder, limit: int) -> tuple[Draft, np.ndarray]:
    """Build and tokenize whole; lower the budget until the prompt fits, then close in on the largest that does."""

    def attempt(budget: int) -> tuple[Draft, np.ndarray]:
        draft = build(budget)
        return draft, np.asarray(encoder.encode_text(text_of(draft.pieces)), dtype=np.int32)

    fitting, exceeding = limit, None
    best = attempt(fitting)
    while len(best[1]) > limit:
        exceeding = fitting
        fitting -= len(best[1]) - limit
        best = attempt(fitting)
    for _ in range(TRIES):
        if len(best[1]) >= ENOUGH * limit:
            break
        budget = (
            int(fitting * limit / len(best[1])) if exceeding is None else (fitting + exceeding) // 2
        )
        draft, ids = attempt(budget)
        if len(ids) > limit:
            exceeding = budget
        elif len(ids) > len(best[1]):
            fitting, best = budget, (draft, ids)
    return best


def ruler_tasks(
    config: RulerConfig,
    tokenizer: "PreTrainedTokenizerBase",
    haystacks: Sequence[str],
    lengths: Sequence[int],
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> list[GenerationTask]:
    """All tasks of ``config`` at all lengths, task by task, each with ``config.num_samples``
    samples.

    Samples are made once per tokenizer, settings and texts, and found again in ``cache_folder``.
    With ``mode=fixed`` the first 100 of 500 samples are the samples that ``num_samples=100`` gives.
    With ``mode=upstream`` essays come from ``config.essays`` or the checkout, never from
    ``haystacks``.

    ``Sample.facts`` holds ``fill`` (share of the length taken by prompt and ``max_new_tokens``),
    ``num_characters``, and for tasks with a place ``depth`` (realised, of the first asked-for
    needle or document, 0 start to 1 end of the haystack in tokens), ``depths`` (of all) and
    ``requested_depth``.

    Args:
        config: Settings.
        tokenizer: The model's tokenizer.
        haystacks: Texts of the essay tasks, used if ``config.essays`` is null.
        lengths: Tokens that BOS, prompt and answer may take together.
        cache_folder: Where samples are kept.
        workers: Processes; 0 works in this one. Changes no sample.
        progress: Called with a task's name and a number of samples as they are made.

    Raises:
        ConfigError: settings that cannot be; all of them.
        DataError: texts or questions that are missing or too few, or a length that is too short,
            naming the task.
        ArtifactError: a file of the store that is damaged, or prompts of RULER that are not the
            known ones.
    """
    faults = ruler_faults(config, list(lengths))
    if faults:
        raise ConfigError(faults)
    encoder = PromptEncoder(tokenizer)
    if config.mode is RulerMode.upstream:
        ruler: FixedRuler | UpstreamRuler = UpstreamRuler(config, encoder)
    else:
        ruler = FixedRuler(config, encoder, haystacks)
    cells = [(task, length) for task in config.tasks for length in lengths]
    recipes = [ruler.recipe(task, length) for task, length in cells]
    samples = SampleStore(cache_folder, workers).samples(recipes, progress)
    return [
        GenerationTask("ruler", task, length, found, partial(ruler_score, task))
        for (task, length), found in zip(cells, samples, strict=True)
    ]


def depth_of(index: int, seed: int) -> float:
    """Where sample ``index`` has its needle, 0 to 1: any number of first samples covers all depths evenly."""
    return (random.Random(f"depth/{seed}").random() + index * GOLDEN_STEP) % 1.0


class FixedRuler:
    """Our generators over one tokenizer; texts are tokenized when a task first needs them.

    Args:
        config: Settings.
        encoder: Tokenizer of the prompts.
        haystacks: Texts of the essay tasks, used if ``config.essays`` is null.
    """

    def __init__(
        self, config: RulerConfig, encoder: PromptEncoder, haystacks: Sequence[str]
    ) -> None:
        self.config = config
        self.encoder = encoder
        self._given_texts = haystacks
        self._lines: dict[tuple[str, int], NeedleLines] = {}
        self._coded: dict[int, CodedWords] = {}
        self._lists: WordLists | None = None

    def recipe(self, task: str, length: int) -> SampleRecipe:
        """How the samples of a task are made; reads and tokenizes the texts that it needs."""
        identity = {
            "suite": "ruler",
            "mode": "fixed",
            "version": GENERATOR_VERSION,
            "task": task,
            "length": length,
            "seed": self.config.seed,
            "tokenizer": self.encoder.fingerprint,
            "texts": self._prepare(task, length),
        }
        return SampleRecipe(
            task, length, self.config.num_samples, identity, partial(self._make, task, length)
        )

    def max_new_tokens(self, task: str) -> int:
        """RULER's, or more for a tokenizer that needs more for a right answer."""
        rng = random.Random(f"answer/{task}")
        if task in NIAH_TASKS:
            kind = NIAH_TASKS[task]
            num_values = kind.num_values * kind.num_queries
            answer = ", ".join(random_value(rng, kind.values) for _ in range(num_values))
        elif task == "vt":
            answer = ", ".join(
                "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)
            )
        elif task == "cwe":
            answer = " ".join(
                f"{n}. {word}" for n, word in enumerate(draw_pairs(rng, 10, joint=""), start=1)
            )
        elif task == "fwe":
            answer = ", ".join(
                "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3)
            )
        else:
            return MAX_NEW_TOKENS[task]
        return max(MAX_NEW_TOKENS[task], round(self.encoder.total([f" {answer}"]) * SPARE))

    def _make(self, task: str, length: int, first: int, stop: int) -> list[Sample]:
        """Samples first .. stop - 1; the joining of pieces is confirmed on the first of them."""
        new_tokens = self.max_new_tokens(task)
        budget = length - new_tokens - len(self.encoder.bos_ids)
        whole = not joins_exactly(self.build(task, length, first), self.encoder, budget)
        return [
            fitted_sample(
                self.build(task, length, index),
                self.encoder,
                length=length,
                max_new_tokens=new_tokens,
                tokenize_whole=whole,
            )
            for index in range(first, stop)
        ]

    def build(self, task: str, length: int, index: int) -> Build:
        """The generator of one sample."""
        seed = self.config.seed

        def build(budget: int) -> Any:
            rng, depth = (
                random.Random(f"ruler/{task}/{length}/{seed}/{index}"),
                depth_of(index, seed),
            )
            if task == "vt":
                return vt_prompt(self.encoder, self._noise, rng, depth, budget)
            if task == "cwe":
                return cwe_prompt(self._word_lists(length), rng, budget)
            if task == "fwe":
                return fwe_prompt(self._coded_words(length), rng, budget)
            if task in ("qa_1", "qa_2"):
                documents = self._squad if task == "qa_1" else self._hotpotqa
                return qa_prompt(
                    self.encoder, documents, documents.question(index, seed), rng, depth, budget
                )
            kind = NIAH_TASKS[task]
            return niah_prompt(kind, self.encoder, self._haystack(task, length), rng, depth, budget)

        return build

    def _prepare(self, task: str, length: int) -> str:
        """Read and tokenize what a task uses, so that worker processes inherit it; returns the hash of its texts."""
        if task == "cwe":
            self._word_lists(length)
        if task == "fwe":
            self._coded_words(length)
        if task == "qa_1":
            return self._squad and _questions_sha256(self._squad_set)
        if task == "qa_2":
            return self._hotpotqa and _questions_sha256(self._hotpotqa_set)
        if task in NIAH_TASKS:
            self._haystack(task, length)
        essay = task in NIAH_TASKS and NIAH_TASKS[task].haystack == "essay"
        return texts_sha256(self._texts) if essay else "none"

    def _haystack(self, task: str, length: int) -> WordHaystack | NoiseHaystack | NeedleLines:
        """What a needle task hides its needles in."""
        kind = NIAH_TASKS[task]
        if kind.haystack == "noise":
            return self._noise
        if kind.haystack == "essay":
            return self._text
        if (task, length) not in self._lines:
            self._lines[task, length] = NeedleLines(kind, self.encoder, length)
        return self._lines[task, length]

    def _coded_words(self, length: int) -> CodedWords:
        """Words in code for a length."""
        if length not in self._coded:
            self._coded[length] = CodedWords(self.encoder, length)
        return self._coded[length]

    def _word_lists(self, length: int) -> WordLists:
        """Words and list numbers for lists of up to ``length`` tokens; an entry takes at least four."""
        if self._lists is None or self._lists.num_numbers < length // 4:
            self._lists = WordLists(self.encoder, max(length // 4, 256))
        return self._lists

    @cached_property
    def _texts(self) -> Sequence[str]:
        return (
            self._given_texts
            if self.config.essays is None
            else read_texts(Path(self.config.essays))
        )

    @cached_property
    def _text(self) -> WordHaystack:
        return WordHaystack(self._texts, self.encoder)

    @cached_property
    def _noise(self) -> NoiseHaystack:
        return NoiseHaystack(self.encoder)

    @cached_property
    def _squad_set(self) -> QuestionSet:
        return read_squad(str(self.config.squad))

    @cached_property
    def _squad(self) -> QaDocuments:
        return QaDocuments(self._squad_set, self.encoder)

    @cached_property
    def _hotpotqa_set(self) -> QuestionSet:
        return read_hotpotqa(str(self.config.hotpotqa))

    @cached_property
    def _hotpotqa(self) -> QaDocuments:
        return QaDocuments(self._hotpotqa_set, self.encoder)


def _questions_sha256(questions: QuestionSet) -> str:
    """Hash over questions, answers and documents."""
    parts = [
        text for question in questions.questions for text in (question.text, *question.answers)
    ]
    return texts_sha256([*parts, *questions.documents])
