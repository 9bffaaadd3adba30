"""What the planner knows of a model: sizes from config.json, and the parameters and FLOPs that
follow from them.

A model's config.json: where it stands, and what its model class adds to it. No weights are touched.

Floating-point operations of a forward pass, from the architecture alone.

A multiply-add counts as two operations. Causal attention counts the half of the square that is
computed. Norms, rotary and softmax are left out (below 1 % at these sizes), and so is the LM head,
which the search gives a few positions only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope2.errors import ArtifactError
from longrope2.model.folder import resolve_model_folder
from longrope2.rope.factors import Window

CONFIG_FILE = "config.json"
CLASS_DEFAULTS = ("rope_theta", "partial_rotary_factor")
SIZE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
FORWARD_AND_BACKWARD = 3
# Causal attention computes half of the square of every span attended by itself.
CAUSAL_SHARE = 0.5


def find_config_file(path: str, key: str) -> Path:
    """The config.json of a model given as a file, a folder, or a hub id (of which nothing else is
    downloaded).

    Args:
        path: What the user gave; ``gguf://`` models are converted on first use, as everywhere.
        key: Configuration key it was given with, for messages.

    Raises:
        ArtifactError: there is no config.json, or the hub cannot be reached.
    """
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        if (given / CONFIG_FILE).is_file():
            return given / CONFIG_FILE
        raise ArtifactError(
            f"{key}={path} holds no {CONFIG_FILE}; give a Hugging Face model folder"
        )
    if "://" in path:
        return resolve_model_folder(path) / CONFIG_FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, CONFIG_FILE))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{key}={path} is neither a folder, a {CONFIG_FILE}, nor a hub id that can be reached ({reason}); "
            "give a local Hugging Face model folder, or log in with `hf auth login`"
        ) from None


def read_model_config(path: Path) -> dict[str, Any]:
    """A parsed config.json, completed by the RoPE defaults of its model class.

    Published configs leave out what their class knows: Llama-2's has no ``rope_theta``, Phi-2's no
    ``partial_rotary_factor``.

    Raises:
        ArtifactError: not a JSON object, or a model class with a RoPE per layer type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a Hugging Face config: {error}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a Hugging Face config: it holds no JSON object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return config
    defaults = getattr(CONFIG_MAPPING[model_type](), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in defaults.values()):
        raise ArtifactError(
            f"{path}: {model_type} models have a RoPE per layer type ({', '.join(sorted(defaults))}); "
            "one RoPE for all layers is supported"
        )
    missing = {
        name: defaults[name]
        for name in CLASS_DEFAULTS
        if name in defaults and config.get(name) is None
    }
    return {**config, **missing}


@dataclass(frozen=True)
class ForwardCost:
    """What one forward pass costs.

    Attributes:
        layer_parameters: Weights of all layers that every token meets, without embeddings and LM
            head.
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

        6 * N + 6 * layers * width * L_eff with N = ``matrix_parameters``: a multiply-add is two
        operations, backward twice the forward, attention the causal half.

        Args:
            attended_len: L_eff in tokens: the segment length where attention is over the whole
                segment, else the sum of squared document lengths over the sum of document lengths.
            whole_square: Count attention's upper triangle too, as many reports and torch's
                ``FlopCounterMode`` do.
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
        return sum(
            self.share(w) * shape.model_flops(self.attended_len(w), whole_square=whole_square)
            for w in Window
        )
