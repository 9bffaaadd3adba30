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

from dataclasses import dataclass
from pathlib import Path

import torch

from longrope2.model import ForwardCost
from longrope2.model.hf_files import CONFIG_FILE, read_model_config

__all__ = ["PEAK_BF16_TFLOPS", "TrainingCost", "peak_tflops"]

FORWARD_AND_BACKWARD = 3

# Dense bf16 peak by what the device's name contains, the first match counts; from NVIDIA's data sheets.
PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "H800": 989.0, "H20": 148.0,
    "B200": 2250.0, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71.2,
}  # fmt: skip


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
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
