"""Ulysses exchange: swap "my tokens, all heads" for "all tokens, my heads", once in and once out per layer.

q, k and v travel in one all-to-all. Each rank needs a contiguous share of the query heads together with the key/value
heads they read; when there are fewer key/value heads than ranks, each is sent to all ranks that need it.

Shape legend: B = 1 row, H = query heads, K = key/value heads, T = local tokens, D = head dim; a trailing G marks the
whole segment (T * ranks tokens) and h, k the rank's share of heads.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["heads_to_tokens", "tokens_to_heads"]

HEAD_DIM_INDEX = 2
TOKEN_DIM_INDEX = 1


def tokens_to_heads(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange local tokens of all heads for all tokens of the local heads.

    Needs H divisible by the group size n, and K divisible by n or n by K (checked by ``ParallelDims``).

    Returns:
        q [B, H/n, T*n, D] and k, v [B, max(K/n, 1), T*n, D].
    """
    size = torch.distributed.get_world_size(group)
    num_kv_heads = k_BKTD.shape[1]
    if num_kv_heads < size:
        k_BKTD = k_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
        v_BKTD = v_BKTD.repeat_interleave(size // num_kv_heads, dim=1)
    # [B, n, heads per rank, T, D] for each of q, k, v, so that rank r's query and key/value heads lie together.
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
    from deepspeed.sequence.layer import _SeqAllToAll  # loads for seconds, and only ranks that share segments need it

    exchanged = _SeqAllToAll.apply(group, x, scatter_dim, gather_dim, 0)
    assert isinstance(exchanged, Tensor)
    return exchanged
