"""Model FLOPs of a training step and the model FLOPs utilisation (MFU).

Convention (*causal* MFU):

- a multiply-add counts as two operations; backward counts twice the forward;
- weights: every matrix a token is multiplied with, the LM head included, the input embedding not;
- attention: only the causal half of each square that is really attended, so the whole segment in a long window and every
  document by itself in a short one: per token 6 * layers * width * (sum of squared lengths / sum of lengths);
- what recompute repeats is not counted (that would be hardware utilisation), nor are norms, rotary and softmax;
- padding counts, as it does in the tokens per second.

Many reports count the whole attention square: at 128k that is 1.7 times as much for LLaMA3-8B.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from longrope2.model import ForwardCost
from longrope2.model.hf_files import CONFIG_FILE, read_model_config
from longrope2.planning import PEAK_BF16_TFLOPS

__all__ = ["PEAK_BF16_TFLOPS", "TrainingCost", "peak_tflops"]

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class TrainingCost:
    """What training one model costs.

    Attributes:
        forward: Layers of the model.
        head_parameters: Weights of the LM head.
    """

    forward: ForwardCost
    head_parameters: int

    @classmethod
    def from_config(cls, folder: Path) -> "TrainingCost":
        """Read a model folder's config.json."""
        config = read_model_config(folder / CONFIG_FILE)
        return cls(ForwardCost.from_config(folder), config["hidden_size"] * config["vocab_size"])

    def flops(self, num_tokens: int, squared_lengths: float) -> float:
        """Model FLOPs of forward and backward.

        Args:
            num_tokens: Tokens of all segments.
            squared_lengths: Sum over all spans attended by themselves (documents of short windows, whole segments of
                long ones) of their squared length.
        """
        weights = 2.0 * (self.forward.layer_parameters + self.head_parameters) * num_tokens
        attention = 2.0 * self.forward.num_layers * self.forward.attention_width * squared_lengths
        return FORWARD_AND_BACKWARD * (weights + attention)


def peak_tflops(device: torch.device, configured: float | None, *, bf16: bool) -> float | None:
    """Peak TFLOP/s of one device: ``training.peak_tflops`` if given, else the table's for bf16 on a known GPU, else None."""
    if configured is not None or device.type != "cuda" or not bf16:
        return configured
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
