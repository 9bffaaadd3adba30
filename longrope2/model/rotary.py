"""The rotary module that applies exactly the table it is told to.

transformers picks a table from ``max(position_ids)``, which under sequence parallelism makes ranks of one segment
disagree. Here the window is set from the segment's tag before the forward, and positions only index the table.

Shape legend: B = rows, T = tokens, I = rotary dim / 2 cosine indices, R = rotary dim.
"""

import torch
from torch import Tensor, nn

from longrope2.rope import RescaleFactors, Window

__all__ = ["WindowedRotary"]


class WindowedRotary(nn.Module):
    """Stands in for a transformers rotary module: same call, explicit window.

    The frequency tables are float32 and deliberately not registered as buffers: DeepSpeed's bf16 mode casts buffers, and
    bf16 frequencies break long prompts.
    """

    def __init__(self, factors: RescaleFactors) -> None:
        super().__init__()
        self.window = Window.SHORT
        self.set_factors(factors)

    def set_factors(self, factors: RescaleFactors) -> None:
        """Replace both tables."""
        self._tables_I = {window: factors.inverse_frequencies(window) for window in Window}
        self._scales = {window: factors.attention_scale(window) for window in Window}

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for ``position_ids`` [B, T], each [B, T, R] in the dtype of ``x``; angles are float32."""
        table_I = self._tables_I[self.window] = self._tables_I[self.window].to(x.device)
        angles_BTI = position_ids[..., None].float() * table_I
        angles_BTR = torch.cat((angles_BTI, angles_BTI), dim=-1)
        scale = self._scales[self.window]
        return (angles_BTR.cos() * scale).to(x.dtype), (angles_BTR.sin() * scale).to(x.dtype)
