"""Rescale factors written into a Hugging Face config.json, in the layout before transformers 5 and the one since.

Where the versions differ (all read in their source):

* 4.x reads ``rope_scaling`` and a top-level ``rope_theta``; 5.x reads ``rope_parameters``, but ``rope_scaling`` wins
  where both stand. So both are written, saying the same.
* The original length is read at the top level only (4.x) or inside with the top level winning (5.x): both are written.
* ``attention_factor`` defaults to sqrt(1 + ln s / ln L0) in BOTH windows, which changes the short window of the
  pre-trained model: it is always written.
* ``factor`` wins over the ratio of lengths in 5.x and is replaced by it before: both say s.
"""

from collections.abc import Sequence
from typing import Any

from longrope2.rope.frequencies import RopeGeometry

__all__ = ["longrope_keys"]


def longrope_keys(
    *,
    short_factors: Sequence[float],
    long_factors: Sequence[float],
    geometry: RopeGeometry,
    target_len: int,
    attention_scale: float,
    head_dim: int | None,
) -> dict[str, Any]:
    """Top-level keys of a config.json whose RoPE is Hugging Face's ``longrope`` with these factors."""
    scaling = {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": list(short_factors),
        "long_factor": list(long_factors),
        "factor": target_len / geometry.original_len,
        "attention_factor": attention_scale,
        "original_max_position_embeddings": geometry.original_len,
    }
    partial = {}
    if head_dim is not None and head_dim != geometry.rotary_dim:
        partial = {"partial_rotary_factor": geometry.rotary_dim / head_dim}
    return {
        "rope_theta": geometry.rope_base,
        "max_position_embeddings": target_len,
        "original_max_position_embeddings": geometry.original_len,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": geometry.rope_base, **partial},
        **partial,
    }
