"""What the planner knows of a model: sizes from config.json, and the parameters and FLOPs that follow from them."""

from dataclasses import dataclass
from pathlib import Path

from longrope2.errors import ArtifactError
from longrope2.model.hf_files import CONFIG_FILE, read_model_config
from longrope2.rope import Window

__all__ = ["ModelShape", "Workload"]

SIZE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
FORWARD_AND_BACKWARD = 3
# Causal attention computes half of the square of every span attended by itself.
CAUSAL_SHARE = 0.5


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model (gated MLP, RMSNorm); separate and fused projections count alike."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    """Whether the LM head is the input embedding."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelShape":
        """Read a folder's config.json; nothing else of the model needs to be there.

        Raises:
            ArtifactError: no config.json, or one that lacks a size.
        """
        config = read_model_config(folder / CONFIG_FILE)
        missing = [key for key in SIZE_KEYS if config.get(key) is None]
        if missing:
            raise ArtifactError(
                f"{folder / CONFIG_FILE} holds no {', '.join(missing)}; plans are made for Llama-like models"
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            hidden=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def query_width(self) -> int:
        """Query heads times head dimension."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Key/value heads times head dimension."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Matrix weights of one layer; its norms are left out."""
        return 2 * self.hidden * (self.query_width + self.kv_width) + 3 * self.hidden * self.mlp

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.hidden * self.vocabulary

    @property
    def matrix_parameters(self) -> int:
        """Weights a token is multiplied with: all layers and the LM head, the input embedding not."""
        return self.num_layers * self.layer_parameters + self.head_parameters

    @property
    def parameters(self) -> int:
        """All parameters: matrices, input embedding, norms."""
        embedding = 0 if self.tied else self.head_parameters
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.matrix_parameters + embedding + norms

    def attention_flops(self, attended_len: float) -> float:
        """Forward FLOPs of causal attention per token, all layers: half of two products with ``attended_len`` keys."""
        return CAUSAL_SHARE * 4.0 * self.num_layers * self.query_width * attended_len

    def model_flops(self, attended_len: float, *, whole_square: bool = False) -> float:
        """Model FLOPs of forward and backward per token; nothing that recompute repeats.

        6 * N + 6 * layers * width * L_eff with N = ``matrix_parameters``: a multiply-add is two operations, backward twice
        the forward, attention the causal half.

        Args:
            attended_len: L_eff in tokens: the segment length where attention is over the whole segment, else the sum of
                squared document lengths over the sum of document lengths.
            whole_square: Count attention's upper triangle too, as many reports and torch's ``FlopCounterMode`` do.
        """
        attention = self.attention_flops(attended_len) / (CAUSAL_SHARE if whole_square else 1.0)
        return FORWARD_AND_BACKWARD * (2.0 * self.matrix_parameters + attention)


@dataclass(frozen=True)
class Workload:
    """What is trained: how many tokens, in segments of which kind."""

    target_len: int
    """Tokens of a segment."""
    step_tokens: int
    """Tokens of one optimizer step, all processes."""
    total_tokens: int
    """Tokens of the run."""
    long_share: float
    """Share of the segments that are long."""
    short_document_tokens: float
    """L_eff of a short segment: sum of squared over sum of document lengths."""

    @property
    def segments_per_step(self) -> int:
        """Segments of one optimizer step."""
        return self.step_tokens // self.target_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.total_tokens // self.step_tokens

    def attended_len(self, window: Window) -> float:
        """L_eff of one window kind."""
        return self.target_len if window is Window.LONG else self.short_document_tokens

    def share(self, window: Window) -> float:
        """Share of the segments that are of a kind."""
        return self.long_share if window is Window.LONG else 1.0 - self.long_share

    def mean_model_flops(self, shape: ModelShape, *, whole_square: bool = False) -> float:
        """Model FLOPs per token over the mix."""
        return sum(self.share(w) * shape.model_flops(self.attended_len(w), whole_square=whole_square) for w in Window)
