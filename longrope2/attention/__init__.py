"""Document-masked and full attention over kernels, with the sequence-parallel exchange."""

from longrope2.attention.kept import kept_attention_contexts
from longrope2.attention.kernels import AttentionConfig, AttentionKernel, choose_kernel, kernel_fault
from longrope2.attention.layout import SegmentLayout, build_layout, chunk_bounds
from longrope2.attention.windowed import ATTENTION_NAME, register_attention, windowed_attention

__all__ = [
    "ATTENTION_NAME",
    "AttentionConfig",
    "AttentionKernel",
    "SegmentLayout",
    "build_layout",
    "choose_kernel",
    "chunk_bounds",
    "kept_attention_contexts",
    "kernel_fault",
    "register_attention",
    "windowed_attention",
]
