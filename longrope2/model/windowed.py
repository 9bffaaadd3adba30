"""A Hugging Face causal model whose window is an explicit input of every forward.

Nothing of the model is re-implemented: its rotary module is replaced and its attention goes through
the registry. transformers picks a RoPE table from ``max(position_ids)``, which under sequence
parallelism makes ranks of one segment disagree. Here the window is set from the segment's tag
before the forward, and positions only index the table.

Shape legend: B = rows, T = tokens, H = hidden size, I = rotary dim / 2 cosine indices,
R = rotary dim, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longrope2.attention.layout import CausalRows, SegmentLayout
from longrope2.attention.windowed import ATTENTION_NAME, register_attention
from longrope2.errors import ArtifactError
from longrope2.model.given import Arrangement, find_head_rule, find_rotary
from longrope2.model.loss import token_loss_sum
from longrope2.rope.factors import RescaleFactors, Window


class WindowedRotary(nn.Module):
    """Stands in for a transformers rotary module: same call, explicit window.

    The frequency tables are float32 and deliberately not registered as buffers: DeepSpeed's bf16
    mode casts buffers, and bf16 frequencies break long prompts.
    """

    def __init__(self, factors: RescaleFactors, arrangement: Arrangement) -> None:
        super().__init__()
        self.window, self._arrangement = Window.SHORT, arrangement
        self.set_factors(factors)

    def set_factors(self, *factors: RescaleFactors) -> None:
        """Replace both tables: one RoPE for all rows, or one for each."""
        self._tables_B1I = {
            window: torch.stack([each.inverse_frequencies(window) for each in factors])[:, None]
            for window in Window
        }
        self._scales_B11 = {
            window: torch.tensor([each.attention_scale(window) for each in factors])[:, None, None]
            for window in Window
        }

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions [B, T], each [B, T, R] in ``x``'s dtype; float32 angles."""
        for tables in (self._tables_B1I, self._scales_B11):
            tables[self.window] = tables[self.window].to(x.device)
        angles_BTI = position_ids[..., None].float() * self._tables_B1I[self.window]
        angles_BTR = self._arrangement.spread(angles_BTI)
        scale_B11 = self._scales_B11[self.window]
        return (angles_BTR.cos() * scale_B11).to(x.dtype), (angles_BTR.sin() * scale_B11).to(
            x.dtype
        )


class WindowedModel(nn.Module):
    """Wraps a transformers ``...ForCausalLM`` in place; ``hf`` stays usable for cached decoding."""

    def __init__(self, hf: Any, factors: RescaleFactors) -> None:
        super().__init__()
        register_attention()
        rotary = find_rotary(hf)
        self.head_rule = find_head_rule(hf.config)
        hf.set_attn_implementation(ATTENTION_NAME)
        if hf.config._attn_implementation != ATTENTION_NAME:
            raise ArtifactError(
                f"{hf.config.model_type} is not supported: its attention does not go through "
                "transformers' attention functions, so that it cannot be replaced"
            )
        self.hf = hf
        self.rotary = WindowedRotary(factors, rotary.arrangement)
        hf.base_model.rotary_emb = self.rotary
        self.factors = factors

    def set_factors(self, factors: RescaleFactors, *others: RescaleFactors) -> None:
        """Swap the rescale factors; the weights stay.

        With ``others``, every row of the forwards that follow has factors of its own, in order.
        """
        self.factors = factors
        self.rotary.set_factors(factors, *others)

    def use_window(self, window: Window) -> None:
        """Select the rotary table for the plain ``self.hf(...)`` calls that follow.

        Raises:
            RuntimeError: somebody chose another attention for the model's config, which would
                ignore layouts and padding.
        """
        if (chosen := self.hf.config._attn_implementation) != ATTENTION_NAME:
            raise RuntimeError(
                f"the attention of this model was changed to {chosen}; "
                "does another model share its config?"
            )
        self.rotary.window = Window(window)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        window: Window,
        layout: SegmentLayout | None = None,
        positions_BT: Tensor | None = None,
        first_needed: int = 0,
    ) -> Tensor:
        """Final hidden states [B, T, H].

        Args:
            tokens_BT: Token ids; with a layout B = 1 and T = this rank's tokens.
            window: Which RoPE table to apply.
            layout: Structure of the segment; None means every row is plain causal from position 0.
            positions_BT: RoPE positions; taken from the layout, or 0..T-1, when not given.
            first_needed: The caller reads no hidden state before this position; the last layer's
                attention leaves them out (needs ``layout=None``).
        """
        self.use_window(window)
        if positions_BT is None and layout is not None:
            positions_BT = layout.positions_BT
        outputs = self.hf.base_model(
            input_ids=tokens_BT,
            position_ids=positions_BT,
            use_cache=False,
            layout=CausalRows(first_needed) if layout is None else layout,
        )
        return outputs.last_hidden_state

    def logits(
        self,
        tokens_BT: Tensor,
        window: Window,
        layout: SegmentLayout | None = None,
        keep: slice | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Float32 logits [B, kept, V] of the positions in ``keep``: only those pass the LM head."""
        hidden_BTH = self.hidden_states(tokens_BT, window, layout, positions_BT)
        if keep is not None:
            hidden_BTH = hidden_BTH[:, keep]
        return self.head_logits(hidden_BTH)

    def head_logits(self, hidden_BTH: Tensor) -> Tensor:
        """Float32 logits of final hidden states, as the model's class makes them."""
        return self.head_rule.apply(self.hf.get_output_embeddings()(hidden_BTH).float())

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, window: Window, layout: SegmentLayout | None
    ) -> Tensor:
        """Training's forward: summed token loss of this rank's tokens (see ``token_loss_sum``)."""
        return self.loss_sum(self.hidden_states(tokens_BT, window, layout), labels_BT)

    def loss_sum(self, hidden_BTH: Tensor, labels_BT: Tensor) -> Tensor:
        """Summed token loss of final hidden states."""
        head, hidden_TH = self.hf.get_output_embeddings(), hidden_BTH.flatten(0, 1)
        return token_loss_sum(
            hidden_TH, head.weight, labels_BT.flatten(), bias_V=head.bias, rule=self.head_rule
        )
