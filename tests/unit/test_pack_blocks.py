"""The plan's steps over all documents go block by block and choose what one pass would."""

import random

import numpy as np
import pytest
from pack_documents import Made, table_of

from data_prep import candidates as of_candidates
from data_prep import token_files
from data_prep.candidates import find_candidates, measure_supply
from data_prep.config import DocumentsConfig, Overlong, ShortOverlong
from data_prep.quotas import Demand, select_documents
from data_prep.shards import PackList
from data_prep.token_files import LengthBuckets, TokenizedUnit
from data_prep.tokenizing import order_of
from longrope2.corpora.held_out import HeldOutTexts

LENGTHS = LengthBuckets(("short", "long"), (64, 500))
SHARES = {("s", "a"): {"short": 700.0, "long": 0.0}, ("s", "b"): {"short": 900.0, "long": 2500.0}}
DEMAND = Demand({("s", "short"): 1800, ("s", "long"): 6000, ("t", "long"): None}, SHARES)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(3)
    return [
        Made(
            f"{source}{number}",
            rng.choice([rng.randint(3, 64), rng.randint(65, 500), rng.randint(501, 1600)]),
            source=source,
            domain=rng.choice("abc"),
            text=f"text {rng.randrange(90)}",
        )
        for source in "st"
        for number in range(120)
    ]


def chosen_by_hand(documents):
    """Ids, part numbers and buckets of what is chosen, and tokens left out; document by document.

    Parts of a document stand together, so a plain walk in the order of choice is a reference.
    """
    ordered = sorted(documents, key=lambda document: order_of(0, document.doc_id))
    texts, parts = set(), []
    for document in ordered:
        if document.text in texts:
            continue
        texts.add(document.text)
        count = -(-(document.num_tokens - 2) // 498)
        for number in range(count):
            size = (document.num_tokens - 2) // count + (number < (document.num_tokens - 2) % count)
            parts.append((document, number if count > 1 else -1, size + 2))
    kept, spent, gone = [], {}, dict.fromkeys(["short", "long"], 0)
    for by_share in (True, False):
        for place, (document, _, size) in enumerate(parts):
            bucket = "short" if size <= 64 else "long"
            cell, key = (document.source, bucket), (document.source, document.domain)
            share = SHARES.get(key, {}).get(bucket)
            if by_share and share is not None:
                spent[key, bucket] = spent.get((key, bucket), 0) + size
                if spent[key, bucket] <= share:
                    kept.append(place)
                    gone[bucket] += size
            elif not by_share and place not in kept:
                wanted = DEMAND.of(*cell)
                if wanted is None:
                    kept.append(place)
                elif document.source == "s" and gone[bucket] < wanted:
                    kept.append(place)
                    gone[bucket] += size
    rows = [parts[place] for place in sorted(kept)]
    return [(document.doc_id, number, size) for document, number, size in rows]


@pytest.mark.parametrize("rows", [1, 7, 50, 10_000])
def test_any_block_size_chooses_what_a_walk_by_hand_does(documents, tmp_path, rows, monkeypatch):
    for module in (token_files, of_candidates):
        monkeypatch.setattr(module, "ROWS_PER_BLOCK", rows)
    table = table_of(tmp_path, documents)
    candidates, account = find_candidates(table, LENGTHS, DocumentsConfig(overlong=Overlong.split))
    windows = dict.fromkeys(table.sources, ShortOverlong.drop)
    selection = select_documents(
        table,
        candidates,
        demand=DEMAND,
        lengths=LENGTHS,
        short_overlong=windows,
        account=account,
        seed=0,
    )
    parts = selection.parts
    ids = table.values("doc_id", parts.document_P)
    found = list(zip(ids, parts.number_P.tolist(), parts.tokens_P.tolist(), strict=True))
    assert found == chosen_by_hand(documents)
    there = int(candidates.tokens_P.sum())
    copies = sum(n for (_, reason), n in account.left_out.items() if reason == "exact duplicate")
    assert there == sum(table.tokens_D) - copies + sum(account.added_boundaries.values())
    assert there == sum(selection.tokens.values()) + sum(account.left_out.values()) - copies
    supply = measure_supply(table, candidates, LENGTHS)
    weighted = measure_supply(table, candidates, LENGTHS, np.full(len(table), 3.0, np.float32))
    assert sum(n for d in supply.values() for row in d.values() for n in row.values()) == there
    assert weighted["s"]["a"]["long"] == 3 * supply["s"]["a"]["long"]


def test_documents_left_out_are_counted_once_whatever_their_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "ROWS_PER_BLOCK", 2)
    table = table_of(tmp_path, [Made(f"d{number}", 2400) for number in range(4)])  # 5 parts each
    candidates, account = find_candidates(table, LENGTHS, DocumentsConfig())
    windows = {"s": ShortOverlong.drop}
    select_documents(
        table,
        candidates,
        demand=Demand({("s", "long"): 900}),
        lengths=LENGTHS,
        short_overlong=windows,
        account=account,
        seed=0,
    )
    assert len(candidates) == 20
    # Two parts of about 481 tokens are taken, both of one document; its rest is left out too.
    assert account.num_left_out == {("s", "long quota met"): 4}


def test_values_come_in_the_order_asked_for(documents, tmp_path):
    table = table_of(tmp_path, documents)
    asked = np.random.default_rng(0).permutation(len(table))[:100]
    expected = [documents[number].doc_id for number in asked]
    assert table.values("doc_id", asked) == expected
    ends = table.first_U
    assert ends[0] == 0 and ends[-1] == len(documents) and (np.diff(ends) > 0).all()


def test_the_list_reads_each_unit_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    made = [Made(f"d{number}", 30) for number in range(120)]
    table = table_of(tmp_path, made, documents_per_unit=2)
    candidates, account = find_candidates(table, LENGTHS, DocumentsConfig())
    selection = select_documents(
        table,
        candidates,
        demand=Demand({("s", "short"): None}),
        lengths=LENGTHS,
        short_overlong={"s": ShortOverlong.drop},
        account=account,
        seed=0,
    )
    index, read = TokenizedUnit.index, []

    def counted(unit, columns):
        read.append(unit.stem)
        return index(unit, columns)

    monkeypatch.setattr(TokenizedUnit, "index", counted)
    nothing = HeldOutTexts(0.0, frozenset())
    pack_list = PackList(tmp_path / "list")
    pack_list.write(table, selection, held_out=nothing, tokens_per_unit=900, summary={})
    assert sorted(read) == sorted(unit.stem for unit in table.units)  # 60 of them, once each
    rows = [row for unit in range(4) for row in pack_list.parts(unit).to_pylist()]
    assert sorted(row["doc_id"] for row in rows) == sorted(made_one.doc_id for made_one in made)
    starts = dict(zip(table.values("doc_id", np.arange(120)), [0, 28] * 60, strict=True))
    assert {row["doc_id"]: row["start"] for row in rows} == starts
