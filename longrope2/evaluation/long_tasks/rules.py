"""The rules that score long tasks, as upstream has them, oddities included.

A different rule is a different benchmark.

Sources: LongBench v1 ``metrics.py`` and ``eval.py`` (arXiv 2308.14508), InfiniteBench
``compute_scores.py`` (arXiv 2402.13718), LOFT ``utils.py`` and ``evaluation/retrieval.py`` (arXiv
2406.13121). Every rule is tested against vectors worked by hand.
"""

import ast
import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COMMENT_MARK = re.compile("`|#|//")
CHOICES = "ABCD"
_ANSWER_PHRASES = ("answer is:", "answer:", "answer is", "option is")
_INNER_QUOTE = re.compile(r"([a-zA-Z0-9])'([a-zA-Z0-9])")


def first_line(text: str) -> str:
    """What TREC and TriviaQA score: the first line after leading line feeds."""
    return text.lstrip("\n").split("\n")[0]


def token_f1(text: str, answer: str) -> float:
    """F1 of the words, after lower case and without punctuation and articles."""
    words, wanted = _normal_words(text), _normal_words(answer)
    common = sum((Counter(words) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recalled = common / len(words), common / len(wanted)
    return 2 * precision * recalled / (precision + recalled)


def class_score(text: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of class names found in the text, if the right one is among them.

    A found name that is part of the right one is struck off. Upstream strikes while it walks the
    same list, so the name behind each struck one is never looked at; that stays.
    """
    found = [name for name in classes if name in text]
    position = 0
    while position < len(found):
        name = found[position]
        if name in answer and name != answer:
            found.remove(name)
        position += 1
    return 1.0 / len(found) if answer in found else 0.0


def code_line_score(text: str, answer: str) -> float:
    """Similarity of the first line without a backtick, ``#`` or ``//`` to the right one."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not _COMMENT_MARK.search(line)), "")
    return text_ratio(line, answer) / 100


def text_ratio(first: str, second: str) -> int:
    """Similarity, 0 to 100, as fuzzywuzzy has it without python-Levenshtein: difflib, rounded."""
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


def key_value_score(text: str, value: str) -> float:
    """Whether the value stands in the text as a word of its own."""
    for mark in "\n:\"'.,?!{}":
        text = text.replace(mark, " ")
    return float(value in text.split())


def choice_score(text: str, labels: Sequence[str]) -> float:
    """Multiple choice: the right option's text and its letter are ``labels``.

    Decides by the first character, else the whole text, else what follows an answer phrase, else
    a lone letter.
    """
    text = text.strip()
    if not text:
        return 0.0
    if text[0] in CHOICES:
        return float(text[0] in labels)
    if text in labels:
        return 1.0
    for mark in "\n\"'.,?!{}":
        text = text.replace(mark, " ")
    text = re.sub(" {2,}", " ", text)
    for phrase in _ANSWER_PHRASES:
        place = text.find(phrase)
        if place >= 0:
            # One character, a space as a rule, is skipped behind the phrase; a text that ends there
            # is wrong.
            return float(any(text[place + len(phrase) + 1 :].startswith(label) for label in labels))
    # Substring test, as upstream: "AB" counts as a letter, and is then no label.
    return float(next((word in labels for word in text.split() if word in CHOICES), False))


def listed_ids(text: str) -> list[str]:
    """The ids of the first line that holds both brackets; none where they are no list."""
    for line in text.replace("*", "").replace("`", "").strip().split("\n"):
        if "[" in line and "]" in line:
            listed = line[line.find("[") : line.rfind("]") + 1].strip()
            return [str(item).strip() for item in _parsed(_INNER_QUOTE.sub(r"\1\\'\2", listed))]
    return []


def recall(found: Sequence[str], wanted: Sequence[str], k: int) -> float:
    """Share of the wanted ids among the first k found."""
    return len(set(found[:k]) & set(wanted)) / len(wanted)


def mrecall(found: Sequence[str], wanted: Sequence[str], k: int) -> float:
    """1 when the first k found hold as many wanted ids as they can (arXiv 2104.08445), else 0."""
    return float(bool(found) and len(set(found[:k]) & set(wanted)) == min(k, len(wanted)))


def _normal_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _parsed(listed: str) -> list[Any]:
    """A Python list literal; anything else holds no ids."""
    try:
        value = ast.literal_eval(listed)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) else []
