"""One rank's share of a micro-step: tokens, labels, window and layout.

Shape legend: L = tokens of the segment, T = tokens of this rank's chunk.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longrope2.attention import AttentionKernel, SegmentLayout, build_layout, chunk_bounds
from longrope2.model import IGNORED_LABEL
from longrope2.parallel import ParallelDims
from longrope2.rope import Window
from longrope2.segments import MicroStep, Segment, SegmentStore

__all__ = ["RankBatch", "load_rank_batch", "next_token_labels"]


@dataclass(frozen=True)
class RankBatch:
    """What one rank feeds the model in one micro-step."""

    tokens_BT: Tensor
    labels_BT: Tensor
    window: Window
    layout: SegmentLayout
    num_targets: int
    """Labels of this rank that count."""
    squared_lengths: int
    """Of the whole segment: the squared length of each document in a short window, of the segment in a long one."""


def next_token_labels(segment: Segment, window: Window) -> np.ndarray:
    """Label of every position, int64 [L]: the next token, or ``IGNORED_LABEL``.

    Ignored are the segment's last position, padding, the token before padding, and in a short window the last token of
    every document: the next document is not its continuation (paper, section 3.3). A long window predicts across
    document ends, as its attention spans them.
    """
    labels_L = np.full(len(segment.tokens), IGNORED_LABEL, dtype=np.int64)
    labels_L[:-1] = segment.tokens[1:]
    starts = np.concatenate([[0], segment.doc_ends[:-1]])
    for start, end, is_padding in zip(starts, segment.doc_ends, segment.doc_is_padding, strict=True):
        if window is Window.SHORT:
            labels_L[end - 1] = IGNORED_LABEL
        if is_padding:
            labels_L[max(start - 1, 0) : end] = IGNORED_LABEL
    return labels_L


def load_rank_batch(
    store: SegmentStore,
    micro_step: MicroStep,
    dims: ParallelDims,
    sequence_group: ProcessGroup | None,
    *,
    mixed: bool = True,
    device: torch.device | str = "cpu",
    kernel: AttentionKernel = AttentionKernel.sdpa,
) -> RankBatch:
    """Read this rank's contiguous chunk of its data-parallel group's segment.

    Args:
        store: The packed segments.
        micro_step: Window kind and the segment of every data-parallel group.
        dims: This process's place on the grid.
        sequence_group: Ranks that share the segment.
        mixed: False treats every segment as long (the paper's ablation without mixed windows).
        device: Where the tensors go.
        kernel: What will compute the attention.
    """
    segment = store.segment(micro_step.segment_ids[dims.data_rank])
    assert segment.window is micro_step.window, f"segment {segment.index} is {segment.window}, not {micro_step.window}"
    window = segment.window if mixed else Window.LONG
    start, stop = chunk_bounds(len(segment.tokens), dims.sequence_rank, dims.sequence)
    labels_T = next_token_labels(segment, window)[start:stop]
    layout = build_layout(
        window,
        segment.doc_ends.tolist(),
        sequence_rank=dims.sequence_rank,
        sequence_group=sequence_group,
        sequence_size=dims.sequence,
        device=device,
        kernel=kernel,
    )
    return RankBatch(
        tokens_BT=torch.from_numpy(segment.tokens[start:stop].astype(np.int64))[None].to(device),
        labels_BT=torch.from_numpy(labels_T)[None].to(device),
        window=window,
        layout=layout,
        num_targets=int((labels_T != IGNORED_LABEL).sum()),
        squared_lengths=_squared_lengths(segment, window),
    )


def _squared_lengths(segment: Segment, window: Window) -> int:
    """What the segment's causal attention costs, in squared tokens."""
    ends = segment.doc_ends[-1:] if window is Window.LONG else segment.doc_ends
    return int((np.diff(ends, prepend=0).astype(np.int64) ** 2).sum())
