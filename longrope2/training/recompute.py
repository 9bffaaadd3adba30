"""What the backward pass computes again instead of remembering: ``training.recompute``.

- ``none``: everything is remembered.
- ``full``: of a decoder layer only its input; the whole layer runs again, attention included.
- ``dense``: its input and what attention's backward reads; everything but attention (the dense products, norms, rotary) runs
  again. At 131,072 tokens attention is most of the work, so this is nearly as fast as ``none`` (attention/kept.py says what
  it costs in memory).

All three give the same loss and gradients: nothing is approximated, and the recomputation repeats the same operations.
``training.offload_activations`` keeps what is remembered between layers in CPU memory.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, noop_context_fn

from longrope2.attention import kept_attention_contexts
from longrope2.errors import ConfigError
from longrope2.training.config import Recompute

__all__ = ["apply_recompute"]


def apply_recompute(hf: Any, policy: Recompute, *, offload: bool = False) -> None:
    """Checkpoint every decoder layer of a transformers model as the policy says; it acts in training mode only.

    Args:
        hf: The model.
        policy: ``training.recompute``.
        offload: ``training.offload_activations``; needs a policy other than ``none``.

    Raises:
        ConfigError: the model class has no layers that can be checkpointed.
    """
    if policy is Recompute.none:
        return
    try:
        hf._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(_checkpointed, policy=policy, offload=offload)
        )
    except ValueError:
        raise ConfigError([
            f"training.recompute={policy.value}: {type(hf).__name__} has no layers that can be recomputed; use none"
        ]) from None  # fmt: skip


def _checkpointed(layer: Callable[..., Any], *inputs: Tensor, policy: Recompute, offload: bool) -> Any:
    """One layer's forward; ``inputs`` are what it is given by position, its hidden states."""
    contexts = noop_context_fn
    if policy is Recompute.dense:
        contexts = partial(kept_attention_contexts, on_cpu=offload)
    # The checkpoint saves the layer's inputs under the hooks that are open around it, and no other tensor.
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
