"""One rank's share of a micro-step: tokens, labels, window and layout, read ahead of their step.

One thread reads while the present step computes: only this rank's share of each segment, with its
labels and layouts, on the CPU; the training thread moves a batch to the device just before the
step. What is read is a pure function of the step.

Shape legend: L = tokens of the segment, T = tokens of this rank's share.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longrope2.attention.layout import Axis, SegmentLayout, build_layout
from longrope2.kernel_choice import AttentionKernel
from longrope2.model.loss import IGNORED_LABEL
from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep


@dataclass(frozen=True)
class RankBatch:
    """What one rank feeds the model in one micro-step."""

    tokens_BT: Tensor
    labels_BT: Tensor
    window: Window
    layout: SegmentLayout
    segment_id: int
    num_targets: int
    """Labels of this rank that count."""
    squared_lengths: int
    """Of the whole segment: the squared length of each document in a short window, of the segment
    in a long one."""

    def to(self, device: torch.device | str) -> "RankBatch":
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            layout=self.layout.to(device),
        )


class SegmentSource(Protocol):
    """Where segments come from: a ``SegmentStore``, or what stands in for one."""

    def segment(self, index: int) -> Segment:
        """One segment."""
        ...


def next_token_labels(
    segment: Segment, window: Window, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Label of every position from ``start`` to ``stop``, int64.

    The next token, or ``IGNORED_LABEL``: at the segment's last position, in padding, before
    padding, and in a short window at the last token of every document: the next document is not its
    continuation (paper, section 3.3). A long window predicts across document ends, as its attention
    spans them. Only the tokens from ``start`` to one past ``stop`` are read.
    """
    stop = len(segment.tokens) if stop is None else stop
    labels_T = np.full(stop - start, IGNORED_LABEL, dtype=np.int64)
    following = segment.tokens[start + 1 : stop + 1]
    labels_T[: len(following)] = following
    doc_starts = np.concatenate([[0], segment.doc_ends[:-1]])
    documents = zip(doc_starts, segment.doc_ends, segment.doc_is_padding, strict=True)
    for doc_start, doc_end, is_padding in documents:
        first = max(doc_start - 1, 0) if is_padding else doc_end - 1
        if is_padding or window is Window.SHORT:
            labels_T[max(first - start, 0) : max(doc_end - start, 0)] = IGNORED_LABEL
    return labels_T


def load_rank_batch(
    store: SegmentSource,
    micro_step: MicroStep,
    dims: ParallelDims,
    sequence_group: ProcessGroup | None,
    *,
    context_group: ProcessGroup | None = None,
    mixed: bool = True,
    kernel: AttentionKernel = AttentionKernel.sdpa,
) -> RankBatch:
    """Read this rank's share of its data-parallel group's segment, and no other tokens of it.

    ``mixed`` False treats every segment as long (the paper's ablation without mixed windows);
    ``kernel`` will compute the attention.
    """
    segment = store.segment(micro_step.segment_ids[dims.data_rank])
    assert segment.window is micro_step.window, (
        f"segment {segment.index} is {segment.window}, not {micro_step.window}"
    )
    window = segment.window if mixed else Window.LONG
    attended_ends = segment.doc_ends[-1:] if window is Window.LONG else segment.doc_ends
    layout = build_layout(
        window,
        segment.doc_ends.tolist(),
        sequence=Axis(dims.sequence_rank, dims.sequence, sequence_group),
        context=Axis(dims.context_rank, dims.context, context_group),
        kernel=kernel,
    )
    spans = layout.own_spans
    tokens_T = np.concatenate([segment.tokens[start:stop] for start, stop in spans])
    labels_T = np.concatenate([next_token_labels(segment, window, *span) for span in spans])
    return RankBatch(
        tokens_BT=torch.from_numpy(tokens_T.astype(np.int64))[None],
        labels_BT=torch.from_numpy(labels_T)[None],
        window=window,
        layout=layout,
        segment_id=segment.index,
        num_targets=int((labels_T != IGNORED_LABEL).sum()),
        squared_lengths=int((np.diff(attended_ends, prepend=0).astype(np.int64) ** 2).sum()),
    )


def step_batches(
    load: Callable[[int], list[RankBatch]], steps: range, *, ahead: int, device: torch.device | str
) -> Generator[list[RankBatch], None, None]:
    """This rank's micro-steps of each step (0-based) in order, as ``load`` makes them on the CPU.

    ``ahead`` steps are read ahead at most; 0 reads each when it is asked for. Close the generator
    when it is not read to its end.
    """
    if ahead == 0:
        for step in steps:
            yield [batch.to(device) for batch in load(step)]
        return
    waiting: deque[Future[list[RankBatch]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="segment-reader") as reader:
        waiting.extend(reader.submit(load, step) for step in steps[:ahead])
        for position in range(len(steps)):
            batches = waiting.popleft().result()
            if position + ahead < len(steps):
                waiting.append(reader.submit(load, steps[position + ahead]))
            yield [batch.to(device) for batch in batches]
