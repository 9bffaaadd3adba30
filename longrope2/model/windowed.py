"""A Hugging Face causal model whose window is an explicit input of every forward.

Nothing of the model is re-implemented: its rotary module is replaced and its attention goes through the registry.

Shape legend: B = rows, T = tokens, H = hidden size, V = vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from longrope2.attention import ATTENTION_NAME, SegmentLayout, register_attention
from longrope2.model.loss import token_loss_sum
from longrope2.model.rotary import WindowedRotary
from longrope2.rope import RescaleFactors, Window

__all__ = ["WindowedModel"]


class WindowedModel(nn.Module):
    """Wraps ``hf`` (a transformers ``...ForCausalLM``) in place; ``hf`` itself stays usable for cached decoding."""

    def __init__(self, hf: Any, factors: RescaleFactors) -> None:
        super().__init__()
        register_attention()
        hf.set_attn_implementation(ATTENTION_NAME)
        self.hf = hf
        self.rotary = WindowedRotary(factors)
        hf.base_model.rotary_emb = self.rotary
        self.factors = factors

    def set_factors(self, factors: RescaleFactors) -> None:
        """Swap the rescale factors; the weights stay."""
        self.factors = factors
        self.rotary.set_factors(factors)

    def use_window(self, window: Window) -> None:
        """Select the rotary table for the plain ``self.hf(...)`` calls that follow.

        Raises:
            RuntimeError: somebody chose another attention for the model's config, which would ignore layouts and padding.
        """
        if (chosen := self.hf.config._attn_implementation) != ATTENTION_NAME:
            raise RuntimeError(
                f"the attention of this model was changed to {chosen}; does another model share its config?"
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
            first_needed: The caller reads no hidden state before this position; the last layer's attention leaves
                them out (needs ``layout=None``).
        """
        self.use_window(window)
        if positions_BT is None and layout is not None:
            positions_BT = layout.positions_BT
        outputs = self.hf.base_model(
            input_ids=tokens_BT, position_ids=positions_BT, use_cache=False, layout=layout, first_needed=first_needed
        )
        return outputs.last_hidden_state

    def logits(
        self, tokens_BT: Tensor, window: Window, layout: SegmentLayout | None = None, keep: slice | None = None
    ) -> Tensor:
        """Float32 logits [B, kept, V] of the positions in ``keep`` (all when None); only those pass the LM head."""
        hidden_BTH = self.hidden_states(tokens_BT, window, layout)
        if keep is not None:
            hidden_BTH = hidden_BTH[:, keep]
        return self.hf.get_output_embeddings()(hidden_BTH).float()

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, window: Window, layout: SegmentLayout | None) -> Tensor:
        """Summed token loss of this rank's tokens (see ``token_loss_sum``); the training forward."""
        hidden_BTH = self.hidden_states(tokens_BT, window, layout)
        head_VH = self.hf.get_output_embeddings().weight
        return token_loss_sum(hidden_BTH.flatten(0, 1), head_VH, labels_BT.flatten())
