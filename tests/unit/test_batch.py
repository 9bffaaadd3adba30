"""Labels and rank slices of a segment."""

import numpy as np
import pytest
import torch

from longrope2.model.loss import IGNORED_LABEL
from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import load_rank_batch, next_token_labels

X = IGNORED_LABEL


def segment(window: Window, doc_ends: tuple[int, ...], padding: tuple[bool, ...]) -> Segment:
    length = doc_ends[-1]
    names = tuple(str(i) for i in range(len(doc_ends)))
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    return Segment(7, window, tokens, np.array(doc_ends, np.int32), names, names, padding, False, 0)


def test_short_labels_stop_at_document_ends() -> None:
    labels = next_token_labels(
        segment(Window.SHORT, (3, 5, 8), (False, False, False)), Window.SHORT
    )
    assert labels.tolist() == [101, 102, X, 104, X, 106, 107, X]


def test_long_labels_cross_document_ends() -> None:
    labels = next_token_labels(segment(Window.LONG, (3, 5, 8), (False, False, False)), Window.LONG)
    assert labels.tolist() == [101, 102, 103, 104, 105, 106, 107, X]


@pytest.mark.parametrize("window", list(Window))
def test_padding_is_never_a_target(window: Window) -> None:
    labels = next_token_labels(segment(window, (3, 5, 8), (False, True, False)), window)
    assert labels.tolist() == [101, 102, X, X, X, 106, 107, X]


class OneSegment:  # stands in for the store on disk
    def segment(self, index: int) -> Segment:
        assert index == 7
        return segment(Window.SHORT, (4, 8), (False, False))


def test_ranks_share_a_segment_without_loss() -> None:
    micro = MicroStep(Window.SHORT, (7,))
    batches = [
        load_rank_batch(OneSegment(), micro, ParallelDims(1, 2, rank), None) for rank in range(2)
    ]
    assert torch.cat([b.tokens_BT for b in batches], dim=1).tolist() == [list(range(100, 108))]
    assert torch.cat([b.labels_BT for b in batches], dim=1).tolist() == [
        [101, 102, 103, X, 105, 106, 107, X]
    ]
    assert [b.num_targets for b in batches] == [3, 3]
    assert all(b.layout.exchange_group is None for b in batches)


def test_without_mixing_every_segment_is_long() -> None:
    batch = load_rank_batch(
        OneSegment(), MicroStep(Window.SHORT, (7,)), ParallelDims(1, 1), None, mixed=False
    )
    assert batch.window is Window.LONG
    assert batch.layout.positions_BT.tolist() == [list(range(8))]
    assert batch.num_targets == 7


@pytest.mark.parametrize(("mixed", "squares"), [(True, 4**2 + 4**2), (False, 8**2)])
def test_attention_cost_of_the_whole_segment_on_every_rank(mixed: bool, squares: int) -> None:
    micro = MicroStep(Window.SHORT, (7,))
    for rank in range(2):
        batch = load_rank_batch(OneSegment(), micro, ParallelDims(1, 2, rank), None, mixed=mixed)
        assert batch.squared_lengths == squares
