"""Needles in a haystack, in our own wording: one or several keys with their values, asked for at
the end.

Every key of a prompt is there once. The needle that is asked for stands at the depth that the
sample is given; other needles stand anywhere. Depths are realised between sentences or lines and
recorded in tokens of haystack.

RULER's two scores (arXiv 2404.06654): substrings, not case sensitive, all of the references or any
of them.
"""

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Block, Draft, Piece, PieceTable, PromptEncoder
from longrope2.evaluation.ruler.haystacks import NoiseHaystack, WordHaystack, all_pairs, draw_pairs
from longrope2.evaluation.samples import Sample

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")
PART_TASKS = ("qa_1", "qa_2")
SMALLEST_STOCK = 2048
TOKENS_PER_VALUE = 8  # a line takes at least twice as many


def clean_answer(text: str) -> str:
    """A prediction as RULER compares it: stripped, control characters as newlines, stripped again."""
    return CONTROL_CHARACTERS.sub("\n", text.strip()).strip()


def string_match_all(answers: Sequence[str], text: str) -> float:
    """Share of the references that are substrings of ``text``, 0 to 1."""
    prediction = clean_answer(text).lower()
    return sum(answer.lower() in prediction for answer in answers) / len(answers)


def string_match_part(answers: Sequence[str], text: str) -> float:
    """1 if any reference is a substring of ``text``, else 0."""
    prediction = clean_answer(text).lower()
    return float(any(answer.lower() in prediction for answer in answers))


def ruler_score(task: str, sample: Sample, text: str) -> float:
    """Score of one sample, 0 to 1: any reference for question answering, the share of all elsewhere."""
    match = string_match_part if task in PART_TASKS else string_match_all
    return match(sample.answers, text)


def suite_score(scores: Sequence[float]) -> float:
    """What RULER prints for a task: the mean of its samples' scores in percent, two decimals."""
    return round(sum(scores) / len(scores) * 100, 2)


@dataclass(frozen=True)
class NiahTask:
    """One of RULER's needle tasks."""

    haystack: str
    """``noise`` (repeated lines), ``essay`` (running text) or ``needle`` (lines of other
    needles)."""
    keys: str = "words"
    """Keys are ``words`` (an adjective and a noun) or ``uuids``."""
    values: str = "numbers"
    """Values are ``numbers`` of seven digits or ``uuids``."""
    num_keys: int = 1
    """Different keys hidden."""
    num_values: int = 1
    """Values of each key, one needle each."""
    num_queries: int = 1
    """Keys asked for."""


NIAH_TASKS = {
    "niah_single_1": NiahTask("noise"),
    "niah_single_2": NiahTask("essay"),
    "niah_single_3": NiahTask("essay", values="uuids"),
    "niah_multikey_1": NiahTask("essay", num_keys=4),
    "niah_multikey_2": NiahTask("needle"),
    "niah_multikey_3": NiahTask("needle", keys="uuids", values="uuids"),
    "niah_multivalue": NiahTask("essay", num_values=4),
    "niah_multiquery": NiahTask("essay", num_keys=4, num_queries=4),
}


@dataclass(frozen=True)
class _Needle:
    """One hidden sentence and where it should stand."""

    key: str
    value: str
    depth: float


def random_value(rng: random.Random, kind: str) -> str:
    """A number of seven digits, or a version-4 uuid."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def niah_prompt(
    task: NiahTask,
    encoder: PromptEncoder,
    haystack: "WordHaystack | NoiseHaystack | NeedleLines",
    rng: random.Random,
    depth: float,
    budget: int,
) -> Draft:
    """A prompt of at most ``budget`` tokens, the first queried needle at ``depth``.

    Args:
        task: Which needles.
        encoder: Tokenizer.
        haystack: Text for ``essay``, noise for ``noise``, lines for ``needle``.
        rng: Source of everything drawn.
        depth: 0 (start of the haystack) to 1 (its end).
        budget: Tokens of the prompt, BOS not counted.

    Raises:
        DataError: the budget cannot hold instruction, needles and question.
    """
    keys = _draw_keys(rng, task.keys, task.num_keys)
    drawn = _draw_values(rng, task.values, task.num_keys * task.num_values)
    values = [
        drawn[number * task.num_values :][: task.num_values] for number in range(task.num_keys)
    ]
    queried = rng.sample(range(task.num_keys), task.num_queries)
    needles = []
    for number, key in enumerate(keys):
        for value in values[number]:
            first = number == queried[0] and value == values[number][0]
            needles.append(_Needle(key, value, depth if first else rng.random()))
    queries = [keys[number] for number in queried]
    answers = tuple(value for number in queried for value in values[number])
    head, tail = _frame(task, queries, num_answers=len(answers))
    room = budget - encoder.fixed_total([head, *tail])
    sentence = _needle_sentence if isinstance(haystack, WordHaystack) else _needle_line
    parts = [sentence(needle, task.values) for needle in needles]
    room -= sum(encoder.total(part) for part in parts)
    if isinstance(haystack, NeedleLines):
        body, depths = _among_needles(haystack, parts[0], needles[0], rng, room)
    elif isinstance(haystack, NoiseHaystack):
        body, depths = _in_noise(haystack, needles, parts, room)
    else:
        body, depths = _in_text(haystack, needles, parts, room, rng)
    by_answer = {needle.value: place for needle, place in zip(needles, depths, strict=True)}
    places = [by_answer[value] for value in answers]
    facts = {"depth": places[0], "depths": places, "queries": queries, "requested_depth": depth}
    return Draft([head, *body, *tail], answers, facts)


def _frame(task: NiahTask, queries: list[str], num_answers: int) -> tuple[str, list[str]]:
    """Instruction in front of the haystack, and the pieces of question and answer prefix behind it."""
    kind = task.values[:-1] if num_answers == 1 else task.values
    asked = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + " and " + queries[-1]
    opening = f"A special magic {kind} is" if num_answers == 1 else f"Some special magic {kind} are"
    head = f"{opening} hidden in the text below. Read it with care: you will be asked for the {kind} at its end.\nText:"
    verb = "is" if num_answers == 1 else "are"
    tail = [
        " (End of the text.)\n",
        f"Which special magic {kind} for {asked} does the text mention?",
        f" The special magic {kind} for {asked} mentioned in the provided text {verb}",
    ]
    return head if task.haystack == "essay" else head + "\n", tail


def _needle_sentence(needle: _Needle, kind: str) -> list[str]:
    """Pieces of a needle inside running text."""
    return [f" One of the special magic {kind} for", f" {needle.key}", " is:", f" {needle.value}."]


def _needle_line(needle: _Needle, kind: str) -> list[str]:
    """Pieces of a needle that stands on a line of its own."""
    return [f"One of the special magic {kind} for", f" {needle.key}", " is:", f" {needle.value}.\n"]


def _in_text(
    haystack: WordHaystack,
    needles: list[_Needle],
    parts: list[list[str]],
    room: int,
    rng: random.Random,
) -> tuple[list[Piece], list[float]]:
    """Running text from a random sentence on, needles between sentences."""
    first = int(haystack.sentence_starts[rng.randrange(len(haystack.sentence_starts))])
    start = haystack.tokens_before(first)
    stop = haystack.word_at(start + room) if room > 0 else first
    if stop <= first:
        raise DataError(_too_short(room))
    used = haystack.tokens_before(stop) - start
    places = [
        haystack.nearest_sentence(haystack.word_at(start + round(needle.depth * used)), first, stop)
        for needle in needles
    ]
    pieces: list[Piece] = []
    done = first
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        pieces += [*haystack.blocks(done, places[number]), *parts[number]]
        done = places[number]
    pieces += haystack.blocks(done, stop)
    return pieces, [(haystack.tokens_before(place) - start) / used for place in places]


def _in_noise(
    haystack: NoiseHaystack, needles: list[_Needle], parts: list[list[str]], room: int
) -> tuple[list[Piece], list[float]]:
    """Lines of noise, needles between lines."""
    num_lines, rest, used = haystack.fit(room) if room > 0 else (0, [], 0)
    if num_lines < 1:
        raise DataError(_too_short(room))
    places = [round(needle.depth * num_lines) for needle in needles]
    pieces: list[Piece] = []
    done = 0
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        pieces += [*haystack.lines(places[number] - done), *parts[number]]
        done = places[number]
    pieces += [*haystack.lines(num_lines - done), *rest]
    return pieces, [place * haystack.line_tokens / used for place in places]


class NeedleLines:
    """Lines that hide a needle among its like: keys and values in stock, tokenized once.

    Args:
        task: Kinds of keys and values.
        encoder: Tokenizer of the prompts.
        length: Tokens of the prompts; some times as much is in stock as one of them takes.
    """

    def __init__(self, task: NiahTask, encoder: PromptEncoder, length: int) -> None:
        rng = random.Random(f"stock/{task.keys}/{task.values}")
        stock = max(SMALLEST_STOCK, length // TOKENS_PER_VALUE)
        keys = all_pairs() if task.keys == "words" else _draw_values(rng, "uuids", stock)
        values = _draw_values(rng, task.values, stock)
        before, after = _needle_line(_Needle("", "", 0.0), task.values)[::2]
        self.keys, self.values = keys, values
        self._table = PieceTable(
            [before, after, *(f" {key}" for key in keys), *(f" {value}.\n" for value in values)],
            encoder,
        )
        self._first_value = 2 + len(keys)

    def draw(self, rng: random.Random, room: int, taken: _Needle) -> tuple[np.ndarray, np.ndarray]:
        """As many lines as fit ``room`` tokens: their pieces, [lines, 4], and the prefix sums of
        their tokens.

        Raises:
            DataError: none fits, or more are needed than there are keys.
        """
        sizes = self._table.sizes
        fixed, most = int(sizes[:2].sum()), min(len(self.keys), len(self.values))
        smallest = fixed + int(
            sizes[2 : self._first_value].min() + sizes[self._first_value :].min()
        )
        count = min(most, max(room, 0) // smallest + 2)
        keys, values = (
            np.asarray(rng.sample(range(len(self.keys)), count)),
            rng.sample(range(len(self.values)), count),
        )
        kept = [
            number
            for number, (key, value) in enumerate(zip(keys, values, strict=True))
            if self.keys[key] != taken.key and self.values[value] != taken.value
        ]
        pieces = np.zeros((len(kept), 4), dtype=np.int64)
        pieces[:, 1], pieces[:, 2], pieces[:, 3] = (
            2 + keys[kept],
            1,
            self._first_value + np.asarray(values)[kept],
        )
        sums = sizes[pieces].sum(axis=1).cumsum()
        fitting = int(sums.searchsorted(room, side="right"))
        if fitting < 1:
            raise DataError(_too_short(room))
        if fitting == len(kept):
            raise DataError(
                f"the length is too long for this task: there are {most} keys; use a shorter one"
            )
        return pieces[:fitting], sums[:fitting]

    def block(self, pieces: np.ndarray) -> list[Block]:
        """Lines from their pieces, [lines, 4]."""
        return [self._table.block(pieces.ravel())] if len(pieces) else []


def _among_needles(
    lines: NeedleLines, own: list[str], needle: _Needle, rng: random.Random, room: int
) -> tuple[list[Piece], list[float]]:
    """Lines of other needles, as many as fit; the one that is asked for at its depth."""
    pieces, sums = lines.draw(rng, room, needle)
    place = round(needle.depth * len(pieces))
    before = int(sums[place - 1]) if place else 0
    return [*lines.block(pieces[:place]), *own, *lines.block(pieces[place:])], [
        before / int(sums[-1])
    ]


def _draw_keys(rng: random.Random, kind: str, count: int) -> list[str]:
    """``count`` distinct keys."""
    if kind == "words":
        return draw_pairs(rng, count)
    return [random_value(rng, "uuids") for _ in range(count)]


def _draw_values(rng: random.Random, kind: str, count: int) -> list[str]:
    """``count`` distinct values."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[random_value(rng, kind)] = None
    return list(values)


def _too_short(room: int) -> str:
    """What to say when there is no room for a haystack."""
    return f"the length is too short for needles: {room} tokens are left for a haystack; use a longer one"
