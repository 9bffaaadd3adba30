"""Quotas: bounds kept, no document in two buckets, every token chosen or left out for a reason."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from pack_documents import Made, table_of

from data_prep.candidates import find_candidates, measure_supply
from data_prep.config import DocumentsConfig, Overlong, ShortOverlong
from data_prep.quotas import Demand, select_documents
from data_prep.shards import PackList
from data_prep.token_files import LengthBuckets
from longrope2.corpora.corpus import Split, content_hash
from longrope2.corpora.held_out import HeldOutTexts
from longrope2.corpora.retrieval import RetrievalConfig, RetrievalDocuments
from longrope2.corpora.sample import SampleCorpus
from longrope2.corpora.tokenizer import batches_by_characters, load_document_tokenizer
from longrope2.errors import DataError
from longrope2.model.folder import resolve_model_folder

WINDOW, LONGEST = 64, 1000
LENGTHS = LengthBuckets(("short", "long"), (WINDOW, LONGEST))
THREE = LengthBuckets(("short", "mid", "long"), (WINDOW, 300, LONGEST))


@pytest.fixture(scope="module")
def encoder():
    return load_document_tokenizer(resolve_model_folder("models/tiny"))


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    lengths = [
        rng.choice([rng.randint(3, 64), rng.randint(65, 900), rng.randint(1001, 5000)])
        for _ in range(80)
    ]
    return [Made(f"d{n}", length) for n, length in enumerate(lengths)] + [
        Made("w", 64),
        Made("v", 65),
        Made("x", 1000),
    ]


def chosen(
    table,
    demand,
    *,
    lengths=LENGTHS,
    overlong=Overlong.split,
    windows=ShortOverlong.drop,
    seed=0,
    exact=True,
):
    rules = DocumentsConfig(overlong=overlong, exact_duplicates=exact)
    candidates, account = find_candidates(table, lengths, rules)
    short_overlong = dict.fromkeys(table.sources, windows)
    selection = select_documents(
        table,
        candidates,
        demand=demand,
        lengths=lengths,
        short_overlong=short_overlong,
        account=account,
        seed=seed,
    )
    return selection, account


def demand(**cells):
    return Demand({("s", bucket): tokens for bucket, tokens in cells.items()})


def names_of(table, selection):
    ids = table.values("doc_id", selection.parts.document_P)
    return list(
        zip(ids, selection.parts.number_P.tolist(), selection.bucket_P.tolist(), strict=True)
    )


@pytest.mark.parametrize("overlong", list(Overlong))
@pytest.mark.parametrize("windows", list(ShortOverlong))
@pytest.mark.parametrize(
    ("short", "long"), [(None, None), (500, 3000), (0, None), (None, 0), (300, 0), (10**6, 10**6)]
)
def test_every_token_is_chosen_or_left_out(tmp_path, documents, overlong, windows, short, long):
    table = table_of(tmp_path, documents)
    selection, account = chosen(
        table, demand(short=short, long=long), overlong=overlong, windows=windows
    )
    tokens = selection.parts.tokens_P
    total = sum(document.num_tokens for document in documents) + account.added_boundaries["s"]
    assert int(tokens.sum()) == sum(selection.tokens.values())
    assert int(tokens.sum()) + sum(account.left_out.values()) == total
    assert all(tokens[selection.bucket_P == 0] <= WINDOW) and all(
        tokens[selection.bucket_P == 1] > WINDOW
    )
    assert all(tokens <= LONGEST)
    for code, wanted in enumerate((short, long)):
        of_bucket = tokens[selection.bucket_P == code].tolist()
        assert sum(of_bucket) == selection.tokens["s", LENGTHS.names[code]]
        if wanted is not None and of_bucket:
            assert sum(of_bucket[:-1]) < wanted
    _no_token_twice(documents, table, selection)


def _no_token_twice(documents, table, selection):
    """Parts of a document do not overlap, and a document serves one bucket."""
    spans, buckets = {}, {}
    ids = table.values("doc_id", selection.parts.document_P)
    rows = zip(
        ids, selection.parts.start_P, selection.parts.content_P, selection.bucket_P, strict=True
    )
    for doc_id, start, content, bucket in rows:
        spans.setdefault(doc_id, []).append((int(start), int(start + content)))
        buckets.setdefault(doc_id, set()).add(int(bucket))
    content_of = {document.doc_id: document.num_tokens - 2 for document in documents}
    for doc_id, found in spans.items():
        found.sort()
        assert found[0][0] >= 0 and found[-1][1] <= content_of[doc_id]
        assert all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("windows", list(ShortOverlong))
def test_choice_does_not_depend_on_the_units(tmp_path, documents, windows):
    shuffled = documents[::-1]
    one, other = (
        table_of(tmp_path / "a", documents),
        table_of(tmp_path / "b", shuffled, documents_per_unit=23),
    )
    wanted = demand(short=500, long=2000)
    first, second = (
        chosen(one, wanted, windows=windows)[0],
        chosen(other, wanted, windows=windows)[0],
    )
    assert names_of(one, first) == names_of(other, second)
    reseeded = table_of(tmp_path / "c", documents, seed=1)
    assert names_of(reseeded, chosen(reseeded, wanted, windows=windows, seed=1)[0]) != names_of(
        one, first
    )
    for folder, table, selection in (("a", one, first), ("b", other, second)):
        pack_list = PackList(tmp_path / folder / "list")
        nothing = HeldOutTexts(0.0, frozenset())
        pack_list.write(table, selection, held_out=nothing, tokens_per_unit=600, summary={})
        units = [
            sorted(pack_list.parts(n).column("doc_id").to_pylist())
            for n in range(pack_list.summary()["num_units"])
        ]
        assert len(units) == round(int(selection.parts.tokens_P.sum()) / 600) > 2
        if folder == "a":
            expected = units
    assert units == expected


def test_documents_that_are_too_long(tmp_path):
    documents = [Made("a", 1000), Made("b", 1001), Made("c", 3000), Made("e", 50)]
    table, all_of_it = table_of(tmp_path, documents), demand(short=None, long=None)
    split, account = chosen(table, all_of_it, overlong=Overlong.split)
    by_id = {}
    for (doc_id, _, _), tokens in zip(
        names_of(table, split), split.parts.tokens_P.tolist(), strict=True
    ):
        by_id.setdefault(doc_id, []).append(tokens)
    # 999 content ids in 2 parts, 2998 in 4: nearly equal, each with BOS and EOS.
    assert by_id == {"a": [1000], "b": [502, 501], "c": [752, 752, 751, 751], "e": [50]}
    assert account.num_split == {"s": 2} and account.added_boundaries == {"s": 2 + 6}
    capped, account = chosen(table, all_of_it, overlong=Overlong.cap)
    assert sorted(capped.parts.tokens_P.tolist()) == [50, 1000, 1000, 1000]
    assert account.left_out == {("s", "beyond the first 1000 tokens"): 1 + 2000}
    dropped, account = chosen(table, all_of_it, overlong=Overlong.drop)
    assert sorted(dropped.parts.tokens_P.tolist()) == [50, 1000]
    assert account.left_out == {("s", "longer than 1000 tokens"): 4001}
    assert account.num_left_out == {("s", "longer than 1000 tokens"): 2}


def test_of_equal_texts_in_all_sources_one_stays(tmp_path):
    documents = [
        Made(f"{source}{n}", 30, source=source, text=f"text {n % 4}")
        for source in "st"
        for n in range(8)
    ]
    table = table_of(tmp_path, documents)
    wanted = Demand({(source, "short"): None for source in "st"})
    selection, account = chosen(table, wanted)
    kept = table.values("doc_id", selection.parts.document_P)
    expected, order_D = {}, table.column("order", np.uint64)
    for row in sorted(range(len(table)), key=lambda r: order_D[r]):
        expected.setdefault(documents[row].text, documents[row].doc_id)
    assert sorted(kept) == sorted(expected.values())
    assert sum(account.num_left_out.values()) == 12 and set(r for _, r in account.left_out) == {
        "exact duplicate"
    }
    assert len(chosen(table, wanted, exact=False)[0].parts) == 16


def test_domains_get_their_shares(tmp_path):
    documents = [
        Made(f"{domain}{n}", 40 + n % 9, domain=domain) for domain in "abc" for n in range(60)
    ]
    table = table_of(tmp_path, documents)
    shares = {
        ("s", "a"): {"short": 1000.0},
        ("s", "b"): {"short": 300.0},
        ("s", "c"): {"short": 0.0},
    }
    selection, _ = chosen(table, Demand({("s", "short"): 1300}, shares))
    tokens = Counter()
    for document, size in zip(
        selection.parts.document_P, selection.parts.tokens_P.tolist(), strict=True
    ):
        tokens[table.domains[table.domain_D[document]][1]] += size
    assert 1300 <= sum(tokens.values()) < 1300 + 49
    assert (
        abs(tokens["a"] - 1000) < 2 * 49
        and abs(tokens["b"] - 300) < 2 * 49
        and tokens["c"] < 2 * 49
    )


def test_supply_is_the_sum_of_all_candidates(tmp_path):
    rng = random.Random(2)
    documents = [
        Made(f"{s}{d}{n}", rng.randint(3, 999), s, d) for s in "st" for d in "ab" for n in range(30)
    ]
    table = table_of(tmp_path, documents)
    candidates, _ = find_candidates(table, THREE, DocumentsConfig())
    supply = measure_supply(table, candidates, THREE)
    expected = {s: {d: dict.fromkeys(THREE.names, 0) for d in "ab"} for s in "st"}
    for document in documents:
        bucket = (
            "short"
            if document.num_tokens <= 64
            else "mid"
            if document.num_tokens <= 300
            else "long"
        )
        expected[document.source][document.domain][bucket] += document.num_tokens
    assert supply == expected


def test_bucket_edges_count_bos_and_eos():
    assert LENGTHS.codes(np.array([2, 64, 65, 1000, 1001])).tolist() == [0, 0, 1, 1, 2]


def test_near_duplicates_are_dropped():
    pytest.importorskip("datasketch")
    from data_prep.duplicates import near_duplicates, signature_of

    rng = random.Random(3)
    words = [f"w{n}" for n in range(3000)]
    base = [" ".join(rng.choices(words, k=400)) for _ in range(6)]
    texts = [*base, *(text + " and a few more words" for text in base[:3]), base[4].upper()]
    assert (
        near_duplicates([signature_of(text) for text in texts]).tolist() == [False] * 6 + [True] * 4
    )


def test_batches_cover_everything_once():
    texts = ["a" * n for n in (5, 3, 9, 1, 1, 20, 2)]
    batches = list(batches_by_characters(texts, len, limit=10))
    assert [t for b in batches for t in b] == texts
    assert all(sum(map(len, b)) <= 10 or len(b) == 1 for b in batches)
    assert list(batches_by_characters([], len)) == []


@pytest.fixture(scope="module")
def haystack():
    return [d.text for d in SampleCorpus().documents(Split.train)][:40]


@pytest.mark.parametrize(("bucket", "above", "up_to"), [("short", 0, 128), ("long", 128, 700)])
def test_retrieval_documents_fit_their_window_and_answer_right(
    encoder, haystack, bucket, above, up_to
):
    generator = RetrievalDocuments(
        encoder, haystack, RetrievalConfig(full_length_share=0.6), seed=5
    )
    documents = list(generator.documents(bucket, 60_000, above=above, up_to=up_to))
    lengths = [len(ids) for ids in encoder.encode_documents([d.text for d in documents])]
    assert sum(lengths) >= 60_000 and all(above < n <= up_to for n in lengths)
    assert 0.5 < sum(n == up_to for n in lengths) / len(lengths) < 0.7
    needles_seen, near_start = Counter(), 0
    for document in documents:
        needles = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", document.text))
        answers = re.findall(
            r"number for (\S+) mentioned in the provided text is (\d{7})", document.text
        )
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
    with pytest.raises(
        DataError, match="retrieval documents need at least 67 tokens, the short window has 40"
    ):
        next(generator.documents("short", 100, above=0, up_to=40))
    with pytest.raises(DataError, match="need as much haystack"):
        next(generator.documents("short", 100, above=0, up_to=128))


def test_heldout_text_is_never_packed():
    train = [d.text for d in SampleCorpus().documents(Split.train)]
    held_out = HeldOutTexts.of(SampleCorpus())
    assert len(train) > 300 and not any(held_out.holds(content_hash(text)) for text in train)
