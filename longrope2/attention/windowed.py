"""The attention that a segment's layout asks for, and the way it gets into a transformers model.

Registered under ``ATTENTION_NAME``; transformers builds no mask for a name it does not know, so the
layout, passed to the model as the keyword ``layout``, is the only source of structure. Without one
the rows are plain causal, which also serves cached decoding.

Ulysses exchange: where sequence-parallel ranks share a segment, "my tokens, all heads" is swapped
for "all tokens, my heads", once in and once out per layer. q, k and v travel in one all-to-all.
Each rank needs a contiguous share of the query heads and the key/value heads they read; when there
are fewer of the latter than ranks, each is sent to all ranks that need it. The context axis lies
outside: once the heads are exchanged, each rank gathers its heads' keys and values of the whole
segment (``context``) and attends with its own queries, so that heads do not limit how many ranks
share a segment.

Recomputed layers need not run attention again: in the forward pass its output is put aside, and
what its own backward pass reads (queries, keys, values, output) is kept although the layer around
it forgets everything. When the layer is recomputed, neither the kernel nor the exchange is
repeated. Kept per layer and rank, in elements: local tokens * (2 * query heads + 2 * key/value
heads) * head dim, and once more local tokens * query heads * head dim where heads are exchanged
(the output before and after the way back). Where keys and values are gathered, those of the whole
segment are kept.

Shape legend: B = rows, H = query heads, K = key/value heads, T = query tokens, C = key tokens, D =
head dim, N = documents of a bucket, S = padded length of a bucket.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longrope2.attention.context import gather_keys
from longrope2.attention.kernels import dense_attention, varlen_attention
from longrope2.attention.layout import (
    CausalRows,
    Dense,
    DocumentBucket,
    Documents,
    Gathered,
    Padded,
    SegmentLayout,
)
from longrope2.kernel_choice import AttentionKernel

TOKEN_DIM, HEAD_DIM = 1, 2
ATTENTION_NAME = "longrope2_windowed"


# Whether each call of attention was given a layout, while somebody watches.
_watched: ContextVar[list[bool] | None] = ContextVar("watched_layouts", default=None)


class UnsupportedAttentionError(ValueError):
    """A model asks its attention for what this one does not do; says what."""


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _registry_entry)


@contextmanager
def watch_layouts() -> Iterator[list[bool]]:
    """Whether each call of attention in the context is given a layout.

    A class whose decoder layers do not hand keyword arguments on would lose it without a word.
    """
    seen: list[bool] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def windowed_attention(
    q_BHTD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, layout: SegmentLayout | None, scaling: float
) -> Tensor:
    """Attention of one layer on one rank, [B, T, H, D], of rotated queries and keys.

    C > T only with a cache, which excludes a layout. ``scaling`` multiplies q.k, usually D ** -0.5.
    """
    if layout is None:
        return causal_attention(q_BHTD, k_BKCD, v_BKCD, scaling).transpose(1, 2)
    return _keep_or_repeat(
        lambda: _segment_attention(
            q_BHTD, k_BKTD=k_BKCD, v_BKTD=v_BKCD, layout=layout, scaling=scaling
        )
    )


def causal_attention(q_BHTD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, scaling: float) -> Tensor:
    """Causal attention, [B, H, T, D]; of fewer queries than keys (cached), they are the last."""
    num_queries, num_keys = q_BHTD.shape[2], k_BKCD.shape[2]
    mask_TC = None
    if 1 < num_queries < num_keys:
        # On a GPU flash attention knows this alignment; a mask would need a kernel that
        # materialises T x C scores.
        if q_BHTD.is_cuda:
            mask_TC = causal_lower_right(num_queries, num_keys)
        else:
            mask_TC = _lower_right_mask(num_queries, num_keys, q_BHTD.dtype)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKCD,
        v_BKCD,
        attn_mask=mask_TC,
        is_causal=num_queries == num_keys,
        scale=scaling,
        enable_gqa=q_BHTD.shape[1] != k_BKCD.shape[1],
    )


@lru_cache(maxsize=2)  # of a context rank's early and late chunk
def _lower_right_mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """What a CPU adds to scores, [T, C]: one for all layers.

    The kernel keeps it for its backward pass, and makes its own of every boolean one.
    """
    with torch.inference_mode(False):  # a mask that scoring makes serves training too
        mask_TC = torch.full((num_queries, num_keys), -torch.inf, dtype=dtype)
        return mask_TC.triu_(diagonal=num_keys - num_queries + 1)


def document_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, documents: Documents, scaling: float
) -> Tensor:
    """Causal attention inside each document of a single row (B = 1), [B, T, H, D]."""
    assert q_BHTD.shape[0] == 1, "packed segments have one row"
    if isinstance(documents, Padded):
        return _padded_attention(
            q_BHTD, k_BKTD=k_BKTD, v_BKTD=v_BKTD, documents=documents, scaling=scaling
        )
    if documents.kernel is AttentionKernel.sdpa:
        return causal_attention(q_BHTD, k_BKTD, v_BKTD, scaling).transpose(1, 2)
    q_BTHD, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    if isinstance(documents, Dense):
        return dense_attention(q_BTHD, k_BTKD, v_BTKD, scaling)
    return varlen_attention(
        q_BTHD[0], k_TKD=k_BTKD[0], v_TKD=v_BTKD[0], documents=documents, scaling=scaling
    )[None]


def _padded_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, documents: Padded, scaling: float
) -> Tensor:
    """Buckets and large documents one after the other, then back in token order."""
    outputs_THD = []
    for bucket in documents.buckets:
        q_NHSD, k_NKSD, v_NKSD = (_gather_documents(x, bucket) for x in (q_BHTD, k_BKTD, v_BKTD))
        out_NSHD = causal_attention(q_NHSD, k_NKSD, v_NKSD, scaling).transpose(1, 2)
        outputs_THD.append(out_NSHD.flatten(0, 1).index_select(0, bucket.slot_index_T))
    for start, stop in documents.spans:
        q_BHSD, k_BKSD, v_BKSD = (x[:, :, start:stop] for x in (q_BHTD, k_BKTD, v_BKTD))
        outputs_THD.append(causal_attention(q_BHSD, k_BKSD, v_BKSD, scaling)[0].transpose(0, 1))
    out_THD = outputs_THD[0] if len(outputs_THD) == 1 else torch.cat(outputs_THD)
    if documents.restore_T is not None:
        out_THD = out_THD.index_select(0, documents.restore_T)
    return out_THD[None]


def _gather_documents(x_BHTD: Tensor, bucket: DocumentBucket) -> Tensor:
    """[1, H, T, D] -> [N, H, S, D]."""
    index_NS = bucket.token_index_NS
    # The backward of index_select is several times faster than that of indexing.
    flat_HTD = x_BHTD[0].index_select(1, index_NS.flatten())
    return flat_HTD.unflatten(1, index_NS.shape).transpose(0, 1)


def _padded_decoding_attention(
    q_BH1D: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, first_key_B: Tensor, scaling: float
) -> Tensor:
    """Attention of one new token per row to its cached keys without their padding, [B, 1, H, D]."""
    # The query heads that share a key head stand where query tokens do: no key is repeated.
    q_BKGD = q_BH1D.reshape(q_BH1D.shape[0], k_BKCD.shape[1], -1, q_BH1D.shape[-1])
    is_key_BC = torch.arange(k_BKCD.shape[2], device=first_key_B.device) >= first_key_B[:, None]
    out_BKGD = F.scaled_dot_product_attention(
        q_BKGD, k_BKCD, v_BKCD, attn_mask=is_key_BC[:, None, None], scale=scaling
    )
    return out_BKGD.flatten(1, 2)[:, None]


def _registry_entry(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: SegmentLayout | CausalRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls; ``options`` also holds what other attention kinds read."""
    if attention_mask is not None or options.get("dropout"):
        raise ValueError(
            "windowed attention takes its structure from the layout: no attention_mask, no dropout"
        )
    _refuse_options(key.shape[2], **options)
    if (seen := _watched.get()) is not None:
        seen.append(layout is not None)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if not isinstance(layout, CausalRows):
        return windowed_attention(
            query, k_BKCD=key, v_BKCD=value, layout=layout, scaling=scale
        ), None
    if layout.first_key_B is not None:
        return _padded_decoding_attention(
            query, k_BKCD=key, v_BKCD=value, first_key_B=layout.first_key_B, scaling=scale
        ), None
    is_last_layer = module.layer_idx == module.config.num_hidden_layers - 1
    first = layout.first_needed if is_last_layer else 0
    out_BSHD = windowed_attention(
        query[:, :, first:], k_BKCD=key, v_BKCD=value, layout=None, scaling=scale
    )
    return F.pad(out_BSHD, (0, 0, 0, 0, first, 0)) if first else out_BSHD, None


def _refuse_options(
    num_keys: int,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> None:
    """Refuse what would change the result; the rest says how others would compute the same."""
    if softcap is not None:
        cap = f"attn_logit_softcapping={softcap:g}"
        raise UnsupportedAttentionError(f"{cap}: a soft cap on its scores")
    if s_aux is not None:
        raise UnsupportedAttentionError("attention sinks in its softmax")
    if sliding_window is not None and sliding_window < num_keys:
        raise UnsupportedAttentionError(
            f"sliding_window={sliding_window}, shorter than {num_keys} tokens that it reads; "
            "give model.sliding_window=drop for full attention"
        )


def _segment_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float
) -> Tensor:
    """Attention over a segment that ranks of both axes may share, [B, T, H, D]."""
    group, documents = layout.exchange_group, layout.documents
    if group is not None:
        q_BHTD, k_BKTD, v_BKTD = tokens_to_heads(q_BHTD, k_BKTD, v_BKTD, group)
    if isinstance(documents, Gathered):
        keys_of_parts = gather_keys(k_BKTD, v_BKTD, documents)
        out_BTHD = attend_parts(q_BHTD, keys_of_parts, documents, scaling)
    else:
        out_BTHD = document_attention(
            q_BHTD, k_BKTD=k_BKTD, v_BKTD=v_BKTD, documents=documents, scaling=scaling
        )
    if group is None:
        return out_BTHD
    return heads_to_tokens(out_BTHD, group)


def attend_parts(
    q_BHTD: Tensor,
    keys_of_parts: Sequence[tuple[Tensor, Tensor]],
    gathered: Gathered,
    scaling: float,
) -> Tensor:
    """Attention of a context rank's queries, part by part, [B, T, H, D].

    ``keys_of_parts`` are keys and values, each [B, K, C, D].
    """
    outputs_BTHD = [
        document_attention(
            q_BHTD[:, :, slice(*part.queries)],
            k_BKTD=k_BKCD,
            v_BKTD=v_BKCD,
            documents=part.documents,
            scaling=scaling,
        )
        for part, (k_BKCD, v_BKCD) in zip(gathered.parts, keys_of_parts, strict=True)
    ]
    return torch.cat(outputs_BTHD, dim=TOKEN_DIM)


def tokens_to_heads(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange local tokens of all heads for all tokens of the local heads.

    Needs H divisible by the group size n, and K divisible by n or n by K (checked by
    ``ParallelDims``). Returns q [B, H/n, T*n, D] and k, v [B, max(K/n, 1), T*n, D].
    """
    size = torch.distributed.get_world_size(group)
    if (num_kv_heads := k_BKTD.shape[1]) < size:
        k_BKTD = k_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
        v_BKTD = v_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
    # Values may be narrower than keys (latent attention) or wider.
    widths = [x.shape[-1] for x in (q_BHTD, k_BKTD, v_BKTD)]
    padded = [F.pad(x, (0, max(widths) - x.shape[-1])) for x in (q_BHTD, k_BKTD, v_BKTD)]
    # [B, n, heads per rank, T, D] for each of q, k, v, so that rank r's query and key/value heads
    # lie together.
    shares = [x.unflatten(1, (size, x.shape[1] // size)) for x in padded]
    heads_per_share = [share.shape[2] for share in shares]
    fused_BTHD = torch.cat(shares, dim=2).flatten(1, 2).transpose(1, 2).contiguous()
    exchanged_BHTD = _all_to_all(fused_BTHD, HEAD_DIM, TOKEN_DIM, group).transpose(1, 2)
    parts = exchanged_BHTD.split(heads_per_share, dim=1)
    q, k, v = (x[..., :width] for x, width in zip(parts, widths, strict=True))
    return q, k, v


def heads_to_tokens(out_BThD: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange back: [B, T*n, H/n, D] -> [B, T, H, D]."""
    return _all_to_all(out_BThD.contiguous(), TOKEN_DIM, HEAD_DIM, group)


def _all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: ProcessGroup) -> Tensor:
    """DeepSpeed's differentiable all-to-all; batch is dimension 0."""
    # It loads for seconds, and only ranks that share segments need it.
    from deepspeed.sequence.layer import _SeqAllToAll

    exchanged = _SeqAllToAll.apply(group, x, scatter_dim, gather_dim, 0)
    assert isinstance(exchanged, Tensor)
    return exchanged


class _KeptOutputs:
    """Outputs of one layer's attention, by call, between its forward pass and its recomputation."""

    def __init__(self, on_cpu: bool) -> None:
        self.hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
        if on_cpu:
            self.hooks = save_on_cpu(pin_memory=torch.cuda.is_available())
        self.outputs: deque[tuple[Any, bool]] = deque()
        self.replay = False


_active: ContextVar[_KeptOutputs | None] = ContextVar("kept_attention", default=None)


def kept_attention_contexts(
    *, on_cpu: bool = False
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What ``torch.utils.checkpoint``'s ``context_fn`` returns: for forward and for recompute.

    ``on_cpu`` keeps outputs in CPU memory, page-locked where there is a GPU.
    """
    kept = _KeptOutputs(on_cpu)
    return _activate(kept, replay=False), _activate(kept, replay=True)


def _keep_or_repeat(attention: Callable[[], Tensor]) -> Tensor:
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
