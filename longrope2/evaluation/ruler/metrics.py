"""RULER's two scores (arXiv 2404.06654): substrings, not case sensitive, all of the references or any of them."""

import re
from collections.abc import Sequence

from longrope2.evaluation.samples import Sample

__all__ = ["clean_answer", "ruler_score", "string_match_all", "string_match_part", "suite_score"]

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")
PART_TASKS = ("qa_1", "qa_2")


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
