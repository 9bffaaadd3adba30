"""Generation with the factor switch."""

from longrope2.inference.config import GenerateConfig, GenerateRoot, check
from longrope2.inference.generation import GeneratedToken, generate_tokens, window_for_length
from longrope2.inference.streaming import TextStream

__all__ = [
    "GenerateConfig",
    "GenerateRoot",
    "GeneratedToken",
    "TextStream",
    "check",
    "generate_tokens",
    "window_for_length",
]
