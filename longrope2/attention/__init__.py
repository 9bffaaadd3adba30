"""Document-masked and full attention over kernels, with the sequence-parallel exchange."""

from longrope2.attention.layout import SegmentLayout, build_layout, chunk_bounds
from longrope2.attention.windowed import ATTENTION_NAME, register_attention, windowed_attention

__all__ = [
    "ATTENTION_NAME",
    "SegmentLayout",
    "build_layout",
    "chunk_bounds",
    "register_attention",
    "windowed_attention",
]
