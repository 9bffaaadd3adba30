"""Settings of a generation."""

import math
from dataclasses import dataclass, field

from longrope2.config import MISSING, StageConfig
from longrope2.errors import ConfigError
from longrope2.inference.cache import KvPolicy

__all__ = ["GenerateConfig", "GenerateRoot", "check"]


@dataclass
class GenerateConfig:
    """What is continued, and how far."""

    prompt_file: str = MISSING
    """UTF-8 text file with the prompt, ``-`` for standard input; a BOS token is put in front of it."""
    max_new_tokens: int = 128
    """Upper bound on the new tokens; an end-of-text token ends earlier."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0, softmax(logits / temperature) is sampled from, with ``seed``."""
    prefill_chunk: int | None = 8192
    """Tokens of the prompt read at a time, all with the RoPE that the whole prompt's length asks for: bounds the memory of
    activations, not of the cache. null reads the prompt at once."""
    kv_policy: KvPolicy = KvPolicy.reprefill
    """When the text outgrows the original window: ``reprefill`` reads it again (exact), ``rerotate`` turns the cached keys
    (cheap, inexact beyond layer 0; python -m benchmarks.kv_policies measures its loss)."""
    checkpoint: str | None = None
    """Folder of a finished checkpoint; null is the run's own ``3_checkpoints/final``."""


@dataclass
class GenerateRoot(StageConfig):
    """Configuration of ``launch.generate``."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)


def check(config: GenerateRoot) -> None:
    """Values outside their range.

    Raises:
        ConfigError: all faults together, each naming its key.
    """
    faults = []
    if config.generate.max_new_tokens < 1:
        faults.append(f"generate.max_new_tokens={config.generate.max_new_tokens} must be at least 1")
    if config.generate.prefill_chunk is not None and config.generate.prefill_chunk < 1:
        faults.append(f"generate.prefill_chunk={config.generate.prefill_chunk} must be at least 1, or null")
    if not 0 <= config.generate.temperature < math.inf:
        faults.append(f"generate.temperature={config.generate.temperature} must be 0 or more, and finite")
    if faults:
        raise ConfigError(faults)
