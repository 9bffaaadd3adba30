"""The only reader of a model's config.json, and all FLOPs.

Everything else asks here, so that a damaged config.json gives the same one-line message from every
command. No weights are touched.

Conventions of the FLOPs, as in the causal model FLOPs utilisation (MFU) that training reports:

- a multiply-add counts as two operations; backward counts twice the forward;
- weights: every matrix a token is multiplied with, the LM head included (the search leaves it out:
  it gives a few positions to it), the input embedding not;
- attention: the causal half of each square that is really attended, so the whole segment in a long
  window and every document by itself in a short one. ``squared_lengths`` is the sum of the squared
  lengths of these spans in tokens, and L_eff that sum over the sum of the lengths;
- what recompute repeats is not counted (that would be hardware utilisation), nor are norms, rotary
  and softmax (below 1 % at these sizes); padding counts, as it does in the tokens per second.

Many reports count the whole attention square: at 128k that is 1.7 times as much for LLaMA3-8B.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from longrope2.errors import ArtifactError
from longrope2.rope.window import Window

CONFIG_FILE = "config.json"
# What a Llama-like model must state.
_SIZE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "vocab_size")  # fmt: skip
WRAPPER_FAULT = (
    "text_config: {kind} wraps a language model into others; give model.path of the language "
    "model's own folder"
)
_SIZE = "a whole number above 0"
_CLASS_DEFAULTS = ("rope_theta", "partial_rotary_factor")
_FORWARD_AND_BACKWARD = 3


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number above 0; a bool is an int to Python, not to us."""
    return type(value) is int and value > 0


# Key -> what it may be, in words and as a check. Each may also be left out or null.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys((*_SIZE_KEYS, "num_key_value_heads", "head_dim"), (_SIZE, is_size)),
    "model_type": ("a text", lambda value: isinstance(value, str)),
    "tie_word_embeddings": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters"), ("an object", lambda value: isinstance(value, dict))
    ),
}


def read_raw_config(path: Path) -> dict[str, Any]:
    """A config.json as it is written.

    Raises:
        ArtifactError: it cannot be read, is no UTF-8 or no JSON object, or a key that this project
            reads has a wrong type; one line that names file, key, what was found and is allowed.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ArtifactError(
            f"{path} cannot be read as a Hugging Face config: {kind}{error}"
        ) from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a Hugging Face config: it holds no JSON object")
    faults = [
        f"{key}={json.dumps(config[key])[:80]} must be {words}"
        for key, (words, is_allowed) in _ALLOWED.items()
        if config.get(key) is not None and not is_allowed(config[key])
    ]
    if isinstance(config.get("text_config"), dict):
        faults.append(WRAPPER_FAULT.format(kind=config.get("model_type")))
    if faults:
        raise ArtifactError(f"{path}: {'; '.join(faults)}")
    return config


def read_model_config(path: Path) -> dict[str, Any]:
    """A config.json completed by the RoPE defaults of its model class.

    Published configs leave out what their class knows: Llama-2's has no ``rope_theta``, Phi-2's no
    ``partial_rotary_factor``.

    Raises:
        ArtifactError: see ``read_raw_config``; or a model class with a RoPE per layer type.
    """
    # Takes seconds, and packing reads config.json without it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_raw_config(path)
    model_type = config.get("model_type")
    if model_type is None or model_type not in CONFIG_MAPPING:
        return config
    defaults = getattr(CONFIG_MAPPING[model_type](), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in defaults.values()):
        raise ArtifactError(
            f"{path}: {model_type} models have a RoPE per layer type "
            f"({', '.join(sorted(defaults))}); one RoPE for all layers is supported"
        )
    missing = (key for key in _CLASS_DEFAULTS if config.get(key) is None)
    return {**config, **{key: defaults[key] for key in missing if key in defaults}}


# Model types whose queries, keys and values are parts of one product.
_FUSED_PROJECTIONS = ("phi3",)
# Model types that norm queries and keys before their rotation; others that do are planned without.
_NORMED_HEADS = ("qwen3",)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model (gated MLP, RMSNorm), and what follows from them.

    Separate and fused projections have as many weights.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    """Whether the LM head is the input embedding."""
    fused_projection: bool = False
    """Whether queries, keys and values are one product."""
    normed_heads: bool = False
    """Whether queries and keys have norms of their own."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelShape":
        """``from_file`` of the folder's config.json."""
        return cls.from_file(folder / CONFIG_FILE)

    @classmethod
    def from_file(cls, path: Path) -> "ModelShape":
        """Read a config.json.

        Raises:
            ArtifactError: see ``read_raw_config``; or a size is missing.
        """
        return cls.from_config(read_raw_config(path), path)

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "ModelShape":
        """The same of a config.json that is read, and stands at ``path``."""
        missing = [key for key in _SIZE_KEYS if config.get(key) is None]
        if missing:
            raise ArtifactError(
                f"{path} holds no {', '.join(missing)}; a Llama-like model states each as {_SIZE}"
            )
        hidden, num_layers, heads, mlp, vocabulary = (config[key] for key in _SIZE_KEYS)
        return cls(
            hidden=hidden,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            mlp=mlp,
            vocabulary=vocabulary,
            tied=bool(config.get("tie_word_embeddings")),
            fused_projection=config.get("model_type") in _FUSED_PROJECTIONS,
            normed_heads=config.get("model_type") in _NORMED_HEADS,
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
        """Weights a token is multiplied with: all layers and the LM head, no input embedding."""
        return self.num_layers * self.layer_parameters + self.head_parameters

    @property
    def parameters(self) -> int:
        """All parameters: matrices, input embedding, norms."""
        embedding = 0 if self.tied else self.head_parameters
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.matrix_parameters + embedding + norms

    def replicated(self, threshold: int) -> int:
        """Parameters in tensors of at most ``threshold`` numbers, which ZeRO-3 keeps whole."""
        widths = (self.query_width, self.kv_width, self.kv_width, self.query_width)
        layer = [width * self.hidden for width in (*widths, *3 * (self.mlp,))] + 2 * [self.hidden]
        others = [self.hidden] + (1 if self.tied else 2) * [self.head_parameters]
        return sum(size for size in self.num_layers * layer + others if size <= threshold)

    def attention_flops(self, squared_lengths: float) -> float:
        """Forward FLOPs of causal attention in all layers; of one token, given its L_eff.

        Two products of two operations with every key, of which causal attention computes half.
        """
        return 2.0 * self.num_layers * self.query_width * squared_lengths

    def forward_flops(self, num_tokens: int) -> float:
        """FLOPs of a forward pass through the layers, attention over all tokens, no LM head."""
        layers = 2.0 * self.num_layers * self.layer_parameters * num_tokens
        return layers + self.attention_flops(float(num_tokens) ** 2)

    def training_flops(self, num_tokens: int, squared_lengths: float) -> float:
        """Model FLOPs of forward and backward over all segments."""
        weights = 2.0 * self.matrix_parameters * num_tokens
        return _FORWARD_AND_BACKWARD * (weights + self.attention_flops(squared_lengths))

    def model_flops(self, attended_len: float, *, whole_square: bool = False) -> float:
        """Model FLOPs of forward and backward per token.

        Args:
            attended_len: L_eff in tokens.
            whole_square: Count attention's upper triangle too, as torch's ``FlopCounterMode`` does.
        """
        return self.training_flops(1, 2 * attended_len if whole_square else attended_len)


# Of the segments, where there are none yet to tell; whoever shows a figure of it says so.
ASSUMED_LONG_SHARE = 0.7


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
    """L_eff of a short segment."""

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
