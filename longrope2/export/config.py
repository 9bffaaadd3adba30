"""Settings of an export."""

from dataclasses import dataclass, field
from enum import Enum

import torch

from longrope2.config import StageConfig

__all__ = ["ExportConfig", "ExportDtype", "ExportRoot"]


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


@dataclass
class ExportRoot(StageConfig):
    """Configuration of ``launch.export``."""

    export: ExportConfig = field(default_factory=ExportConfig)
