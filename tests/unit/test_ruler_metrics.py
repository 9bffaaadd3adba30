"""RULER's scores against vectors worked by hand from its rules."""

import numpy as np
import pytest

from longrope2.evaluation.ruler.niah import (
    clean_answer,
    ruler_score,
    string_match_all,
    string_match_part,
    suite_score,
)
from longrope2.evaluation.samples import Sample


@pytest.mark.parametrize(
    ("answers", "text", "all_found", "any_found"),
    [
        (["1234567"], " 1234567.", 1.0, 1.0),
        (["1234567"], "12345678", 1.0, 1.0),  # a substring is enough
        (["1234567"], "1234 567", 0.0, 0.0),
        (["1234567"], "", 0.0, 0.0),
        (["AbC", "dEf"], "xx abc yy", 0.5, 1.0),  # case does not count
        (["a1", "b2", "c3", "d4"], "b2, c3, and d4", 0.75, 1.0),
        (["one", "one"], "one", 1.0, 1.0),  # RULER counts a repeated reference twice
        (["no"], "I do not know", 1.0, 1.0),  # its known defect
        (["new york"], "New\nYork", 0.0, 0.0),  # a newline is no space
        (["new\nyork"], "New\tYork", 1.0, 1.0),  # control characters are newlines
    ],
)
def test_match_vectors(answers, text, all_found, any_found):
    assert string_match_all(answers, text) == all_found
    assert string_match_part(answers, text) == any_found


def test_answers_are_cleaned_as_upstream_does():
    assert clean_answer("  a\x00b\x1f \n") == "a\nb"
    assert clean_answer("\x01a\x01") == "a"  # stripped again, once control characters are newlines
    assert clean_answer("caf\u00e9\x7f") == "caf\u00e9\x7f"  # 0x7f and above stay


def test_question_answering_takes_any_reference_and_the_others_all():
    sample = Sample(np.zeros(1, np.int32), ("Denver Broncos", "broncos"), 32)
    assert (
        ruler_score("qa_1", sample, "The Broncos.")
        == ruler_score("qa_2", sample, "The Broncos.")
        == 1.0
    )
    assert ruler_score("vt", sample, "The Broncos.") == 0.5


def test_a_tasks_score_is_the_mean_in_percent_with_two_decimals():
    assert suite_score([1, 0, 0]) == 33.33
    assert suite_score([0.8, 0.2, 1.0]) == 66.67
    assert suite_score([0.75] * 4) == 75.0
