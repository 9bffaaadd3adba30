"""Needle samples: exact to the token, one BOS, nothing cut, one seed each, all recorded."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document
from longrope2.corpora.haystacks import Haystack
from longrope2.corpora.needle_wording import (
    ADJECTIVES,
    INSTRUCTION,
    NOUNS,
    Wording,
    choose_wording,
    needle_wording,
)
from longrope2.corpora.needles import build_needle_sample, build_needle_set, guess_perplexity
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.segments.needle_set import NeedleSample, NeedleSet

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


def made_tokenizer(
    merges: list[tuple[str, str]], pre_tokenizer: pre_tokenizers.PreTokenizer, **options
):
    """One token for every printable ASCII character, and for what ``merges`` make of them."""
    pieces = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a", "\u2581", "\n"]
    pieces += dict.fromkeys(a + b for a, b in merges)
    model = BPE({piece: number for number, piece in enumerate(pieces)}, merges, **options)
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def bytes_split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words by a pattern, then bytes, as LLaMA 3 and Qwen have it."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


@pytest.fixture(scope="module")
def grouping():
    """Digits in groups of up to three, as in LLaMA 3, whose rule this is; no BOS."""
    digits = "0123456789"
    pairs = [(a, b) for a in digits for b in digits]
    triples = [(a + b, c) for a, b in pairs for c in digits]
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    return made_tokenizer(pairs + triples, bytes_split_by(words), ignore_merges=True)


def built(encoder, length=128, depth=0.5, **options):
    haystack = np.asarray(encoder.encode(TEXTS[0]))
    return build_needle_sample(
        encoder, haystack, length=length, depth=depth, key="red-lamp", value=VALUE, **options
    )


def test_word_lists():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 60
        assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)


def test_short_wording():
    """Needle and answer prefix are the paper's."""
    wording = needle_wording("red-lamp", "7654321")
    assert (wording.instruction, wording.answer) == (INSTRUCTION, " 7654321")
    assert wording.needle == "\nOne of the special magic numbers for red-lamp is: 7654321.\n"
    assert wording.question == "\nWhich number belongs to red-lamp?\n"
    assert (
        wording.answer_prefix
        == "The special magic number for red-lamp mentioned in the provided text is"
    )


def test_paper_wording():
    """As in the sample that Appendix C prints, line breaks at the needle's ends aside."""
    wording = needle_wording("numerous-kite", "6716097", Wording.paper)
    assert wording.instruction == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert wording.needle == "\nOne of the special magic numbers for numerous-kite is: 6716097.\n"
    assert wording.question + wording.answer_prefix + wording.answer == (
        "\nWhat is the special magic number for numerous-kite mentioned in the provided text? "
        "The special magic number for numerous-kite mentioned in the provided text is 6716097"
    )
    assert wording.question.endswith("text?") and wording.answer == " 6716097"


@pytest.mark.parametrize(
    ("asked", "original_len", "chosen"),
    [
        ("auto", 128, "short"), ("auto", 2047, "short"), ("auto", 2048, "paper"),
        ("auto", 8192, "paper"), ("short", 8192, "short"), ("paper", 128, "paper"),
    ],
)  # fmt: skip
def test_the_window_decides_what_auto_is(asked, original_len, chosen):
    assert choose_wording(Wording(asked), original_len) is Wording(chosen)


@pytest.mark.parametrize(
    ("length", "present", "digest"),
    [
        (128, True, "fb16e3e7e32fc04b68a7f96e86159056959a0466817928665773b666ab68ae16"),
        (128, False, "36bd9130aed9621e8a5ec8480867356911bf5776a53a386420fa4035418d86f4"),
        (3000, True, "61b2413fc83f28041c0901e186cded7cc7c7569ef5a1e5a7340c33fb8e123433"),
    ],
)
def test_short_samples_from_books_are_what_they_were(tokenizer, length, present, digest):
    """The miniature's searches and evaluations in README and lab notes are of these samples."""
    arguments = {"length": length, "depths": [0.0, 0.37, 1.0], "num_samples": 12, "seed": 3}
    needles = build_needle_set(tokenizer, TEXTS, **arguments, with_needle=present)
    all_bytes = b"".join(sample.tokens.astype("<i8").tobytes() for sample in needles.samples)
    assert hashlib.sha256(all_bytes).hexdigest() == digest


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
    sample: NeedleSample,
    books: list[Document],
    length: int,
    present: bool,
    tokenizer,
    wording: Wording = Wording.short,
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
    if wording is Wording.paper:
        head = ids(
            "A special magic number is hidden within the following text. Make sure to memorize "
            "it. I will quiz you about the number afterwards.\n"
        )
        asked = f"special magic number for {key} mentioned in the provided text"
        tail = ids(f"\nWhat is the {asked}? The {asked} is {value}")
    assert sample.record["wording"] == wording.value and sample.record["haystack"] == "books"
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
@pytest.mark.parametrize("wording", [Wording.short, Wording.paper])
def test_every_sample_can_be_rebuilt_from_its_record(tmp_path, tokenizer, length, present, wording):
    books = heldout_documents(pg19_folder(tmp_path))
    assert [b.doc_id for b in books][0] == "folder/v.parquet:0 A Long Book" and len(books) == 4
    arguments = {"length": length + 60, "depths": [0.0, 0.37, 1.0], "num_samples": 6, "seed": 3}
    if wording is Wording.short:
        arguments["length"] = length
    needles = build_needle_set(tokenizer, books, with_needle=present, wording=wording, **arguments)
    for sample in needles.samples:
        expected = rebuilt(sample, books, arguments["length"], present, tokenizer, wording=wording)
        assert sample.tokens.tolist() == expected
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


@pytest.mark.parametrize("haystack", list(Haystack))
@pytest.mark.parametrize("present", [True, False])
def test_needles_that_share_a_haystack(tokenizer, encoder, haystack, present):
    """Rebuilt by hand: all needles in order of depth, every sample exact, questions behind."""
    depths, length = [0.9, 0.1, 0.5], 700
    needles = build_needle_set(
        tokenizer,
        TEXTS,
        length=length,
        depths=depths,
        num_samples=6,
        seed=4,
        needles_per_haystack=3,
        with_needle=present,
        haystack=haystack,
    )
    alone = build_needle_set(tokenizer, TEXTS, length=length, depths=depths, num_samples=6, seed=4)
    assert [s.value for s in needles.samples] == [s.value for s in alone.samples]
    assert [len(s.tokens) for s in needles.samples] == [length] * 6
    for samples in needles.haystacks:
        texts = [needle_wording(sample.key, sample.value) for sample in samples]
        tails = [
            [
                *encoder.encode(t.question),
                *encoder.encode(t.answer_prefix),
                *encoder.encode(t.answer),
            ]
            for t in texts
        ]
        begin = min(length - len(tail) - 1 for tail in tails)
        common = samples[0].tokens[:begin].tolist()
        assert len({sample.key for sample in samples}) == 3
        for sample, tail in zip(samples, tails, strict=True):
            assert sample.tokens[:begin].tolist() == common
            assert sample.tokens.tolist()[-len(tail) - 1 :] == [*tail, encoder.eos_id]
            start, num = (sample.record[k] for k in ("needle_start", "num_needle_tokens"))
            hidden = encoder.decode(sample.tokens[start : start + num])
            assert hidden == (needle_wording(sample.key, sample.value).needle if present else "")
            assert abs(start / begin - sample.depth) < 0.12
        read = encoder.decode(common)
        places = [read.find(f"for {samples[n].key} is: {samples[n].value}.") for n in (1, 2, 0)]
        assert places == (sorted(places) if present else [-1, -1, -1])
        assert len(set(places)) == (3 if present else 1)


def test_needles_of_one_depth_stand_one_behind_the_other(tokenizer, encoder):
    options = {"length": 400, "depths": [0.0], "num_samples": 4, "needles_per_haystack": 4}
    samples = build_needle_set(tokenizer, TEXTS, seed=1, **options).samples
    start = len([*encoder.start_ids, *encoder.encode(INSTRUCTION)])
    for sample in samples:
        assert sample.record["needle_start"] == start
        start += sample.record["num_needle_tokens"]


def test_impossible_haystacks_are_refused(tokenizer):
    def refusal(**options):
        given = {"length": 400, "depths": [0.0], "num_samples": 4, "seed": 1, **options}
        with pytest.raises(DataError) as caught:
            build_needle_set(tokenizer, TEXTS, **given)
        return str(caught.value)

    for shared, keys in ((0, 4), (3, 4), (2, 1)):
        words = f"needles_per_haystack={shared} must be at least 1, divide num_samples=4, and be "
        words += f"at most num_keys={keys}"
        assert words in refusal(needles_per_haystack=shared, num_keys=keys)
    crowded = refusal(length=100, needles_per_haystack=4)
    assert re.search(
        r"length=100 tokens is too short for 4 needles in one haystack; at least \d+, or less with "
        "fewer needles per haystack$",
        crowded,
    )
    crowded = refusal(length=100, needles_per_haystack=4, wording=Wording.paper)
    assert crowded.endswith("or less with wording=short or fewer needles per haystack")


GREEN = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def nearest_sentence_end(tokenizer, depth: float, num_haystack: int) -> int:
    """Tokens of noise in front of the needle, by tokenizing every beginning that ends in a stop."""
    text = " ".join([GREEN] * (num_haystack // 20 + 1))
    stops = [0, *(match.end() for match in re.finditer(r"\.", text))]
    counts = [len(tokenizer.encode(text[:stop], add_special_tokens=False)) for stop in stops]
    wanted = round(depth * num_haystack)
    return min((n for n in counts if n <= num_haystack), key=lambda n: abs(n - wanted))


@pytest.mark.parametrize("kind", ["tokenizer", "grouping"])
@pytest.mark.parametrize("wording", [Wording.short, Wording.paper])
def test_in_noise_a_needle_stands_between_sentences(request, kind, wording):
    tokenizer = request.getfixturevalue(kind)
    encoder = DocumentTokenizer(tokenizer)
    depths = [0.0, 0.1, 0.5, 0.62, 1.0]
    arguments = {"depths": depths, "num_samples": 5, "seed": 4, "wording": wording}
    for length in (700, 901):
        arguments["length"] = length
        noise = build_needle_set(tokenizer, [], haystack=Haystack.noise, **arguments)
        in_books = build_needle_set(tokenizer, TEXTS, **arguments)
        for sample, in_book in zip(noise.samples, in_books.samples, strict=True):
            record = sample.record
            assert len(sample.tokens) == length and (record["haystack"], record["books"]) == (
                "noise",
                [],
            )
            assert (sample.key, sample.value) == (in_book.key, in_book.value)
            first = len(encoder.start_ids) + len(encoder.encode(record["instruction"]))
            cut = int(record["needle_start"]) - first
            num_haystack = int(record["num_haystack_tokens"])
            assert cut == nearest_sentence_end(tokenizer, sample.depth, num_haystack)
            start, count = int(record["needle_start"]), int(record["num_needle_tokens"])
            assert encoder.decode(sample.tokens[start : start + count]) == record["needle"]
            before = encoder.decode(sample.tokens[first:start])
            behind = encoder.decode(sample.tokens[start + count : first + count + num_haystack])
            assert before == "" or before.endswith(".")
            assert " ".join([GREEN] * 100).startswith(before + behind)
            rest = encoder.decode(sample.through_value[first + count + num_haystack :])
            assert rest == record["question"] + record["answer_prefix"] + f" {sample.value}"


def test_noise_of_131072_tokens_is_exact(tokenizer):
    arguments = {"length": 131072, "depths": [0.5], "num_samples": 1, "seed": 0}
    (sample,) = build_needle_set(
        tokenizer, [], haystack=Haystack.noise, wording=Wording.paper, **arguments
    ).samples
    assert len(sample.tokens) == 131072
    assert abs(int(sample.record["needle_start"]) - 65536) < 100


def test_control_sets_in_noise_differ_in_the_needle_only(tokenizer):
    arguments = {"length": 300, "depths": [0.5], "num_samples": 2, "seed": 1}
    for sample in build_needle_set(
        tokenizer, [], haystack=Haystack.noise, with_needle=False, **arguments
    ).samples:
        text = tokenizer.decode(sample.tokens)
        assert "special magic numbers for" not in text and sample.value in text


@pytest.mark.parametrize(
    ("joined", "options", "words"),
    [
        ((".", "\u0120"), {"haystack": Haystack.noise}, "joins the end of a sentence .*=books"),
        (("s", "\u0120"), {"wording": Wording.paper}, "joins ' is' and ' [0-9]{7}' in .*=short"),
    ],
)
def test_tokens_across_the_parts_are_refused(joined, options, words):
    tokenizer = made_tokenizer([joined], pre_tokenizers.ByteLevel(False, use_regex=False))
    with pytest.raises(DataError, match=words):
        build_needle_set(
            tokenizer, TEXTS, length=1500, depths=[0.5], num_samples=1, seed=0, **options
        )


def test_the_papers_question_has_no_doubled_spaces():
    """LLaMA 2's tokenizer puts a space in front of whatever it is given."""
    tokenizer = made_tokenizer([], pre_tokenizers.Metaspace(prepend_scheme="always", split=False))
    needles = build_needle_set(
        tokenizer, TEXTS, length=1500, depths=[0.5], num_samples=1, seed=0, wording=Wording.paper
    )
    (sample,) = needles.samples
    space, answer = "\u2581", tokenizer.convert_ids_to_tokens(sample.through_value[-8:].tolist())
    assert sample.value_start == 1491 and answer == [space, *sample.value]
    end = "".join(tokenizer.convert_ids_to_tokens(sample.through_value[-120:].tolist()))
    assert space * 2 not in end and end.endswith(f"text{space}is{space}{sample.value}")


def test_what_guessing_a_value_costs(tokenizer, grouping):
    """9,000,000 values are alike likely; all tokens of the value share that, its space too."""
    arguments = {"length": 900, "depths": [0.0], "num_samples": 40, "seed": 2}
    values_with_spaces = made_tokenizer(
        [("\u0120", digit) for digit in "123456789"] + [("1", "2"), ("34", "5"), ("3", "4")],
        pre_tokenizers.ByteLevel(False, use_regex=False),
    )
    for own, spot in ((tokenizer, 7.40083), (grouping, 54.7723), (values_with_spaces, None)):
        needles = build_needle_set(own, TEXTS, wording=Wording.short, **arguments)
        counts = [
            len(own.encode(f" {sample.value}", add_special_tokens=False))
            for sample in needles.samples
        ]
        assert all(
            len(sample.tokens) - 1 - sample.value_start == count
            for sample, count in zip(needles.samples, counts, strict=True)
        )
        # As a search counts it: the mean loss of all scored tokens.
        losses = []
        for count in counts:
            losses += [math.log(9e6) / count] * count
        assert guess_perplexity(needles) == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
        if spot is not None:
            assert guess_perplexity(needles) == pytest.approx(spot, rel=1e-5)
        else:
            assert 6 <= min(counts) < max(counts) == 7  # " 7" is a token, "12" another
    digits = [NeedleSample(np.arange(9), value_start=1, key="", value="", depth=0.0)]
    assert guess_perplexity(NeedleSet(digits, 9)) == pytest.approx(9.85061, rel=1e-6)


def test_guessing_needs_samples():
    with pytest.raises(DataError, match="a needle set without samples has no perplexity"):
        guess_perplexity(NeedleSet([], 100))
