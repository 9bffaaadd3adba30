"""What NVIDIA/RULER@c3f5e3b generates, draw by draw: the same seed gives the same prompts.

Its draws come from one global stream of Python's generator (and one of NumPy's, for numbers of
variable tracking), sample after sample; some shuffles start a fresh generator from the seed every
time, so their permutation is the same in every sample. Known defects are kept: distractor keys may
repeat the queried key; the document that answers stands at one place in all samples; lists have one
permutation; the singular is made by replacing letters.

Prompts, essays and words are read from a checkout, which is not run, and from wonderwords. The
prompts must be the known ones: RULER changed them before, and that makes another benchmark.
"""

import ast
import hashlib
import importlib.util
import json
import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.corpora.haystacks import NOISE
from longrope2.errors import ArtifactError, DataError
from longrope2.evaluation.ruler.niah import NiahTask
from longrope2.evaluation.ruler.qa import QuestionSet

_DATA_FOLDER = Path("scripts/data/synthetic")
# First 16 hexadecimal digits of the SHA-256 of template and answer prefix, NVIDIA/RULER@c3f5e3b
# (2026-07-22).
PROMPT_SHA256 = {
    "niah": ("b373c00e238df12b", "994f3a46e763414f"),
    "variable_tracking": ("fcfaf2eab2bc3e35", "4a4e9010ec4141a3"),
    "common_words_extraction": ("45fff5d17627b65a", "8ee526599bbc7372"),
    "freq_words_extraction": ("a0c7b873cf500d6c", "9a72271c5762c96d"),
    "qa": ("18a659c9723f24f1", "255204f061d7e266"),
}
_WORD_FILES = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
_DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
_EXAMPLE_VALUE = "12345"
_NUM_COMMON, _NUM_HOPS = 10, 4
Text = tuple[str, list[str]]
"""A prompt and its answers."""


@dataclass(frozen=True)
class UpstreamWords:
    """Pairs for keys, words to count, and the list that RULER takes for more than those."""

    pairs: list[str]
    words: list[str]
    further_words: list[str]


def read_prompts(checkout: Path, around: Callable[[str], str] = str) -> dict[str, str]:
    """Template and answer prefix, joined, of each of RULER's five generators.

    ``around`` puts a template into that of a chat model, which the answer's prefix follows.

    Raises:
        DataError: no such file, or one without the prompts.
        ArtifactError: a prompt is not the known one; names it with both hashes.
    """
    path = checkout / _DATA_FOLDER / "constants.py"
    if not path.is_file():
        fault = f"ruler.upstream_checkout={checkout} holds no {_DATA_FOLDER}/constants.py"
        raise DataError(f"{fault}; give a checkout of github.com/NVIDIA/RULER")
    tasks = literal_of(path, "TASKS")
    prompts = {}
    for name, expected in PROMPT_SHA256.items():
        try:
            parts = tasks[name]["template"], tasks[name]["answer_prefix"]
        except (KeyError, TypeError):
            fault = f"{path}: TASKS has no template and answer_prefix of {name}"
            raise DataError(f"{fault}; use RULER of 2025-06 or later") from None
        for part, field, known in zip(parts, ("template", "answer_prefix"), expected, strict=True):
            found = hashlib.sha256(part.encode()).hexdigest()[:16]
            if found != known:
                fault = f"{path}: the {field} of {name} is not RULER's"
                hashes = f"SHA-256 {found}..., expected {known}..."
                way_out = "check out an unchanged NVIDIA/RULER, or use mode=fixed"
                raise ArtifactError(f"{fault} ({hashes}); {way_out}")
        prompts[name] = around(parts[0]) + parts[1]
    return prompts


def read_upstream_essays(checkout: Path, essays: str | None) -> str:
    """Text of the essays: ``ruler.essays``, else what RULER's own download left in the checkout.

    Raises:
        DataError: neither is there.
    """
    path = Path(essays or checkout / _DATA_FOLDER / "json" / "PaulGrahamEssays.json")
    if not path.is_file():
        script = "download_paulgraham_essay.py in the checkout"
        way_out = f"run {script}, or give the file as ruler.essays"
        raise DataError(f"mode=upstream needs RULER's essays: {path} is not there; {way_out}")
    return str(json.loads(path.read_text(encoding="utf-8"))["text"])


def read_upstream_words(checkout: Path, wordlists: str | None) -> UpstreamWords:
    """Word lists of wonderwords (a folder, or the installed package) and of the checkout.

    Raises:
        DataError: a list is missing.
    """
    folder = Path(wordlists) if wordlists is not None else _installed_lists()
    lists = []
    for name in _WORD_FILES:
        if not (folder / name).is_file():
            way_out = "give the folder of wonderwords' word lists"
            raise DataError(f"ruler.wordlists={folder} holds no {name}; {way_out}")
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        lists.append([line.rstrip() for line in lines])
    nouns, adjectives, verbs = lists
    further = checkout / _DATA_FOLDER / "json" / "english_words.json"
    if not further.is_file():
        missing = further.relative_to(checkout)
        raise DataError(f"ruler.upstream_checkout={checkout} holds no {missing}")
    return UpstreamWords(
        pairs=sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns}),
        words=sorted({*nouns, *adjectives, *verbs}),
        further_words=list(json.loads(further.read_text(encoding="utf-8")).values()),
    )


def literal_of(path: Path, name: str) -> dict[str, Any]:
    """The dictionary that a Python file assigns to ``name``; the file is not run.

    Raises:
        DataError: it cannot be read, or has no such dictionary.
    """
    try:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                    return dict(ast.literal_eval(value))
    except (SyntaxError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    raise DataError(f"{path} defines no {name}; give a checkout of github.com/NVIDIA/RULER")


def _installed_lists() -> Path:
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        way_out = "`pip install wonderwords==3.0.1`, or give ruler.wordlists"
        raise DataError(f"mode=upstream needs the word lists of wonderwords: {way_out}")
    return Path(next(iter(spec.submodule_search_locations))) / "assets"


class Streams:
    """The two generators of a run of RULER, and the seed that both started from."""

    def __init__(self, seed: int) -> None:
        self.seed, self.python = seed, random.Random(seed)
        self.numpy = np.random.RandomState(seed)

    def reshuffle(self, items: list) -> None:
        """The shuffle that is the same every time."""
        random.Random(self.seed).shuffle(items)

    def word(self, alphabet: str, letters: int) -> str:
        """Random letters."""
        return "".join(self.python.choices(alphabet, k=letters))


def needles(
    task: NiahTask,
    template: str,
    streams: Streams,
    size: int,
    words: UpstreamWords | None,
    essay: Sequence[str],
    sentences_of: Callable[[str], list[str]],
) -> Text:
    """Needles among ``size`` words of essay, lines of noise, or other needles."""

    def draw(kind: str) -> str:
        if kind == "numbers":
            return str(streams.python.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=streams.python.getrandbits(128), version=4))
        assert words is not None
        return streams.python.choice(words.pairs)

    def needle(key: str, value: str) -> str:
        return f"One of the special magic {task.values} for {key} is: {value}."

    keys, values, hidden = [], [], []
    for _ in range(task.num_keys):
        keys.append(draw(task.keys))
        values.append([draw(task.values) for _ in range(task.num_values)])
        hidden += [needle(keys[-1], value) for value in values[-1]]
    streams.reshuffle(hidden)
    if task.haystack == "essay":
        context = _in_essay(hidden, sentences_of, streams, essay=essay, size=size)
    else:
        lines = [NOISE] * size
        if task.haystack == "needle":
            lines = [needle(draw(task.keys), draw(task.values)) for _ in range(size)]
        places = sorted(streams.python.sample(range(size), len(hidden)), reverse=True)
        for place, line in zip(places, hidden, strict=True):
            lines.insert(place, line)
        context = "\n".join(lines)
    indices = streams.python.sample(range(task.num_keys), task.num_queries)
    queries = [keys[index] for index in indices]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    kind = task.values
    if task.num_queries * task.num_values == 1:
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template = template.replace(old, new)
        kind = kind[:-1]
    text = template.format(type_needle_v=kind, context=context, query=query)
    return text, [value for index in indices for value in values[index]]


def _in_essay(
    hidden: list[str],
    sentences_of: Callable[[str], list[str]],
    streams: Streams,
    essay: Sequence[str],
    size: int,
) -> str:
    """Needles between the sentences of the first ``size`` words, at depths drawn from forty."""
    words = [essay[number % len(essay)] for number in range(size)]
    sentences = sentences_of(" ".join(words).strip())
    depths = streams.python.sample(_DEPTHS, len(hidden))
    places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts = []
    for number in range(1, len(places)):
        parts.append(" ".join(sentences[places[number - 1] : places[number]]))
        parts += hidden[number - 1 : number]
    return " ".join(parts)


def variables(template: str, streams: Streams, size: int, *, example: bool) -> Text:
    """One chain of assignments among ``size`` lines of noise."""
    letters = 3 if example else 5
    names: list[str] = []
    while len(set(names)) < _NUM_HOPS + 1:
        names.append(streams.word(string.ascii_uppercase, letters))
    value, chain = "", []
    # More than one group only after a repeated name.
    for first in range(0, len(names), _NUM_HOPS + 1):
        group = names[first : first + _NUM_HOPS + 1]
        drawn = _EXAMPLE_VALUE if example else str(streams.numpy.randint(10_000, 99_999))
        value = value or drawn
        hops = [f"VAR {group[j + 1]} = VAR {group[j]} " for j in range(_NUM_HOPS)]
        chain.append([f"VAR {group[0]} = {drawn}", *hops])
    lines = [NOISE] * size
    for statements in chain:
        places = sorted(streams.python.sample(range(len(lines)), len(statements)))
        for offset, (place, statement) in enumerate(zip(places, statements, strict=True)):
            lines.insert(place + offset, statement)
    context = "\n".join(lines).replace(". \n", ".\n")
    text = template.format(context=context, query=value, num_v=_NUM_HOPS + 1)
    return text, names[: _NUM_HOPS + 1]


def with_example(text: str, example: str, streams: Streams, head: str = "") -> str:
    """The solved example, with new names and a new value, in front of a prompt, behind ``head``."""
    for name in example.strip().split()[-_NUM_HOPS - 1 :]:
        example = example.replace(name, streams.word(string.ascii_uppercase, len(name)))
    example = example.replace(_EXAMPLE_VALUE, str(streams.numpy.randint(10_000, 99_999)))
    return f"{head}{example}\n{text.removeprefix(head)}"


def common_words(
    template: str, streams: Streams, size: int, words: list[str], further: list[str], length: int
) -> Text:
    """A numbered list of ``size`` different words behind a solved example."""

    def listed(count: int, often: int, seldom: int) -> Text:
        drawn = streams.python.sample(words if count <= len(words) else further, count)
        entries = drawn[:_NUM_COMMON] * often + drawn[_NUM_COMMON:] * seldom
        streams.reshuffle(entries)
        return _numbered(entries), drawn[:_NUM_COMMON]

    short = length < 4096
    example, solved = listed(20, 3, 1) if short else listed(40, 10, 3)
    context, answers = listed(size, 6, 1) if short else listed(size, 30, 3)
    shot = template.format(num_cw=_NUM_COMMON, context=example, query="")
    text = template.format(num_cw=_NUM_COMMON, context=context, query="")
    return f"{shot} {_numbered(solved)}\n{text}", answers


def _numbered(words: list[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, start=1))


def coded_words(
    template: str, streams: Streams, vocabulary_size: int
) -> tuple[Callable[[int], str], list[str]]:
    """A drawn vocabulary, as a function from a number of words to the prompt; and the answers."""
    drawn: set[str] = set()
    while len(drawn) < vocabulary_size:
        drawn.add(streams.word(string.ascii_lowercase, 6))
    vocabulary = sorted(drawn)
    streams.reshuffle(vocabulary)
    vocabulary[0] = "..."

    def text(num_words: int) -> str:
        ranks = np.arange(1, len(vocabulary) + 1)
        counts = (num_words * (ranks**-2.0) / (math.pi**2 / 6)).astype(int)
        entries = np.repeat(vocabulary, counts).tolist()
        streams.reshuffle(entries)
        return template.format(context=" ".join(entries), query="")

    return text, vocabulary[1:4]


def documents(
    template: str, streams: Streams, questions: QuestionSet, index: int, size: int
) -> Text:
    """Question ``index`` with ``size`` documents."""
    question = questions.questions[index]
    if size < len(questions.documents):
        own, related = list(question.given), list(question.related)
        if size - len(own) > len(related):
            taken = {*own, *related}
            others = [number for number in range(len(questions.documents)) if number not in taken]
            count = size - len(own) - len(related)
            numbers = own + related + streams.python.sample(others, count)
        else:
            numbers = own + streams.python.sample(related, size - len(own))
        texts = [questions.documents[number] for number in numbers]
    else:
        texts = [questions.documents[n % len(questions.documents)] for n in range(size)]
    streams.reshuffle(texts)
    context = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(texts, start=1))
    return template.format(context=context, query=question.text), list(question.answers)
