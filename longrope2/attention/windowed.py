"""The attention that a segment's layout asks for, as a function of transformers' attention registry.

Registered under ``ATTENTION_NAME``; transformers builds no mask for a name it does not know, so the layout, passed to the
model as the keyword ``layout``, is the only source of structure. Without a layout the row is plain causal, which also
serves cached decoding.

Shape legend: B = rows, H = query heads, K = key/value heads, T = query tokens, C = key tokens, D = head dim,
N = documents of a bucket, S = padded length of a bucket.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longrope2.attention.exchange import heads_to_tokens, tokens_to_heads
from longrope2.attention.kept import keep_or_repeat
from longrope2.attention.kernels import AttentionKernel, dense_attention, varlen_attention
from longrope2.attention.layout import DocumentBucket, SegmentLayout

__all__ = [
    "ATTENTION_NAME",
    "causal_attention",
    "document_attention",
    "padded_decoding_attention",
    "register_attention",
    "windowed_attention",
]

ATTENTION_NAME = "longrope2_windowed"


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
        # On a GPU flash attention knows this alignment; a mask would need a kernel that materialises T x C scores.
        if q_BHTD.is_cuda:
            mask_TC = causal_lower_right(num_queries, num_keys)
        else:
            mask_TC = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(diagonal=num_keys - num_queries)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BKCD, v_BKCD, attn_mask=mask_TC, is_causal=num_queries == num_keys, scale=scaling, enable_gqa=grouped
    )


def padded_decoding_attention(
    q_BH1D: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, first_key_B: Tensor, scaling: float
) -> Tensor:
    """Attention of one new token per row to its cached keys, those before ``first_key_B`` being padding: [B, 1, H, D]."""
    # The query heads that share a key head take the place of query tokens: keys need not be repeated.
    q_BKGD = q_BH1D.reshape(q_BH1D.shape[0], k_BKCD.shape[1], -1, q_BH1D.shape[-1])
    is_key_BC = torch.arange(k_BKCD.shape[2], device=first_key_B.device) >= first_key_B[:, None]
    out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKCD, v_BKCD, attn_mask=is_key_BC[:, None, None], scale=scaling)
    return out_BKGD.flatten(1, 2)[:, None]


def document_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float) -> Tensor:
    """Causal attention inside each document of a single row (B = 1); a long window is one document."""
    assert q_BHTD.shape[0] == 1, "packed segments have one row"
    if layout.kernel is not AttentionKernel.sdpa:
        return _kernel_attention(q_BHTD, k_BKTD, v_BKTD, layout, scaling)
    outputs_THD = []
    for bucket in layout.buckets:
        q_NHSD, k_NKSD, v_NKSD = (_gather_documents(x, bucket) for x in (q_BHTD, k_BKTD, v_BKTD))
        out_NHSD = causal_attention(q_NHSD, k_NKSD, v_NKSD, scaling)
        outputs_THD.append(out_NHSD.transpose(1, 2).flatten(0, 1).index_select(0, bucket.slot_index_T))
    for start, stop in layout.spans:
        q_BHSD, k_BKSD, v_BKSD = (x[:, :, start:stop] for x in (q_BHTD, k_BKTD, v_BKTD))
        outputs_THD.append(causal_attention(q_BHSD, k_BKSD, v_BKSD, scaling)[0].transpose(0, 1))
    out_THD = outputs_THD[0] if len(outputs_THD) == 1 else torch.cat(outputs_THD)
    if layout.restore_T is not None:
        out_THD = out_THD.index_select(0, layout.restore_T)
    return out_THD.transpose(0, 1)[None]


def _segment_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float) -> Tensor:
    """Attention over a segment that sequence-parallel ranks may share, [B, T, H, D]."""
    group = layout.exchange_group
    if group is not None:
        q_BHTD, k_BKTD, v_BKTD = tokens_to_heads(q_BHTD, k_BKTD, v_BKTD, group)
    out_BTHD = document_attention(q_BHTD, k_BKTD, v_BKTD, layout, scaling).transpose(1, 2)
    return out_BTHD if group is None else heads_to_tokens(out_BTHD, group)


def _kernel_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: SegmentLayout, scaling: float) -> Tensor:
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
    return x_BHTD[0].index_select(1, index_NS.flatten()).unflatten(1, index_NS.shape).transpose(0, 1)


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
    """Adapter to the signature transformers calls; ``unused`` holds what other attention kinds read.

    ``first_needed``: in the last layer, whose output no other layer reads, earlier positions get zeros. ``first_key_B``:
    cached decoding of rows padded on the left.
    """
    if attention_mask is not None or dropout:
        raise ValueError("windowed attention takes its structure from the layout: no attention_mask, no dropout")
    scale = scaling or query.shape[-1] ** -0.5
    if first_key_B is not None:
        return padded_decoding_attention(query, key, value, first_key_B, scale), None
    if first_needed and layout is None and module.layer_idx == module.config.num_hidden_layers - 1:
        out_BSHD = windowed_attention(query[:, :, first_needed:], key, value, None, scale)
        return F.pad(out_BSHD, (0, 0, 0, 0, first_needed, 0)), None
    return windowed_attention(query, key, value, layout, scale), None
