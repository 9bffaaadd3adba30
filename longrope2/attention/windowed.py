"""The attention that a segment's layout asks for, as a function of transformers' attention
registry.

Registered under ``ATTENTION_NAME``; transformers builds no mask for a name it does not know, so the
layout, passed to the model as the keyword ``layout``, is the only source of structure. Without a
layout the row is plain causal, which also serves cached decoding.

Shape legend: B = rows, H = query heads, K = key/value heads, T = query tokens, C = key tokens, D =
head dim, N = documents of a bucket, S = padded length of a bucket.

Attention that is not run again when a checkpointed layer is recomputed.

In the forward pass of a layer, attention's output is put aside, and what attention's own backward
pass reads (queries, keys, values, output) is kept although the layer around it forgets everything.
When the layer is recomputed, the output put aside takes the place of running attention: neither the
kernel nor the sequence-parallel exchange is repeated.

Kept per layer and rank, in elements: local tokens * (2 * query heads + 2 * key/value heads) * head
dim, and once more local tokens * query heads * head dim where heads are exchanged (the output
before and after the way back).

Ulysses exchange: swap "my tokens, all heads" for "all tokens, my heads", once in and once out per
layer.

q, k and v travel in one all-to-all. Each rank needs a contiguous share of the query heads together
with the key/value heads they read; when there are fewer key/value heads than ranks, each is sent to
all ranks that need it.

Shape legend: B = 1 row, H = query heads, K = key/value heads, T = local tokens, D = head dim; a
trailing G marks the whole segment (T * ranks tokens) and h, k the rank's share of heads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longrope2.attention.kernels import AttentionKernel, dense_attention, varlen_attention
from longrope2.attention.layout import DocumentBucket, SegmentLayout

HEAD_DIM_INDEX = 2
TOKEN_DIM_INDEX = 1
ATTENTION_NAME = "longrope2_windowed"


class _KeptOutputs:
    """Outputs of one layer's attention, in the order of its calls, between its forward pass and its recomputation."""

    def __init__(self, on_cpu: bool) -> None:
        pin = on_cpu and torch.cuda.is_available()
        self.hooks: saved_tensors_hooks = (
            save_on_cpu(pin_memory=pin) if on_cpu else saved_tensors_hooks(_same, _same)
        )
        self.outputs: deque[tuple[Any, bool]] = deque()
        self.replay = False


_active: ContextVar[_KeptOutputs | None] = ContextVar("kept_attention", default=None)


def kept_attention_contexts(
    *, on_cpu: bool = False
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts that ``torch.utils.checkpoint``'s ``context_fn`` is to return: of the
    forward and of the recompute.

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


def tokens_to_heads(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange local tokens of all heads for all tokens of the local heads.

    Needs H divisible by the group size n, and K divisible by n or n by K (checked by
    ``ParallelDims``).

    Returns:
        q [B, H/n, T*n, D] and k, v [B, max(K/n, 1), T*n, D].
    """
    size = torch.distributed.get_world_size(group)
    num_kv_heads = k_BKTD.shape[1]
    if num_kv_heads < size:
        k_BKTD = k_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
        v_BKTD = v_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
    # [B, n, heads per rank, T, D] for each of q, k, v, so that rank r's query and key/value heads
    # lie together.
    shares = [x.unflatten(1, (size, x.shape[1] // size)) for x in (q_BHTD, k_BKTD, v_BKTD)]
    heads_per_share = [share.shape[2] for share in shares]
    fused_BTHD = torch.cat(shares, dim=2).flatten(1, 2).transpose(1, 2).contiguous()
    exchanged = _all_to_all(fused_BTHD, HEAD_DIM_INDEX, TOKEN_DIM_INDEX, group).transpose(1, 2)
    q, k, v = exchanged.split(heads_per_share, dim=1)
    return q, k, v


def heads_to_tokens(out_BThD: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange back: [B, T*n, H/n, D] -> [B, T, H, D]."""
    return _all_to_all(out_BThD.contiguous(), TOKEN_DIM_INDEX, HEAD_DIM_INDEX, group)


def _all_to_all(x: Tensor, scatter_dim: int, gather_dim: int, group: ProcessGroup) -> Tensor:
    """DeepSpeed's differentiable all-to-all; batch is dimension 0."""
    from deepspeed.sequence.layer import (
        _SeqAllToAll,  # loads for seconds, and only ranks that share segments need it
    )

    exchanged = _SeqAllToAll.apply(group, x, scatter_dim, gather_dim, 0)
    assert isinstance(exchanged, Tensor)
    return exchanged


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _registry_entry)


def windowed_attention(
    q_BHTD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, layout: SegmentLayout | None, scaling: float
) -> Tensor:
    """Attention of one layer on one rank.

    Args:
        q_BHTD: Rotated queries of the rank's tokens.
        k_BKCD: Rotated keys; C > T only with a cache, which excludes a layout.
        v_BKCD: Values.
        layout: Segment structure, or None for plain causal rows.
        scaling: Multiplier on q.k, usually D ** -0.5.

    Returns:
        [B, T, H, D].
    """
    if layout is None:
        return causal_attention(q_BHTD, k_BKCD, v_BKCD, scaling).transpose(1, 2)
    return keep_or_repeat(lambda: _segment_attention(q_BHTD, k_BKCD, v_BKCD, layout, scaling))


def causal_attention(q_BHTD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, scaling: float) -> Tensor:
    """Causal attention; with more keys than queries, the queries are the last ones (cached decoding)."""
    num_queries, num_keys = q_BHTD.shape[2], k_BKCD.shape[2]
    grouped = q_BHTD.shape[1] != k_BKCD.shape[1]
    mask_TC = None
    if 1 < num_queries < num_keys:
        # On a GPU flash attention knows this alignment; a mask would need a kernel that
        # materialises T x C scores.
        if q_BHTD.is_cuda:
            mask_TC = causal_lower_right(num_queries, num_keys)
        else:
            mask_TC = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(
                diagonal=num_keys - num_queries
            )
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKCD,
        v_BKCD,
        attn_mask=mask_TC,
        is_causal=num_queries == num_keys,
        scale=scaling,
        enable_gqa=grouped,
    )


def padded_decoding_attention(
    q_BH1D: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, first_key_B: Tensor, scaling: float
) -> Tensor:
    """Attention of one new token per row to its cached keys, those before ``first_key_B`` being padding: [B, 1, H, D]."""
    # The query heads that share a key head take the place of query tokens: keys need not be
    # repeated.
    q_BKGD = q_BH1D.reshape(q_BH1D.shape[0], k_BKCD.shape[1], -1, q_BH1D.shape[-1])
    is_key_BC = torch.arange(k_BKCD.shape[2], device=first_key_B.device) >= first_key_B[:, None]
    out_BKGD = F.scaled_dot_product_attention(
        q_BKGD, k_BKCD, v_BKCD, attn_mask=is_key_BC[:, None, None], scale=scaling
    )
    return out_BKGD.flatten(1, 2)[:, None]


def document_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float
) -> Tensor:
    """Causal attention inside each document of a single row (B = 1); a long window is one document."""
    assert q_BHTD.shape[0] == 1, "packed segments have one row"
    if layout.kernel is not AttentionKernel.sdpa:
        return _kernel_attention(q_BHTD, k_BKTD, v_BKTD, layout, scaling)
    outputs_THD = []
    for bucket in layout.buckets:
        q_NHSD, k_NKSD, v_NKSD = (_gather_documents(x, bucket) for x in (q_BHTD, k_BKTD, v_BKTD))
        out_NHSD = causal_attention(q_NHSD, k_NKSD, v_NKSD, scaling)
        outputs_THD.append(
            out_NHSD.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slot_index_T)
        )
    for start, stop in layout.spans:
        q_BHSD, k_BKSD, v_BKSD = (x[:, :, start:stop] for x in (q_BHTD, k_BKTD, v_BKTD))
        outputs_THD.append(causal_attention(q_BHSD, k_BKSD, v_BKSD, scaling)[0].transpose(0, 1))
    out_THD = outputs_THD[0] if len(outputs_THD) == 1 else torch.cat(outputs_THD)
    if layout.restore_T is not None:
        out_THD = out_THD.index_select(0, layout.restore_T)
    return out_THD.transpose(0, 1)[None]


def _segment_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float
) -> Tensor:
    """Attention over a segment that sequence-parallel ranks may share, [B, T, H, D]."""
    group = layout.exchange_group
    if group is not None:
        q_BHTD, k_BKTD, v_BKTD = tokens_to_heads(q_BHTD, k_BKTD, v_BKTD, group)
    out_BTHD = document_attention(q_BHTD, k_BKTD, v_BKTD, layout, scaling).transpose(1, 2)
    return out_BTHD if group is None else heads_to_tokens(out_BTHD, group)


def _kernel_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float
) -> Tensor:
    """The same by a kernel that takes tokens before heads and all documents in one call."""
    q_BTHD, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    if layout.cu_lens_N is None:
        return dense_attention(q_BTHD, k_BTKD, v_BTKD, scaling).transpose(1, 2)
    out_THD = varlen_attention(
        layout.kernel, q_BTHD[0], k_BTKD[0], v_BTKD[0], layout.cu_lens_N, layout.max_len, scaling
    )
    return out_THD.transpose(0, 1)[None]


def _gather_documents(x_BHTD: Tensor, bucket: DocumentBucket) -> Tensor:
    """[1, H, T, D] -> [N, H, S, D]; ``index_select`` because its backward is several times faster than indexing's."""
    index_NS = bucket.token_index_NS
    return (
        x_BHTD[0].index_select(1, index_NS.flatten()).unflatten(1, index_NS.shape).transpose(0, 1)
    )


def _registry_entry(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: SegmentLayout | None = None,
    first_needed: int = 0,
    first_key_B: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Adapter to the signature transformers calls; ``unused`` holds what other attention kinds
    read.

    ``first_needed``: in the last layer, whose output no other layer reads, earlier positions get
    zeros. ``first_key_B``: cached decoding of rows padded on the left.
    """
    if attention_mask is not None or dropout:
        raise ValueError(
            "windowed attention takes its structure from the layout: no attention_mask, no dropout"
        )
    scale = scaling or query.shape[-1] ** -0.5
    if first_key_B is not None:
        return padded_decoding_attention(query, key, value, first_key_B, scale), None
    if first_needed and layout is None and module.layer_idx == module.config.num_hidden_layers - 1:
        out_BSHD = windowed_attention(query[:, :, first_needed:], key, value, None, scale)
        return F.pad(out_BSHD, (0, 0, 0, 0, first_needed, 0)), None
    return windowed_attention(query, key, value, layout, scale), None
