"""Packing against brute force: naive best fit, and every token found exactly once."""

import random
from collections import defaultdict

import numpy as np
import pytest
from pack_documents import TokenizedDocument

from data_prep.packing import best_fit_decreasing, pack_long, pack_short
from data_prep.shards import segment_from_draft
from longrope2.segments.format import SegmentRules, check_segment

BOS, EOS, TARGET, WINDOW = 1, 2, 64, 16


def documents_of(lengths):
    """Documents with BOS, EOS and content ids that are unique over the whole set."""
    documents, next_id = [], 3
    for number, length in enumerate(lengths):
        content = np.arange(next_id, next_id + length - 2)
        next_id += length - 2
        documents.append(
            TokenizedDocument(f"d{number}", "s", np.asarray([BOS, *content, EOS], dtype=np.uint32))
        )
    return documents


def rules(alignment=1):
    return SegmentRules(TARGET, WINDOW, alignment, 2**20, BOS, EOS)


def naive_best_fit(documents, capacity):
    """O(n^2) reference: the fullest bin with room; among equals the first to reach it."""
    bins = []  # (room, time of the last change, index, members)
    for time, document in enumerate(sorted(documents, key=len, reverse=True)):
        fitting = [b for b in bins if b["room"] >= len(document)]
        if fitting:
            chosen = min(fitting, key=lambda b: (b["room"], b["time"]))
        else:
            chosen = {"room": capacity, "members": []}
            bins.append(chosen)
        chosen["room"] -= len(document)
        chosen["time"] = time
        chosen["members"].append(document)
    return [(b["room"], b["members"]) for b in bins]


def pieces_by_document(segments):
    found = defaultdict(list)
    for segment in segments:
        for piece in segment.pieces:
            if piece.document is not None:
                found[piece.document.doc_id].append((piece.start, piece.stop))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_naive(seed):
    rng = random.Random(seed)
    documents = documents_of([rng.randint(2, 40) for _ in range(300)])
    assert best_fit_decreasing(documents, 40) == naive_best_fit(documents, 40)


@pytest.mark.parametrize("alignment", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_short_segments_hold_every_document_once_and_keep_the_rules(alignment, seed):
    rng = random.Random(seed)
    documents = documents_of([rng.randint(2, WINDOW) for _ in range(200)])
    packing = pack_short(documents, target_len=TARGET, alignment=alignment, seed=seed)
    segments = packing.segments
    found = pieces_by_document(segments)
    for piece in packing.rest:
        assert piece.document is not None
        found[piece.document.doc_id].append((piece.start, piece.stop))
    assert found == {d.doc_id: [(0, len(d))] for d in documents}
    documents = [
        d
        for d in documents
        if d.doc_id not in {p.document.doc_id for p in packing.rest if p.document}
    ]
    for index, draft in enumerate(segments):
        check_segment(segment_from_draft(draft, index, rules(alignment)), rules(alignment))
    total = sum(map(len, documents))
    padding = sum(len(p) for s in segments for p in s.pieces if p.document is None)
    assert len(segments) * TARGET == total + padding
    # Best fit leaves little: no more bins than one and a quarter of the lower bound.
    assert len(segments) <= -(-total // TARGET) * 1.25 + 1


def test_short_chunks_that_fill_no_segment_are_left_out():
    """Six full chunks and two emptier ones make two segments of three and two chunks too many."""
    documents = documents_of([16] * 6 + [9, 12])
    packing = pack_short(documents, target_len=48, alignment=3, seed=0)
    assert len(packing.segments) == 2
    assert sorted(len(piece) for piece in packing.rest) == [9, 12]
    assert all(p.document is not None for s in packing.segments for p in s.pieces)


@pytest.mark.parametrize(("num_full", "num_segments"), [(1, 1), (2 * 250 + 1, 251)])
def test_a_segment_is_filled_up_where_it_is_the_only_one_or_costs_next_to_nothing(
    num_full, num_segments
):
    """One chunk of padding: all there is, or one of 502 chunks, below half a percent."""
    packing = pack_short(documents_of([16] * num_full), target_len=32, alignment=2, seed=0)
    assert len(packing.segments) == num_segments and not packing.rest
    assert sum(len(p) for s in packing.segments for p in s.pieces if p.document is None) == 16


@pytest.mark.parametrize(
    "lengths",
    [
        [20, 30, 63, 64, 65, 17, 200, 500, 64, 40, 41, 128],
        [40] * 13,  # no document longer than L: ordinary ones are cut
        [1000],
        [63, 63, 63, 63],
        [17],  # fills nothing
        [64, 64],
        [129, 40, 40, 40, 40],
    ],
)
def test_long_segments_account_for_every_token(lengths):
    documents = documents_of(lengths)
    packing = pack_long(documents, target_len=TARGET, seed=3)
    found = pieces_by_document(packing.segments)
    for piece in packing.rest:
        assert piece.document is not None
        found[piece.document.doc_id].append((piece.start, piece.stop))
    for document in documents:
        spans = sorted(found[document.doc_id])
        assert spans[0][0] == 0 and spans[-1][1] == len(document)
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert sum(map(len, packing.rest)) == sum(lengths) - TARGET * len(packing.segments) < TARGET
    for index, draft in enumerate(packing.segments):
        check_segment(segment_from_draft(draft, index, rules()), rules())
        assert all(piece.start == 0 for piece in draft.pieces[1:])


@pytest.mark.parametrize("seed", range(10))
def test_long_segments_of_random_documents(seed):
    rng = random.Random(seed)
    test_long_segments_account_for_every_token(
        [rng.randint(17, rng.choice([60, 70, 300])) for _ in range(80)]
    )


def test_documents_that_fit_are_cut_only_when_no_longer_ones_are_left():
    with_fillers = pack_long(documents_of([40] * 10 + [500]), target_len=TARGET, seed=0)
    assert with_fillers.num_cut_documents == 0
    found = pieces_by_document(with_fillers.segments)
    assert all(found[f"d{n}"] == [(0, 40)] for n in range(10))
    assert pack_long(documents_of([40] * 10), target_len=TARGET, seed=0).num_cut_documents > 0


def test_order_depends_on_the_seed_only():
    documents = documents_of([30, 50, 20, 400, 64, 33] * 5)
    drafts = [pack_long(documents, target_len=TARGET, seed=seed).segments for seed in (1, 1, 2)]
    assert drafts[0] == drafts[1] != drafts[2]
