"""Needles in a haystack, in our own wording, and RULER's two scores (arXiv 2404.06654).

One or several keys with their values are asked for at the end. Every key of a prompt is there once.
The needle that is asked for stands at the depth that the sample is given, other needles anywhere;
depths are realised between sentences or lines and recorded in tokens of haystack.
"""

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Draft, Piece, PieceTable, PromptEncoder, too_short
from longrope2.evaluation.ruler import haystacks
from longrope2.evaluation.ruler.haystacks import NoiseHaystack, WordHaystack, weave
from longrope2.evaluation.samples import Sample

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")
_SMALLEST_STOCK = 2048
# A line takes at least twice as many.
_TOKENS_PER_VALUE = 8


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


def clean_answer(text: str) -> str:
    """What RULER compares: control characters as newlines, stripped before and after."""
    return _CONTROL_CHARACTERS.sub("\n", text.strip()).strip()


def string_match_all(answers: Sequence[str], text: str) -> float:
    """Share of the references that are substrings of ``text``, not case sensitive, 0 to 1."""
    prediction = clean_answer(text).lower()
    return sum(answer.lower() in prediction for answer in answers) / len(answers)


def string_match_part(answers: Sequence[str], text: str) -> float:
    """1 if any reference is a substring of ``text``, not case sensitive, else 0."""
    return float(string_match_all(answers, text) > 0)


def ruler_score(task: str, sample: Sample, text: str) -> float:
    """Score of a sample, 0 to 1: any reference for question answering, else the share of all."""
    match = string_match_part if task in ("qa_1", "qa_2") else string_match_all
    return match(sample.answers, text)


def suite_score(scores: Sequence[float]) -> float:
    """What RULER prints for a task: the mean of its samples' scores in percent, two decimals."""
    return round(sum(scores) / len(scores) * 100, 2)


def random_value(rng: random.Random, kind: str) -> str:
    """A number of seven digits, or a version-4 uuid."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class _Needle:
    """One hidden sentence and where it should stand."""

    key: str
    value: str
    depth: float

    def pieces(self, kind: str, *, own_line: bool) -> list[str]:
        """Its text: a line of its own, or a sentence inside running text."""
        before, after = ("", "\n") if own_line else (" ", "")
        opening = f"{before}One of the special magic {kind} for"
        return [opening, f" {self.key}", " is:", f" {self.value}.{after}"]


class NeedleLines:
    """Lines that hide a needle among its like: keys and values in stock, tokenized once.

    Some times as much is in stock as a prompt of ``length`` tokens takes.
    """

    def __init__(self, encoder: PromptEncoder, task: NiahTask, length: int) -> None:
        rng = random.Random(f"stock/{task.keys}/{task.values}")
        stock = max(_SMALLEST_STOCK, length // _TOKENS_PER_VALUE)
        self._keys = (
            haystacks.all_pairs() if task.keys == "words" else _draw_values(rng, "uuids", stock)
        )
        self._values = _draw_values(rng, task.values, stock)
        pieces = _Needle("", "", 0.0).pieces(task.values, own_line=True)[::2]
        pieces += [f" {key}" for key in self._keys]
        pieces += [f" {value}.\n" for value in self._values]
        self._table = PieceTable(pieces, encoder)

    def hide(
        self, needle: _Needle, own: list[str], rng: random.Random, room: int
    ) -> tuple[list[Piece], float]:
        """As many lines as fit ``room`` tokens with the needle among them, and its realised depth.

        Raises:
            DataError: none fits, or more are needed than there are keys.
        """
        lines_N4, sums_N = self._draw(needle, rng, room)
        place = round(needle.depth * len(lines_N4))
        before = int(sums_N[place - 1]) if place else 0
        head_N4, rest_N4 = lines_N4[:place], lines_N4[place:]
        head, rest = ([self._table.block(n.ravel())] if len(n) else [] for n in (head_N4, rest_N4))
        return [*head, *own, *rest], before / int(sums_N[-1])

    def _draw(
        self, needle: _Needle, rng: random.Random, room: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of each line, [N, 4], and the prefix sums of their tokens."""
        sizes, first_value = self._table.sizes, 2 + len(self._keys)
        smallest = int(sizes[:2].sum() + sizes[2:first_value].min() + sizes[first_value:].min())
        most = min(len(self._keys), len(self._values))
        count = min(most, max(room, 0) // smallest + 2)
        keys = rng.sample(range(len(self._keys)), count)
        values = rng.sample(range(len(self._values)), count)
        lines = []
        for key, value in zip(keys, values, strict=True):
            if self._keys[key] != needle.key and self._values[value] != needle.value:
                lines.append((0, 2 + key, 1, first_value + value))
        lines_N4 = np.array(lines, dtype=np.int64).reshape(-1, 4)
        sums_N = sizes[lines_N4].sum(axis=1).cumsum()
        fitting = int(sums_N.searchsorted(room, side="right"))
        if fitting < 1:
            raise too_short("needles", room, "a haystack")
        if fitting == len(lines_N4):
            fault = f"the length is too long for this task: there are {most} keys"
            raise DataError(f"{fault}; use a shorter one")
        return lines_N4[:fitting], sums_N[:fitting]


Haystack = WordHaystack | NoiseHaystack | NeedleLines


def niah_prompt(
    task: NiahTask,
    encoder: PromptEncoder,
    haystack: Haystack,
    rng: random.Random,
    depth: float,
    budget: int,
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    ``haystack`` is text for ``essay``, noise for ``noise``, lines for ``needle``; ``depth`` is that
    of the first needle asked for, 0 (start of the haystack) to 1 (its end).

    Raises:
        DataError: the budget cannot hold instruction, needles and question.
    """
    values_by_key, queries = _draw_keys(task, rng)
    needles = []
    for key, values in values_by_key.items():
        for number, value in enumerate(values):
            first = key == queries[0] and number == 0
            needles.append(_Needle(key, value, depth if first else rng.random()))
    answers = tuple(value for key in queries for value in values_by_key[key])
    head, tail = _frame(task, queries, num_answers=len(answers))
    own_line = not isinstance(haystack, WordHaystack)
    parts = [needle.pieces(task.values, own_line=own_line) for needle in needles]
    room = budget - encoder.fixed_total([head, *tail])
    room -= sum(encoder.total(part) for part in parts)
    if isinstance(haystack, NeedleLines):
        body, realised = haystack.hide(needles[0], parts[0], rng, room)
        depths = [realised]
    elif isinstance(haystack, NoiseHaystack):
        body, depths = _in_noise(haystack, needles, parts, room)
    else:
        body, depths = _in_text(haystack, needles, parts, room=room, rng=rng)
    depth_of = {needle.value: realised for needle, realised in zip(needles, depths, strict=True)}
    asked = [depth_of[value] for value in answers]
    facts = {"depth": asked[0], "depths": asked, "queries": queries, "requested_depth": depth}
    return Draft([head, *body, *tail], answers, facts)


def _draw_keys(task: NiahTask, rng: random.Random) -> tuple[dict[str, list[str]], list[str]]:
    if task.keys == "words":
        keys = haystacks.draw_pairs(rng, task.num_keys)
    else:
        keys = [random_value(rng, "uuids") for _ in range(task.num_keys)]
    each = task.num_values
    values = _draw_values(rng, task.values, task.num_keys * each)
    queried = rng.sample(range(task.num_keys), task.num_queries)
    by_key = {key: values[n * each : (n + 1) * each] for n, key in enumerate(keys)}
    return by_key, [keys[number] for number in queried]


def _draw_values(rng: random.Random, kind: str, count: int) -> list[str]:
    return haystacks.draw_distinct(count, lambda: random_value(rng, kind))


def _frame(task: NiahTask, queries: list[str], num_answers: int) -> tuple[str, list[str]]:
    """The instruction in front of the haystack; the pieces of the question behind it."""
    one = num_answers == 1
    kind = task.values[:-1] if one else task.values
    quantity, verb = ("A", "is") if one else ("Some", "are")
    asked = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + " and " + queries[-1]
    opening = f"{quantity} special magic {kind} {verb} hidden in the text below. Read it with care:"
    head = f"{opening} you will be asked for the {kind} at its end.\nText:"
    tail = [
        " (End of the text.)\n",
        f"Which special magic {kind} for {asked} does the text mention?",
        f" The special magic {kind} for {asked} mentioned in the provided text {verb}",
    ]
    return head if task.haystack == "essay" else head + "\n", tail


def _in_text(
    haystack: WordHaystack,
    needles: list[_Needle],
    parts: list[list[str]],
    room: int,
    rng: random.Random,
) -> tuple[list[Piece], list[float]]:
    first = int(haystack.sentence_starts[rng.randrange(len(haystack.sentence_starts))])
    start = haystack.tokens_before(first)
    stop = haystack.word_at(start + room) if room > 0 else first
    if stop <= first:
        raise too_short("needles", room, "a haystack")
    used = haystack.tokens_before(stop) - start
    places = []
    for needle in needles:
        word = haystack.word_at(start + round(needle.depth * used))
        places.append(haystack.nearest_sentence(word, first, stop))
    depths = [(haystack.tokens_before(place) - start) / used for place in places]
    return weave(haystack, first, stop, places=places, parts=parts), depths


def _in_noise(
    haystack: NoiseHaystack, needles: list[_Needle], parts: list[list[str]], room: int
) -> tuple[list[Piece], list[float]]:
    num_lines, rest, used = haystack.fit(room)
    if num_lines < 1:
        raise too_short("needles", room, "a haystack")
    places = [round(needle.depth * num_lines) for needle in needles]
    depths = [place * haystack.line_tokens / used for place in places]
    return [*weave(haystack, 0, num_lines, places=places, parts=parts), *rest], depths
