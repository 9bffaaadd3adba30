"""Floating-point operations of a forward pass, from the architecture alone.

A multiply-add counts as two operations. Causal attention counts the half of the square that is computed. Norms, rotary
and softmax are left out (below 1 % at these sizes), and so is the LM head, which the search gives a few positions only.
"""

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ForwardCost"]


@dataclass(frozen=True)
class ForwardCost:
    """What one forward pass costs.

    Attributes:
        layer_parameters: Weights of all layers that every token meets, without embeddings and LM head.
        num_layers: Layers.
        attention_width: Query heads times head dimension.
    """

    layer_parameters: int
    num_layers: int
    attention_width: int

    @classmethod
    def from_config(cls, folder: Path) -> "ForwardCost":
        """Read config.json of a Llama-like model (separate or fused projections count alike, gated MLP)."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        mlp = 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"]
        return cls(layers * (attention + mlp), layers, heads * head_dim)

    def flops(self, num_tokens: int) -> float:
        """Operations of one forward pass over ``num_tokens`` tokens with full causal attention."""
        projections = 2.0 * self.layer_parameters * num_tokens
        attention = 2.0 * self.num_layers * self.attention_width * float(num_tokens) ** 2
        return projections + attention
