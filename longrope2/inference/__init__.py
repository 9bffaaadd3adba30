"""Generation with the factor switch."""

from longrope2.inference.batch import generate_batch
from longrope2.inference.cache import KvPolicy, prefill, rerotate_keys
from longrope2.inference.config import GenerateConfig, GenerateRoot, check
from longrope2.inference.generation import GeneratedToken, generate_tokens, window_for_length
from longrope2.inference.streaming import TextStream

__all__ = [
    "GenerateConfig",
    "GenerateRoot",
    "GeneratedToken",
    "KvPolicy",
    "TextStream",
    "check",
    "generate_batch",
    "generate_tokens",
    "prefill",
    "rerotate_keys",
    "window_for_length",
]
