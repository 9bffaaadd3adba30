"""Settings of a generation."""

from dataclasses import dataclass, field

from longrope2.config import MISSING, StageConfig
from longrope2.errors import ConfigError

__all__ = ["GenerateConfig", "GenerateRoot", "check"]


@dataclass
class GenerateConfig:
    """What is continued, and how far."""

    prompt_file: str = MISSING
    """UTF-8 text file with the prompt; a BOS token is put in front of it."""
    max_new_tokens: int = 128
    """Upper bound on the new tokens; an end-of-text token ends earlier."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0, softmax(logits / temperature) is sampled from, with ``seed``."""
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
    if config.generate.temperature < 0:
        faults.append(f"generate.temperature={config.generate.temperature} must be 0 or more")
    if faults:
        raise ConfigError(faults)
