"""Needle samples: exact to the token, one BOS, nothing cut, every sample from its own seed."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.needle_words import ADJECTIVES, NOUNS
from data_prep.needles import INSTRUCTION, build_needle_sample, build_needle_set, needle_wording
from data_prep.tokenization import DocumentTokenizer
from longrope2.errors import DataError

VALUE = "7654321"
TEXTS = [f"Text {n}. " + "plain words about nothing at all, again and again. " * 60 for n in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("models/tiny")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return DocumentTokenizer(tokenizer)


def built(encoder, length=128, depth=0.5, **options):
    haystack = np.asarray(encoder.encode(TEXTS[0]))
    return build_needle_sample(encoder, haystack, length=length, depth=depth, key="red-lamp", value=VALUE, **options)


def test_word_lists():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 60
        assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)


def test_wording_is_the_papers():
    wording = needle_wording("red-lamp", "7654321")
    assert wording.needle.strip() == "One of the special magic numbers for red-lamp is: 7654321."
    assert wording.answer_prefix == "The special magic number for red-lamp mentioned in the provided text is"


@pytest.mark.parametrize("length", [70, 128, 129, 500])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_sample_is_exact(encoder, length, depth):
    sample = built(encoder, length, depth)
    wording = needle_wording("red-lamp", "7654321")
    assert len(sample.tokens) == length
    assert sample.tokens[0] == encoder.bos_id and (sample.tokens == encoder.bos_id).sum() == 1
    assert encoder.decode(sample.through_value[sample.value_start :]) == " 7654321"
    assert sample.tokens[-1] == encoder.eos_id and (sample.tokens == encoder.eos_id).sum() == 1
    text = encoder.decode(sample.through_value[1:])
    assert text.startswith(INSTRUCTION) and text.endswith(wording.question + wording.answer_prefix + wording.answer)
    assert text.count(wording.needle) == 1
    start, count = sample.record["needle_start"], sample.record["num_needle_tokens"]
    assert encoder.decode(sample.tokens[start : start + count]) == wording.needle
    in_front = start - 1 - len(encoder.encode(INSTRUCTION))
    assert in_front == round(depth * int(sample.record["num_haystack_tokens"]))


def test_a_window_of_128_leaves_room_for_text(encoder):
    assert int(built(encoder).record["num_haystack_tokens"]) >= 30


def test_the_control_sample_differs_in_the_needle_only(encoder):
    sample, control = built(encoder), built(encoder, with_needle=False)
    assert len(control.tokens) == len(sample.tokens) and control.value_start == sample.value_start
    assert "special magic numbers for" not in encoder.decode(control.tokens)
    question = encoder.encode(needle_wording("red-lamp", "7654321").question)
    tail = sample.value_start - len(question)
    assert np.array_equal(control.tokens[tail:], sample.tokens[tail:])


def test_digits_are_single_tokens(encoder):
    assert len(encoder.encode(" 7654321")) == 8


@pytest.mark.parametrize(("options", "words"), [
    ({"depth": 1.5}, r"depth=1.5 is outside \[0, 1\]"),
    ({"length": 40}, "length=40 tokens is too short for a needle sample; at least 67"),
    ({"length": 4000}, "length=4000 needs 3933 haystack tokens"),
])  # fmt: skip
def test_impossible_samples_are_refused(encoder, options, words):
    with pytest.raises(DataError, match=words):
        built(encoder, **options)


def test_a_set_has_the_asked_lengths_depths_and_texts(tokenizer):
    needles = build_needle_set(tokenizer, TEXTS, length=200, depths=[0.0, 0.5, 1.0], num_samples=10, seed=4)
    assert needles.length == 200 and [s.depth for s in needles.samples[:4]] == [0.0, 0.5, 1.0, 0.0]
    # One text after the other: never all samples from one book.
    assert len({sample.record["texts"] for sample in needles.samples[:5]}) == 5
    assert len({sample.value for sample in needles.samples}) == 10
    assert all(re.fullmatch("[1-9][0-9]{6}", sample.value) for sample in needles.samples)


def test_samples_depend_on_seed_and_number_only(tokenizer):
    def tokens(seed, num_samples):
        built = build_needle_set(tokenizer, TEXTS, length=150, depths=[0.0], num_samples=num_samples, seed=seed)
        return [sample.tokens.tolist() for sample in built.samples]

    assert tokens(1, 3) == tokens(1, 6)[:3]
    assert tokens(1, 3) != tokens(2, 3)


def test_control_sets_share_keys_and_haystacks(tokenizer):
    arguments = {"length": 150, "depths": [0.0, 1.0], "num_samples": 4, "seed": 1}
    sets = [build_needle_set(tokenizer, TEXTS, **arguments, with_needle=flag) for flag in (True, False)]
    for sample, control in zip(sets[0].samples, sets[1].samples, strict=True):
        assert (sample.key, sample.value) == (control.key, control.value)
        assert sample.record["texts"] == control.record["texts"]


def test_short_texts_are_joined_and_recorded(tokenizer):
    needles = build_needle_set(tokenizer, TEXTS, length=2500, depths=[0.0], num_samples=2, seed=0)
    assert all(len(sample.record["texts"].split(",")) > 1 for sample in needles.samples)


def test_impossible_sets_are_refused(tokenizer):
    with pytest.raises(DataError, match="needs depths, haystack texts and samples; got 0, 5 and num_samples=2"):
        build_needle_set(tokenizer, TEXTS, length=200, depths=[], num_samples=2, seed=0)
    with pytest.raises(DataError, match="haystack tokens, only"):
        build_needle_set(tokenizer, TEXTS, length=20_000, depths=[0.0], num_samples=1, seed=0)
