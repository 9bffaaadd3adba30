"""Needle samples: exact to the token, one BOS, nothing cut, one seed each, all recorded."""

import hashlib
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document
from longrope2.corpora.needles import (
    ADJECTIVES,
    INSTRUCTION,
    NOUNS,
    build_needle_sample,
    build_needle_set,
    needle_wording,
)
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.segments.needle_set import NeedleSample

VALUE = "7654321"
TEXTS = [
    f"Text {n}. " + "plain words about nothing at all, again and again. " * 60 for n in range(5)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("models/tiny")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return DocumentTokenizer(tokenizer)


def built(encoder, length=128, depth=0.5, **options):
    haystack = np.asarray(encoder.encode(TEXTS[0]))
    return build_needle_sample(
        encoder, haystack, length=length, depth=depth, key="red-lamp", value=VALUE, **options
    )


def test_word_lists():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 60
        assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)


def test_wording_is_the_papers():
    wording = needle_wording("red-lamp", "7654321")
    assert wording.needle.strip() == "One of the special magic numbers for red-lamp is: 7654321."
    assert (
        wording.answer_prefix
        == "The special magic number for red-lamp mentioned in the provided text is"
    )


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
    assert text.startswith(INSTRUCTION) and text.endswith(
        wording.question + wording.answer_prefix + wording.answer
    )
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 1.5}, r"depth=1.5 is outside \[0, 1\]"),
        ({"length": 40}, "length=40 tokens is too short for a needle sample; at least 67"),
        ({"length": 4000}, "length=4000 needs 3933 haystack tokens"),
    ],
)
def test_impossible_samples_are_refused(encoder, options, words):
    with pytest.raises(DataError, match=words):
        built(encoder, **options)


def test_a_set_has_the_asked_lengths_depths_and_texts(tokenizer):
    needles = build_needle_set(
        tokenizer, TEXTS, length=200, depths=[0.0, 0.5, 1.0], num_samples=10, seed=4
    )
    assert needles.length == 200 and [s.depth for s in needles.samples[:4]] == [0.0, 0.5, 1.0, 0.0]
    # One text after the other: never all samples from one book.
    assert len({sample.record["books"][0]["id"] for sample in needles.samples[:5]}) == 5
    assert len({sample.value for sample in needles.samples}) == 10
    assert all(re.fullmatch("[1-9][0-9]{6}", sample.value) for sample in needles.samples)


def test_samples_depend_on_seed_and_number_only(tokenizer):
    def tokens(seed, num_samples):
        built = build_needle_set(
            tokenizer, TEXTS, length=150, depths=[0.0], num_samples=num_samples, seed=seed
        )
        return [sample.tokens.tolist() for sample in built.samples]

    assert tokens(1, 3) == tokens(1, 6)[:3]
    assert tokens(1, 3) != tokens(2, 3)


def test_control_sets_share_keys_and_haystacks(tokenizer):
    arguments = {"length": 150, "depths": [0.0, 1.0], "num_samples": 4, "seed": 1}
    sets = [
        build_needle_set(tokenizer, TEXTS, **arguments, with_needle=flag) for flag in (True, False)
    ]
    for sample, control in zip(sets[0].samples, sets[1].samples, strict=True):
        assert (sample.key, sample.value) == (control.key, control.value)
        ranges = [
            [(b["id"], b["first_token"]) for b in s.record["books"]] for s in (sample, control)
        ]
        assert ranges[0] == ranges[1]


def rebuilt(
    sample: NeedleSample, books: list[Document], length: int, present: bool, tokenizer
) -> list[int]:
    """The sample's ids from its record and the books alone, by the tokenizer of transformers."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    texts, haystack = {book.doc_id: book.text for book in books}, []
    for book in sample.record["books"]:
        text = texts[book["id"]]
        assert book["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert book["num_tokens"] >= 1
        haystack += ids(text)[book["first_token"] : book["first_token"] + book["num_tokens"]]
    key, value = sample.key, sample.value
    needle = ids(f"\nOne of the special magic numbers for {key} is: {value}.\n") if present else []
    tail = ids(f"\nWhich number belongs to {key}?\n")
    tail += ids(f"The special magic number for {key} mentioned in the provided text is") + ids(
        f" {value}"
    )
    head = ids(INSTRUCTION)
    cut = round(sample.depth * len(haystack))
    assert len(haystack) == length - 2 - len(head) - len(needle) - len(tail)
    whole = [*head, *haystack[:cut], *needle, *haystack[cut:], *tail]
    return [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]


def pg19_folder(folder):
    """A parquet file like the PG19 mirror's: one book longer than 3,000 tokens, others shorter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [
        f"Chapter {n}. " + f"It was the {n}th of many plain days, \u00e9t\u00e9 and all. " * r
        for n, r in enumerate((400, 20, 45, 70))
    ]
    titles = ["A Long Book", "A Short Book", "Essays", "Letters"]
    pq.write_table(
        pa.table({"short_book_title": titles, "publication_date": [1890] * 4, "text": texts}),
        folder / "v.parquet",
    )
    return CorpusConfig(
        name="pg19",
        kind=CorpusKind.folder,
        folder=str(folder),
        title_field="short_book_title",
        heldout_fraction=1.0,
    )


@pytest.mark.parametrize("length", [128, 700, 3000])
@pytest.mark.parametrize("present", [True, False])
def test_every_sample_can_be_rebuilt_from_its_record(tmp_path, tokenizer, length, present):
    books = heldout_documents(pg19_folder(tmp_path))
    assert [b.doc_id for b in books][0] == "folder/v.parquet:0 A Long Book" and len(books) == 4
    depths = [0.0, 0.37, 1.0]
    needles = build_needle_set(
        tokenizer, books, length=length, depths=depths, num_samples=6, seed=3, with_needle=present
    )
    for sample in needles.samples:
        assert sample.tokens.tolist() == rebuilt(sample, books, length, present, tokenizer)
    if length == 3000:
        assert max(len(sample.record["books"]) for sample in needles.samples) > 1


def test_keys_differ_as_much_as_asked(tokenizer):
    def keys(num_samples, num_keys=None):
        arguments = {
            "length": 128,
            "depths": [0.0],
            "num_samples": num_samples,
            "seed": 5,
            "num_keys": num_keys,
        }
        samples = build_needle_set(tokenizer, TEXTS, **arguments).samples
        assert len({sample.value for sample in samples}) == num_samples
        return [sample.key for sample in samples]

    many = keys(150)  # drawn freely, two of 150 keys would probably agree
    assert len(set(many)) == 150 and keys(4) == many[:4]
    assert keys(5, 2) == [many[0], many[1], many[0], many[1], many[0]]
    assert keys(3, 3) == many[:3]


def test_the_record_beside_the_frozen_samples(tmp_path, tokenizer):
    needles = build_needle_set(tokenizer, TEXTS, length=700, depths=[0.5], num_samples=2, seed=0)
    needles.save(tmp_path / "needles.arrow")
    record = json.loads((tmp_path / "needles.json").read_text(encoding="utf-8"))
    assert (record["length"], record["num_samples"], len(record["samples"])) == (700, 2, 2)
    for sample, written in zip(needles.samples, record["samples"], strict=True):
        assert (written["key"], written["value"], written["depth"]) == (
            sample.key,
            sample.value,
            0.5,
        )
        assert (
            written["tokens_sha256"]
            == hashlib.sha256(sample.tokens.astype("<i8").tobytes()).hexdigest()
        )
        assert (
            written["value_start"] == sample.value_start
            and written["books"] == sample.record["books"]
        )
        assert written["books"][0]["text_sha256"] in {
            hashlib.sha256(t.encode()).hexdigest() for t in TEXTS
        }


def test_impossible_sets_are_refused(tokenizer):
    with pytest.raises(
        DataError, match="needs depths, books and samples; got 0, 5 and num_samples=2"
    ):
        build_needle_set(tokenizer, TEXTS, length=200, depths=[], num_samples=2, seed=0)
    for num_keys in (0, len(ADJECTIVES) * len(NOUNS) + 1):
        with pytest.raises(
            DataError,
            match=rf"num_keys={num_keys} .* must be from 1 to {len(ADJECTIVES) * len(NOUNS)}",
        ):
            build_needle_set(
                tokenizer, TEXTS, length=200, depths=[0.0], num_samples=2, seed=0, num_keys=num_keys
            )
    with pytest.raises(DataError, match="haystack tokens, only"):
        build_needle_set(tokenizer, TEXTS, length=20_000, depths=[0.0], num_samples=1, seed=0)
