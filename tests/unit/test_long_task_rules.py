"""Score rules of long tasks against vectors worked by hand from the upstream rules."""

import pytest

from longrope2.evaluation.long_tasks.rules import (
    choice_score,
    class_score,
    code_line_score,
    first_line,
    key_value_score,
    listed_ids,
    mrecall,
    recall,
    text_ratio,
    token_f1,
)

CLASSES = [
    "City",
    "Other location",
    "Other entity",
    "Abbreviation",
    "Definition of something",
    "Other number",
]


@pytest.mark.parametrize(
    ("text", "line"),
    [("\n\nParis\nis", "Paris"), ("Paris", "Paris"), ("", ""), ("\n", ""), (" \nx", " ")],
)
def test_first_line(text, line):
    assert first_line(text) == line


@pytest.mark.parametrize(
    ("text", "answer", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("the", "the", 0.0),  # only articles: no words at all
        ("Eiffel", "Eiffel Tower", 2 * 1 * 0.5 / 1.5),
        ("tower tower", "tower", 2 * 0.5 * 1 / 1.5),
        ("London", "Paris", 0.0),
        ("O'Brien", "obrien", 1.0),  # punctuation goes without a space
        ("another", "other", 0.0),  # an article inside a word stays
    ],
)
def test_token_f1(text, answer, f1):
    assert token_f1(text, answer) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answer", "classes", "score"),
    [
        ("City", "City", CLASSES, 1.0),
        ("City or Abbreviation", "City", CLASSES, 0.5),
        ("Abbreviation", "City", CLASSES, 0.0),
        ("nothing", "City", CLASSES, 0.0),
        # "Other" is part of "Other number": struck, one left.
        ("Other number", "Other number", ["Other", "Other number"], 1.0),
        # Two parts in a row: the first is struck, the second has moved up and is skipped; the right
        # one is third.
        ("Other number", "Other number", ["Other", "number", "Other number"], 0.5),
        # A part, the right one, a part: the first is struck, the right one is skipped, the last is
        # struck.
        ("Other number", "Other number", ["Other", "Other number", "number"], 1.0),
        ("city", "City", CLASSES, 0.0),  # case counts
    ],
)
def test_class_list_rule_with_its_skipped_entries(text, answer, classes, score):
    assert class_score(text, answer, classes) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("\n    return x\nmore", "    return x", 1.0),
        ("# a comment\n```python\nreturn x", "return x", 1.0),  # comment and fence are passed over
        ("x = 1  // set\ny", "y", 1.0),  # a trailing mark drops the whole line
        ("# only\n// comments", "x", 0.0),
        ("", "x", 0.0),
        ("\n\n\nx", "x", 1.0),
        ("x\n\ny", "", 0.0),
        # 2 * 4 matching characters / (4 + 6) characters = 0.8
        ("abcd", "abcdef", 0.8),
    ],
)
def test_first_line_of_code(text, answer, score):
    assert code_line_score(text, answer) == score


def test_ratio_is_rounded_to_an_integer():
    assert text_ratio("abc", "abd") == 67  # 2 * 2 / 6
    assert text_ratio("", "") == 100
    assert text_ratio("ab", "ba") == 50  # one matching block of one character: 2 * 1 / 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('"f5a0-11"', 1.0),
        ("value:f5a0-11.", 1.0),
        ("{f5a0-11}", 1.0),
        ("xf5a0-11", 0.0),
        ("f5a0-11x", 0.0),
        ("(f5a0-11)", 0.0),  # round brackets are no word border
        ("f5a0-1 1", 0.0),
        ("", 0.0),
    ],
)
def test_key_value_word_rule(text, score):
    assert key_value_score(text, "f5a0-11") == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("B. the hill", 1.0),
        (" B", 1.0),
        ("Bob went away", 1.0),  # the first character alone decides
        ("A because B", 0.0),
        ("The hill", 1.0),  # the whole text is the option
        ("the correct answer is: B", 1.0),
        ("the answer is B.", 1.0),
        ("the answer is: The hill", 1.0),
        ("the answer isB", 0.0),  # one character behind the phrase is skipped
        ("the answer is:", 0.0),
        ("the answer is C, not B", 0.0),
        ("so the option is B", 1.0),
        ("I think B fits", 1.0),
        ("I think C or B", 0.0),
        ("I say BC or B", 0.0),  # "BC" is a substring of ABCD, so it is taken, and is no label
        ("nothing here", 0.0),
        ("", 0.0),
        ("  ", 0.0),
    ],
)
def test_choice_cascade(text, score):
    assert choice_score(text, ["The hill", "B"]) == score


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("TITLE: X | ID: 4\nFinal Answer: ['4', '17']", ["4", "17"]),
        ("Final Answer: [4, 17]", ["4", "17"]),
        ("**Final Answer:** `[ 4 ]`", ["4"]),
        ("[1]\nFinal Answer: [2]", ["1"]),  # the first line with brackets, whatever it is
        ("Final Answer: [a]\nFinal Answer: [3]", []),  # not a literal: nothing, and no second try
        ("no brackets", []),
        ("] 5 [", []),
        ("['the devil's sleep', '5']", ["the devil's sleep", "5"]),
        ("Final Answer: [3] or [4]", []),  # from the first to the last bracket
        ("[1][0]", []),
        ("", []),
    ],
)
def test_bracket_parse(text, ids):
    assert listed_ids(text) == ids


def test_recall_and_mrecall():
    assert recall(["4", "5"], ["4"], 1) == 1.0
    assert recall(["5", "4"], ["4"], 1) == 0.0
    assert recall(["4"], ["4", "6"], 1) == 0.5
    assert recall([], ["4"], 1) == 0.0
    assert mrecall(["4", "6"], ["6", "4"], 2) == 1.0
    assert mrecall(["4", "7"], ["6", "4"], 2) == 0.0
    assert mrecall(["4", "7"], ["4"], 2) == 1.0  # one gold: one is all there is
    assert mrecall(["4", "6"], ["4", "6", "8"], 2) == 1.0
    assert mrecall(["4", "4"], ["6", "4"], 2) == 0.0
    assert mrecall([], ["4"], 2) == 0.0
