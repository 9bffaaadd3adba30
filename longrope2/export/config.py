"""Settings of an export."""

import importlib.util
from dataclasses import dataclass, field
from enum import Enum

import torch

from longrope2.config import StageConfig
from longrope2.errors import ConfigError
from longrope2.export.variants import ExportVariant

__all__ = ["ExportConfig", "ExportDtype", "ExportRoot", "check"]


class ExportDtype(Enum):
    """Number format of the exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The format in torch."""
        return torch.float32 if self is ExportDtype.fp32 else torch.bfloat16


@dataclass
class ExportConfig:
    """What is exported, and how."""

    checkpoint: str | None = None
    """Folder of a finished checkpoint; null is the run's own ``3_checkpoints/final``."""
    dtype: ExportDtype = ExportDtype.fp32
    """Number format of the weights: fp32 is what was trained, bf16 half the size. RoPE tables are always float32."""
    variants: list[ExportVariant] = field(default_factory=lambda: [ExportVariant.dual])
    """Folders to write: ``dual`` (both windows, for transformers), ``long_only`` and ``short_only`` (one window each, for
    engines that choose once at load, such as vLLM). They share their weight files."""
    gguf: bool = False
    """Also write ``model.gguf`` into each folder, with both factor tensors, for llama.cpp (Llama classes; needs the package
    ``gguf``). llama.cpp chooses the factors once, by the size of its context."""
    gguf_pretokenizer: str | None = None
    """llama.cpp's name for the splitting rule of a byte-level BPE tokenizer (llama-bpe, smollm); a SentencePiece tokenizer
    needs none."""
    cost_windows: int = 8
    """Short texts, of L0 tokens at most, on which the cost of a static choice is measured for the model cards (perplexity of
    held-out Python documentation and sources under either RoPE); 0 leaves it unmeasured, and the cards say so."""


@dataclass
class ExportRoot(StageConfig):
    """Configuration of ``launch.export``."""

    export: ExportConfig = field(default_factory=ExportConfig)


def check(config: ExportRoot) -> None:
    """Values outside their range.

    Raises:
        ConfigError: all faults together, each naming its key.
    """
    faults = []
    variants = config.export.variants
    if not variants or len(set(variants)) != len(variants):
        given = [variant.value for variant in variants]
        faults.append(f"export.variants={given} must name one or more of dual, long_only, short_only, each once")
    if config.export.gguf and importlib.util.find_spec("gguf") is None:
        faults.append("export.gguf=true needs the gguf package; run `pip install gguf`")
    if config.export.cost_windows < 0:
        faults.append(f"export.cost_windows={config.export.cost_windows} must be 0 or more")
    if faults:
        raise ConfigError(faults)
