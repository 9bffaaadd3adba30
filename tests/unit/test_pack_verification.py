"""Every rule of the format, broken once."""

import dataclasses

import numpy as np
import pytest

from longrope2.errors import DataError
from longrope2.rope.factors import Window
from longrope2.segments.format import Segment, SegmentRules, check_segment

RULES = SegmentRules(target_len=12, original_len=6, alignment=2, vocab_size=100, bos_id=1, eos_id=2)


def segment(tokens, ends, *, window=Window.SHORT, padding=(), mid=False, num_padding=0):
    count = len(ends)
    return Segment(
        index=7,
        window=window,
        tokens=np.asarray(tokens, dtype=np.uint16),
        doc_ends=np.asarray(ends, dtype=np.int32),
        sources=("s",) * count,
        doc_ids=("d",) * count,
        doc_is_padding=tuple(map(bool, padding)) or (False,) * count,
        starts_mid_document=mid,
        num_padding=num_padding,
    )


GOOD_SHORT = segment(
    [1, 5, 5, 2, 1, 2, 1, 5, 5, 2, 2, 2], [4, 6, 10, 12], padding=(0, 0, 0, 1), num_padding=2
)
GOOD_LONG = segment([5, 5, 1, 5, 5, 2, 1, 5, 5, 5, 5, 5], [2, 6, 12], window=Window.LONG, mid=True)


@pytest.mark.parametrize("good", [GOOD_SHORT, GOOD_LONG])
def test_good_segments_pass(good):
    check_segment(good, RULES)


def test_one_id_for_bos_and_eos_is_fine():
    rules = dataclasses.replace(RULES, bos_id=1, eos_id=1)
    check_segment(segment([1, 5, 5, 1, 1, 1, 1, 5, 5, 5, 5, 1], [4, 6, 12]), rules)


def test_control_ids_stand_nowhere_inside():
    rules = dataclasses.replace(RULES, control_ids=(1, 2, 7))
    check_segment(GOOD_LONG, rules)
    for place in (1, 3, 11):  # inside, and at the end of a document that is cut there
        tokens = GOOD_LONG.tokens.copy()
        tokens[place] = 7
        with pytest.raises(
            DataError, match=f"the control id 7 stands inside a document .* at {place}"
        ):
            check_segment(dataclasses.replace(GOOD_LONG, tokens=tokens), rules)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (segment([1, 5, 5, 2], [4]), "4 tokens"),
        (segment([1, 5, 5, 2, 1, 2, 1, 5, 5, 2, 2, 2], [4, 6, 10, 10, 12]), "empty document"),
        (
            segment([1, 5, 5, 2, 1, 2, 1, 5, 5, 2, 2, 2], [4, 6, 10, 12], padding=(0, 0, 1)),
            "differ in number",
        ),
        (segment([1, 5, 500, 2, 1, 2, 1, 5, 5, 5, 5, 2], [4, 6, 12]), "outside the vocabulary"),
        (dataclasses.replace(GOOD_SHORT, num_padding=1), "num_padding is 1"),
        (
            segment([1, 5, 5, 5, 5, 5, 2, 1, 5, 5, 5, 2], [7, 12]),
            "a document of 7 tokens, longer than original_len=6",
        ),
        (dataclasses.replace(GOOD_SHORT, starts_mid_document=True), "mid-document"),
        (segment([1, 5, 5, 2, 1, 5, 5, 2, 1, 5, 5, 2], [4, 8, 12]), "crosses a multiple of 6"),
        (dataclasses.replace(GOOD_SHORT, window=Window.LONG), "padding in a long segment"),
        (segment([5, 5, 5, 2, 1, 2, 1, 5, 5, 5, 5, 2], [4, 6, 12]), "does not start with BOS"),
        (segment([1, 5, 5, 5, 1, 2, 1, 5, 5, 5, 5, 2], [4, 6, 12]), "does not end with EOS"),
        (
            segment([1, 5, 5, 2, 1, 5, 1, 5, 5, 5, 5, 2], [4, 6, 12], window=Window.LONG),
            "does not end with EOS",
        ),
        (segment([1, 2, 5, 2, 1, 2, 1, 5, 5, 5, 5, 2], [4, 6, 12]), "inside a document"),
    ],
)
def test_broken_rules_are_named(bad, words):
    with pytest.raises(DataError, match=words) as caught:
        check_segment(bad, RULES)
    assert "segment 7" in str(caught.value)


def test_documents_that_start_with_nothing():
    rules = dataclasses.replace(RULES, bos_id=None, control_ids=(1, 2))
    tokens, ends = [5, 5, 2, 2, 6, 2, 5, 5, 2, 2, 2, 2], [3, 4, 6, 9, 12]
    check_segment(segment(tokens, ends, padding=(0, 0, 0, 0, 1), num_padding=3), rules)
    check_segment(
        segment([5, 2, 5, 5, 2, 5, 5, 5, 5, 5, 5, 5], [2, 5, 12], window=Window.LONG, mid=True),
        rules,
    )
    for tokens in ([1, 5, 5, 5, 5, 2], [2, 5, 5, 5, 5, 2]):
        with pytest.raises(DataError, match="control id . stands inside a document .* at 0"):
            check_segment(segment([*tokens, 5, 5, 5, 5, 5, 2], [6, 12]), rules)
