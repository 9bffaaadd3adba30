"""Quotas: bounds kept, no document in two buckets, everything accounted for."""

import re
from collections import Counter

import pytest

from data_prep.corpora import BucketQuota, Document, ShortOverlong, Split, split_of
from data_prep.quotas import Selection, select_documents
from data_prep.retrieval_corpus import RetrievalConfig, RetrievalDocuments
from data_prep.sample_corpus import SampleCorpus
from data_prep.tokenization import batches_by_characters, load_document_tokenizer
from longrope2.artifacts import resolve_model_folder
from longrope2.errors import DataError

WINDOW = 64


@pytest.fixture(scope="module")
def encoder():
    return load_document_tokenizer(resolve_model_folder("models/tiny"))


@pytest.fixture(scope="module")
def documents():
    return [Document(f"d{n}", f"Text {n}: " + "some words here, " * n, "s", "x") for n in range(60)]


def selected(encoder, documents, *, short, long, overlong=ShortOverlong.drop, seed=0):
    selection = Selection()
    select_documents(
        documents, BucketQuota(short, long), encoder, selection, original_len=WINDOW, short_overlong=overlong, seed=seed
    )
    return selection


@pytest.mark.parametrize("overlong", list(ShortOverlong))
@pytest.mark.parametrize(("short", "long"), [(None, None), (500, 3000), (0, None), (None, 0), (300, 0), (10**6, 10**6)])
def test_every_token_is_chosen_or_left_out(encoder, documents, overlong, short, long):
    selection = selected(encoder, documents, short=short, long=long, overlong=overlong)
    windows = Counter(d.doc_id.split("#")[0] for d in selection.short if "#" in d.doc_id)
    extra = 2 * sum(number - 1 for number in windows.values())  # every further window has a BOS and an EOS of its own
    total = sum(map(len, encoder.encode_documents([d.text for d in documents])))
    chosen, left_out = sum(selection.tokens.values()), sum(selection.left_out.values())
    if short is None or overlong is ShortOverlong.drop:
        assert chosen + left_out == total + extra
    else:
        assert chosen + left_out >= total  # windows beyond the quota were cut, too
    assert all(len(d) <= WINDOW for d in selection.short) and all(len(d) > WINDOW for d in selection.long)
    assert not {d.doc_id.split("#")[0] for d in selection.short} & {d.doc_id for d in selection.long}
    for bucket, wanted in (("short", short), ("long", long)):
        tokens = [len(d) for d in getattr(selection, bucket)]
        assert sum(tokens) == selection.tokens["s", bucket]
        if wanted is not None and tokens:
            assert sum(tokens[:-1]) < wanted


def test_choice_does_not_depend_on_the_order_of_reading(encoder, documents):
    one = selected(encoder, documents, short=500, long=2000)
    other = selected(encoder, documents[::-1], short=500, long=2000)
    assert [d.doc_id for d in one.long] == [d.doc_id for d in other.long]
    assert [d.doc_id for d in selected(encoder, documents, short=500, long=2000, seed=1).long] != [
        d.doc_id for d in one.long
    ]


def test_unread_documents_are_counted(encoder):
    documents = [Document(f"d{n}", "word " * 100_000, "s", "x") for n in range(6)]
    selection = selected(encoder, documents, short=0, long=10)
    assert selection.unread["s"] == 4 and len(selection.long) == 1  # batches of a million characters: two texts


def test_batches_cover_everything_once():
    texts = ["a" * n for n in (5, 3, 9, 1, 1, 20, 2)]
    batches = [texts[b] for b in batches_by_characters(texts, limit=10)]
    assert [t for b in batches for t in b] == texts
    assert all(sum(map(len, b)) <= 10 or len(b) == 1 for b in batches)
    assert list(batches_by_characters([])) == []


@pytest.fixture(scope="module")
def haystack():
    return [d.text for d in SampleCorpus().documents(Split.train)][:40]


@pytest.mark.parametrize(("bucket", "above", "up_to"), [("short", 0, 128), ("long", 128, 700)])
def test_retrieval_documents_fit_their_window_and_answer_right(encoder, haystack, bucket, above, up_to):
    generator = RetrievalDocuments(encoder, haystack, RetrievalConfig(full_length_share=0.6), seed=5)
    documents = list(generator.documents(bucket, 60_000, above=above, up_to=up_to))
    lengths = [len(ids) for ids in encoder.encode_documents([d.text for d in documents])]
    assert sum(lengths) >= 60_000 and all(above < n <= up_to for n in lengths)
    assert 0.5 < sum(n == up_to for n in lengths) / len(lengths) < 0.7
    needles_seen, near_start = Counter(), 0
    for document in documents:
        needles = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", document.text))
        answers = re.findall(r"number for (\S+) mentioned in the provided text is (\d{7})", document.text)
        assert sorted(answers) == sorted(needles.items())
        needles_seen[len(needles)] += 1
        near_start += document.text.index("One of the special") < 0.08 * len(document.text) + 50
        assert document.source == "retrieval" and document.domain == bucket
    assert len({d.doc_id for d in documents}) == len(documents)
    assert near_start > 0.4 * len(documents)
    assert set(needles_seen) == ({1, 2} if bucket == "short" else {1, 2, 3, 4})
    again = generator.documents(bucket, 60_000, above=above, up_to=up_to)
    assert [d.text for d in again] == [d.text for d in documents]


def test_retrieval_haystack_is_the_given_text(encoder, haystack):
    generator = RetrievalDocuments(encoder, haystack, RetrievalConfig(max_needles=1), seed=5)
    joined = "".join(haystack)
    for document in generator.documents("long", 5_000, above=128, up_to=512):
        body = document.text.split("\n", 1)[1]
        before, rest = body.split("\nOne of the special magic numbers", 1)
        after = rest.split(".\n", 1)[1].rsplit("\nWhich number", 1)[0]
        assert before + after in joined


def test_retrieval_faults(encoder, haystack):
    assert RetrievalConfig(full_length_share=2, start_share=-1, max_needles=0).faults() == [
        "retrieval.full_length_share=2 is outside [0, 1]",
        "retrieval.start_share=-1 is outside [0, 1]",
        "retrieval.max_needles=0 must be at least 1",
    ]
    generator = RetrievalDocuments(encoder, ["a short text"], RetrievalConfig(), seed=0)
    with pytest.raises(DataError, match="retrieval documents need at least 67 tokens, the short window has 40"):
        next(generator.documents("short", 100, above=0, up_to=40))
    with pytest.raises(DataError, match="need as much haystack"):
        next(generator.documents("short", 100, above=0, up_to=128))


def test_heldout_text_is_never_packed():
    train = {d.doc_id for d in SampleCorpus().documents(Split.train)}
    assert all(split_of(doc_id) is Split.train for doc_id in train)
