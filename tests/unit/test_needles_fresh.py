"""Fresh needle samples: text and keys that the samples of a search do not have."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longrope2.corpora.corpus import Document
from longrope2.corpora.haystacks import build_texts, halve_documents
from longrope2.corpora.needle_wording import ADJECTIVES, NOUNS
from longrope2.corpora.needles import build_needle_set
from longrope2.errors import DataError
from longrope2.model.loading import load_tokenizer

TINY = Path(__file__).parents[2] / "models" / "tiny"

TEXTS = [f"Text {n}. " + "plain words about nothing at all. " * 40 for n in range(5)]


def document(name: str, text: str) -> Document:
    return Document(name, text, "source", "domain")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_halves_share_no_text(seed):
    sizes = (5, 900, 3000, 41, 260, 1777)
    books = [document(f"book {n}", f"{n} one two\n" * size) for n, size in enumerate(sizes)]
    first, second = halve_documents(books, seed)
    assert (first, second) == halve_documents(books, seed)
    total = sum(len(book.text) for book in books)
    assert abs(sum(len(book.text) for book in first) - total / 2) < 20  # lines of ten characters
    found: dict[str, str] = {}
    for part in [*first, *second]:
        name = part.doc_id.removesuffix(" part 1 of 2").removesuffix(" part 2 of 2")
        found[name] = found.get(name, "") + part.text
        assert part.text.endswith("\n") and (part.source, part.domain) == ("source", "domain")
    assert found == {book.doc_id: book.text for book in books}
    cut = [part.doc_id for part in (*first, *second) if "part" in part.doc_id]
    assert cut == [cut[0], cut[0].replace("1 of 2", "2 of 2")]
    assert (first[-1].doc_id, second[0].doc_id) == tuple(cut)


def test_halves_depend_on_the_seed():
    books = [document(str(n), f"text {n} " * 50) for n in range(12)]
    found = {tuple(part.doc_id for part in halve_documents(books, seed)[0]) for seed in range(6)}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("x" * 4960 + " " + "x" * 2 + "\n" + "x" * 5036, 4964),  # the line break, 36 off
        ("x" * 4960 + " " + "x" * 70 + " " + "x" * 4968, 5032),  # the nearer of two spaces
        ("x" * 4400 + "\n" + "x" * 5599, 5000),  # too far off
        ("x" * 10_000, 5000),
        ("\n" * 10_000, 5000),
        ("ab", 1),
        ("a\n", 1),
        (" b", 1),
    ],
)
def test_one_document_is_cut_near_its_middle(text, first):
    parts = halve_documents([document("long", text)], 0)
    assert [part[0].doc_id for part in parts] == ["long part 1 of 2", "long part 2 of 2"]
    assert [part[0].text for part in parts] == [text[:first], text[first:]]


def test_documents_of_one_size_stay_whole():
    first, second = halve_documents([document(str(n), "same\n") for n in range(4)], 7)
    assert len(first) == len(second) == 2
    assert sorted(part.doc_id for part in first + second) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_too_little_text_is_not_halved(texts):
    books = [document("short", text) for text in texts]
    given = f"{len(texts)} documents of {len(texts)} characters in all cannot be halved"
    with pytest.raises(DataError, match=given):
        halve_documents(books, 0)


def test_fresh_samples_share_no_key():
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")

    def keys(seed, num_samples, **options):
        built = build_needle_set(
            tokenizer,
            TEXTS,
            length=128,
            depths=[0.0],
            num_samples=num_samples,
            seed=seed,
            **options,
        )
        return [sample.key for sample in built.samples]

    every = len(ADJECTIVES) * len(NOUNS)
    used = keys(5, 150)
    plain, fresh = keys(6, 150), keys(6, 150, excluded_keys=[*used, "no-key"])
    assert set(plain) & set(used)  # 150 of some 3,600 twice: about six would agree
    assert not set(fresh) & set(used) and len(set(fresh)) == 150
    assert [key for key in plain if key not in used][0] == fresh[0]
    assert keys(5, 3, excluded_keys=used[3:]) == used[:3]
    allowed = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS][:5]
    others = {f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS} - set(allowed)
    assert sorted(keys(6, 5, excluded_keys=others)) == sorted(allowed)
    words = rf"num_keys=6 .* must be from 1 to 5, the keys there are without {every - 5} excluded"
    with pytest.raises(DataError, match=words):
        keys(6, 6, excluded_keys=others)


def test_texts_are_the_books_of_the_needles() -> None:
    """Table 6: the ablation's documents are the haystacks, with no needle and nothing else."""
    books = [f"{letter}word number {n} " * 300 for n, letter in enumerate("abcdefg")]
    tokenizer = load_tokenizer(TINY)
    given = {"length": 700, "num_samples": 9, "seed": 4}
    needles = build_needle_set(tokenizer, books, depths=[1.0], **given)
    texts = build_texts(tokenizer, books, **given)
    for text, sample in zip(texts, needles.samples, strict=True):
        num = int(sample.record["num_haystack_tokens"])
        start = int(sample.record["needle_start"]) - num  # at depth 1 the needle stands behind
        assert len(text) == 700 and text[0] == tokenizer.bos_token_id
        assert (text[1 : 1 + num] == sample.tokens[start : start + num]).all()


def test_too_little_text() -> None:
    with pytest.raises(DataError, match=r"700 tokens are wanted, the held-out text has \d+ in"):
        build_texts(load_tokenizer(TINY), ["a few words"], length=700, num_samples=1, seed=0)
