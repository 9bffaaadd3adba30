"""Settings of a generation, and the rules that need nothing else to be checked."""

import math
from dataclasses import dataclass, field
from enum import Enum

from longrope2.config import MISSING, StageConfig


class KvPolicy(Enum):
    """What becomes of the cached keys and values when a sequence outgrows the original window."""

    reprefill = "reprefill"
    """The sequence is read again with the rescaled RoPE: exact, the model that was trained."""
    rerotate = "rerotate"
    """The cached keys are turned to the rescaled RoPE in place: cheap, and inexact beyond layer
    0, because deeper keys and values were computed from hidden states under the original
    RoPE."""


@dataclass
class GenerateConfig:
    """What is continued, and how far."""

    prompt_file: str = MISSING
    """UTF-8 text file with the prompt, ``-`` for standard input; a BOS token is put in front of
    it."""
    max_new_tokens: int = 128
    """Upper bound on the new tokens; an end-of-text token ends earlier."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0, softmax(logits / temperature) is sampled from, with
    ``seed``."""
    prefill_chunk: int | None = 8192
    """Tokens of the prompt read at a time, all with the RoPE that the whole prompt's length asks
    for: bounds the memory of activations, not of the cache. null reads the prompt at once."""
    kv_policy: KvPolicy = KvPolicy.reprefill
    """When the text outgrows the original window: ``reprefill`` reads it again (exact),
    ``rerotate`` turns the cached keys (cheap, inexact beyond layer 0; python -m
    benchmarks.kv_policies measures its loss)."""
    checkpoint: str | None = None
    """Folder of a finished checkpoint, or of an export; null is the run's own
    ``3_checkpoints/final``."""


@dataclass
class GenerateRoot(StageConfig):
    """Configuration of ``launch.generate``."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)


def settings_faults(config: GenerateRoot) -> list[str]:
    """Values outside their range, each naming its key."""
    given = config.generate
    faults = []
    if given.max_new_tokens < 1:
        faults.append(f"generate.max_new_tokens={given.max_new_tokens} must be at least 1")
    if given.prefill_chunk is not None and given.prefill_chunk < 1:
        faults.append(f"generate.prefill_chunk={given.prefill_chunk} must be at least 1, or null")
    if not 0 <= given.temperature < math.inf:
        faults.append(f"generate.temperature={given.temperature} must be 0 or more, and finite")
    return faults
