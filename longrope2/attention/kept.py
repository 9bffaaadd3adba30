"""Attention that is not run again when a checkpointed layer is recomputed.

In the forward pass of a layer, attention's output is put aside, and what attention's own backward pass reads (queries, keys,
values, output) is kept although the layer around it forgets everything. When the layer is recomputed, the output put aside
takes the place of running attention: neither the kernel nor the sequence-parallel exchange is repeated.

Kept per layer and rank, in elements: local tokens * (2 * query heads + 2 * key/value heads) * head dim, and once more
local tokens * query heads * head dim where heads are exchanged (the output before and after the way back).
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

__all__ = ["keep_or_repeat", "kept_attention_contexts"]


class _KeptOutputs:
    """Outputs of one layer's attention, in the order of its calls, between its forward pass and its recomputation."""

    def __init__(self, on_cpu: bool) -> None:
        pin = on_cpu and torch.cuda.is_available()
        self.hooks: saved_tensors_hooks = save_on_cpu(pin_memory=pin) if on_cpu else saved_tensors_hooks(_same, _same)
        self.outputs: deque[tuple[Any, bool]] = deque()
        self.replay = False


_active: ContextVar[_KeptOutputs | None] = ContextVar("kept_attention", default=None)


def kept_attention_contexts(
    *, on_cpu: bool = False
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts that ``torch.utils.checkpoint``'s ``context_fn`` is to return: of the forward and of the recompute.

    Args:
        on_cpu: Keep in CPU memory, page-locked where there is a GPU.
    """
    kept = _KeptOutputs(on_cpu)
    return _activate(kept, replay=False), _activate(kept, replay=True)


def keep_or_repeat(attention: Callable[[], Tensor]) -> Tensor:
    """Run ``attention``; inside the contexts above keep its result, or give back what was kept."""
    kept = _active.get()
    if kept is None:
        return attention()
    if kept.replay:
        packed, requires_grad = kept.outputs.popleft()
        return kept.hooks.unpack_hook(packed).requires_grad_(requires_grad)
    with kept.hooks:  # inner hooks win over the checkpoint's, which would forget
        output = attention()
    kept.outputs.append((kept.hooks.pack_hook(output.detach()), output.requires_grad))
    return output


@contextmanager
def _activate(kept: _KeptOutputs, *, replay: bool) -> Iterator[None]:
    """Make ``kept`` what attention on this thread uses."""
    kept.replay = replay
    token = _active.set(kept)
    try:
        yield
    finally:
        _active.reset(token)


def _same(x: Any) -> Any:
    """Pack and unpack without a change."""
    return x
