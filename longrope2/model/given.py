"""What a given model does that ours must do too, asked of transformers' own class.

Our model replaces three parts of transformers': the rotary module, the attention function, and what
comes after the last hidden state. Families differ in all three (Cohere interleaves the rotary
channels, Granite divides its logits, GPT-OSS adds sinks to its softmax), so none of it is read
from JSON keys of our own list: the class is built with its own config, looked at and tried.
What cannot be done the same way is refused by the name of the key or part that asks for it.

Shape letters: B = rows, T = tokens, I = cosine indices, H = hidden size, V = vocabulary.
"""

import copy
import functools
import hashlib
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longrope2.errors import ArtifactError
from longrope2.model.shape import CONFIG_FILE, WRAPPER_FAULT
from longrope2.rope.frequencies import RopeGeometry, periods

# Layers whose every exchange between tokens goes through attention to all or the last tokens.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
CHOOSING_LAYERS = ("chunked_attention", "indexed_attention")
DROPOUT_WORDS = ("dropout", "pdrop")
HEAD_WORDS = ("logit", "lm_head")
FREQUENCY_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4
PROBED_POSITIONS = 7
PROBED_VOCABULARY = 64
MOST_CUT_LAYERS = 8


class Arrangement(Enum):
    """How a rotary module lays out one angle per cosine index over the channels of a head."""

    halves = "halves"
    """Once over the first half of the channels, once over the second (Llama)."""
    interleaved = "interleaved"
    """Twice in a row (Cohere)."""
    single = "single"
    """Once; the attention layer spreads it itself (GPT-OSS)."""

    def spread(self, angles_BTI: Tensor) -> Tensor:
        """[B, T, I] -> what the attention layers of such a model expect."""
        match self:
            case Arrangement.halves:
                return torch.cat((angles_BTI, angles_BTI), dim=-1)
            case Arrangement.interleaved:
                return angles_BTI.repeat_interleave(2, dim=-1)
            case Arrangement.single:
                return angles_BTI


@dataclass(frozen=True)
class HeadRule:
    """What happens to ``hidden @ head.T + bias`` before it is called logits.

    logits = cap * tanh(scale * x / cap), without the cap: scale * x.
    """

    scale: float = 1.0
    """Multiplier."""
    cap: float | None = None
    """Largest logit in absolute value, by a hyperbolic tangent."""
    key: str | None = None
    """Key of config.json that says so."""

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as the model's class gives them."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """Derivative of the rule where it gives ``logits``; None where it is 1."""
        if self.cap is None:
            return None if self.scale == 1.0 else self.scale
        return self.scale * (1 - (logits / self.cap).square())

    def __str__(self) -> str:
        if self.key is None:
            return "plain"
        if self.cap is None:
            return f"times {self.scale:g} ({self.key})"
        return f"capped at {self.cap:g} ({self.key})"


@dataclass(frozen=True)
class GivenRotary:
    """The rotary module that transformers builds for a model."""

    inv_freq_I: Tensor
    """Radians per token, float64."""
    arrangement: Arrangement
    rope_base: float

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head."""
        return 2 * self.inv_freq_I.numel()


@dataclass(frozen=True)
class GivenModel:
    """A model that this project can extend, as far as its config says."""

    config: Any
    rotary: GivenRotary
    head_rule: HeadRule


def look_at(folder: Path) -> GivenModel:
    """Whether a model is supported, and what is particular about it; reads its config.json only.

    Raises:
        ArtifactError: it is not, for reasons that name the key or part.
    """
    path = folder / CONFIG_FILE
    return _look_at(folder, hashlib.sha256(path.read_bytes()).hexdigest())


@functools.lru_cache(maxsize=16)
def _look_at(folder: Path, _digest: str) -> GivenModel:
    """Stages ask several times; a changed file is looked at anew."""
    config = read_config(folder)
    refuse_unsupported(config, folder)
    try:
        rotary = find_rotary(build_without_memory(cut_layers(config)))
        head_rule = find_head_rule(config)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    except Exception as error:  # a class may raise anything when it is built and tried
        raise ArtifactError(
            f"{folder}: {config.model_type} is not supported: its class cannot be tried: "
            f"{_reason(error)}"
        ) from error
    faults = [
        f"{key}={value:g}: training draws no dropout; give model.dropout=0 to train without"
        for key, value in drawn_dropout(config).items()
    ]
    if faults:  # last: nobody turns it off for a model without RoPE
        raise ArtifactError(f"{folder}: {config.model_type} is not supported: {'; '.join(faults)}")
    return GivenModel(config, rotary, head_rule)


def read_config(folder: Path) -> Any:
    """The model's config as transformers reads and validates it.

    Raises:
        ArtifactError: transformers does not know the model, or does not accept its config.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # validation raises whatever the field's rule raises
        raise ArtifactError(
            f"{folder}: transformers refuses this config.json: {_reason(error)}"
        ) from None
    if hasattr(config, "text_config"):
        raise ArtifactError(f"{folder}: {WRAPPER_FAULT.format(kind=config.model_type)}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ArtifactError(
            f"{folder}: model_type={config.model_type} has no causal language model in transformers"
        )
    return config


def published_rotary(raw: dict[str, Any]) -> tuple[int, float] | None:
    """Rotary dimension and base of a config.json before its RoPE scaling, as its class builds them.

    None where transformers has no such class: then only the config's own keys are left.

    Raises:
        ArtifactError: see ``find_rotary``.
    """
    keys = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_parameters")}
    layouts = [raw.get(layout) or {} for layout in ("rope_parameters", "rope_scaling")]
    geometry = {
        key: layout[key]
        for layout in layouts
        for key in ("rope_theta", "partial_rotary_factor")
        if layout.get(key) is not None
    }
    if geometry:
        keys["rope_parameters"] = {"rope_type": "default", **geometry}
    config = class_config(keys) if "model_type" in raw else None
    if config is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    rotary = find_rotary(build_without_memory(cut_layers(config)))
    return rotary.rotary_dim, rotary.rope_base


def class_config(raw: dict[str, Any]) -> Any | None:
    """A config.json under its class's defaults; None where transformers does not accept it."""
    try:
        return AutoConfig.for_model(**raw)
    except Exception:  # validation raises whatever the field's rule raises
        return None


def refuse_unsupported(config: Any, folder: Path) -> None:
    """Refuse layers and weights that a config asks for and our model does not do.

    Raises:
        ArtifactError: all of it together, each by its key.
    """
    faults = _layer_faults(config)
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        faults.append(
            f"quantization_config ({method}): quantized weights cannot be trained; give the model "
            "in bf16 or fp32"
        )
    if faults:
        raise ArtifactError(f"{folder}: {config.model_type} is not supported: {'; '.join(faults)}")


def _layer_faults(config: Any) -> list[str]:
    """Layers that mix tokens outside attention, or rotate them each in its own way."""
    faults = []
    keys = ("layer_types", "layers_block_type")  # the second is an older name of the first
    key = next((key for key in keys if getattr(config, key, None)), keys[0])
    kinds = {str(kind) for kind in getattr(config, key, None) or ()} - set(ATTENTION_LAYERS)
    if choosing := sorted(kinds & set(CHOOSING_LAYERS)):
        faults.append(
            f"{key} has {', '.join(choosing)}: such layers choose the keys that they attend to"
        )
    if others := sorted(kinds - set(CHOOSING_LAYERS)):
        faults.append(
            f"{key} has {', '.join(others)}: such layers carry state along the sequence outside "
            "attention, past document ends and sequence-parallel ranks"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if nested:
        faults.append(
            f"rope_parameters differ by layer type ({', '.join(nested)}); one RoPE for all layers "
            "is supported"
        )
    return faults


def drawn_dropout(config: Any) -> dict[str, float]:
    """Keys of dropout that training would have to draw."""
    return {
        key: value
        for key, value in sorted(config.to_dict().items())
        if any(word in key for word in DROPOUT_WORDS)
        and not key.startswith("classifier")
        and _is_positive_number(value)
    }


def active_window(config: Any) -> int | None:
    """Tokens of the sliding window that some layer of a transformers config has; None for none."""
    window, layer_types = getattr(config, "sliding_window", None), _layer_types(config)
    is_used = not layer_types or "sliding_attention" in layer_types
    return int(window) if window and is_used else None


def _layer_types(config: Any) -> list[str]:
    return [str(kind) for kind in getattr(config, "layer_types", None) or ()]


def cut_layers(config: Any) -> Any:
    """The same config with as few layers as show every kind of layer, two at least.

    Hidden sizes, heads and everything else stay: what the class computes is the same.
    """
    cut = copy.deepcopy(config)
    num_layers = config.num_hidden_layers
    lists = {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }
    kept = min(2, num_layers)
    for values in lists.values():
        firsts = {str(value): place for place, value in reversed(list(enumerate(values)))}
        kept = max(kept, *(place + 1 for place in firsts.values() if place < MOST_CUT_LAYERS))
    for key, values in lists.items():
        setattr(cut, key, list(values)[:kept])
    cut.num_hidden_layers = kept
    return cut


def shrink_vocabulary(config: Any, size: int) -> None:
    """At most ``size`` ids; the padding's, whose embedding is treated apart, among them."""
    config.vocab_size = min(config.vocab_size, size)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and padding >= config.vocab_size:
        config.pad_token_id = 0


def build_without_memory(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The causal model of a config on torch's meta device.

    Raises:
        ArtifactError: the class cannot be built from its config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise ArtifactError(
            f"transformers cannot build a {config.model_type} from its config.json: "
            f"{_reason(error)}"
        ) from None


def find_rotary(hf: Any) -> GivenRotary:
    """Look at the rotary module of a model (on any device), and try how it lays out its angles.

    Raises:
        ArtifactError: the model has none, or several, or one that is not a table of
            base ** (-2 i / d), or one that gives its angles in another form.
    """
    kind = hf.config.model_type
    holders = [name for name, child in hf.named_modules() if hasattr(child, "inv_freq")]
    own = f"{hf.base_model_prefix}.rotary_emb"
    if not holders:
        raise ArtifactError(f"{kind} has no rotary module: only RoPE models can be extended")
    if holders != [own]:
        raise ArtifactError(
            f"{kind} is not supported: one rotary module for all layers is replaced ({own}), its "
            f"class has {', '.join(holders)}"
        )
    rotary: Any = type(hf.base_model.rotary_emb)(hf.config)  # real values, wherever hf is
    inv_freq_I = rotary.inv_freq.double().cpu()
    base = float(inv_freq_I[1] ** -inv_freq_I.numel()) if inv_freq_I.numel() > 1 else 0.0
    stated = (getattr(hf.config, "rope_parameters", None) or {}).get("rope_theta")
    base = float(stated) if stated else base
    expected_I = 2 * math.pi / periods(RopeGeometry(2 * inv_freq_I.numel(), base, 10**6)).double()
    if not torch.allclose(inv_freq_I, expected_I, rtol=FREQUENCY_TOLERANCE, atol=0):
        raise ArtifactError(
            f"{kind} is not supported: its rotary frequencies are not {base:g} ** (-2 i / "
            f"{2 * inv_freq_I.numel()}); a RoPE scaling is extended from the model before it"
        )
    return GivenRotary(inv_freq_I, _find_arrangement(rotary, inv_freq_I, kind), base)


def _find_arrangement(rotary: nn.Module, inv_freq_I: Tensor, kind: str) -> Arrangement:
    """Call the module and compare."""
    positions_BT = torch.arange(PROBED_POSITIONS)[None]
    angles_BTI = positions_BT[..., None].float() * inv_freq_I.float()
    try:
        given = rotary(torch.zeros(1, PROBED_POSITIONS, 1), positions_BT)
    except Exception as error:
        raise ArtifactError(
            f"{kind} is not supported: its rotary module asks for more than positions: "
            f"{_reason(error)}"
        ) from None
    if torch.is_tensor(given) and given.is_complex():
        raise ArtifactError(
            f"{kind} is not supported: its rotary module gives complex numbers, not cosines and "
            "sines"
        )
    if isinstance(given, tuple) and len(given) == 2:
        for arrangement in Arrangement:
            angles = arrangement.spread(angles_BTI)
            if given[0].shape == angles.shape and all(
                torch.allclose(found, wanted, atol=1e-5)
                for found, wanted in zip(given, (angles.cos(), angles.sin()), strict=True)
            ):
                return arrangement
    raise ArtifactError(
        f"{kind} is not supported: its rotary module gives neither cosines and sines over the "
        "halves of the channels, nor interleaved, nor one per frequency"
    )


def find_head_rule(config: Any) -> HeadRule:
    """What a class does to its logits, found by giving its own forward some hidden states.

    The class is built with a small vocabulary and without layers; only its LM head is real.

    Raises:
        ArtifactError: no scale and no cap of the config explains what it returns.
    """
    small = cut_layers(config)
    shrink_vocabulary(small, PROBED_VOCABULARY)
    hf = build_without_memory(small).eval()
    head = hf.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArtifactError(
            f"{config.model_type} is not supported: its LM head is no single matrix"
        )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(head.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) / small.hidden_size**0.5
        setattr(head, name, nn.Parameter(values, requires_grad=False))
    hidden_BTH = torch.randn(1, PROBED_POSITIONS, small.hidden_size, generator=generator)
    hf._modules[hf.base_model_prefix] = _FixedStates(hidden_BTH)
    try:
        with torch.no_grad():
            given = hf(input_ids=torch.zeros(1, PROBED_POSITIONS, dtype=torch.long)).logits
            plain = head(hidden_BTH)
    except Exception as error:
        raise ArtifactError(
            f"{config.model_type} is not supported: what it does after its last hidden states "
            f"cannot be tried: {_reason(error)}"
        ) from None
    return _explain_logits(config, plain.float(), given.float())


class _FixedStates(nn.Module):
    """Stands in for a base model: gives the same hidden states whatever it is asked."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self._hidden_BTH = hidden_BTH

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        """The states, in the output class that has every field a causal model reads."""
        return MoeModelOutputWithPast(last_hidden_state=self._hidden_BTH)


def _explain_logits(config: Any, plain_BTV: Tensor, given_BTV: Tensor) -> HeadRule:
    """The scale or cap, a number of the config named like logits, that turns one into the other."""
    numbers = {
        key: float(value)
        for key, value in config.to_dict().items()
        if any(word in key for word in HEAD_WORDS) and _is_positive_number(value)
    }
    rules = [HeadRule()]
    for key, value in numbers.items():
        scales = HeadRule(value, None, key), HeadRule(1 / value, None, key)
        rules += [*scales, HeadRule(1.0, value, key)]
    ratio = float((given_BTV * plain_BTV).sum() / plain_BTV.square().sum())
    rules.append(HeadRule(ratio, None, "its class"))  # MiniCPM derives it from two of its sizes
    largest = given_BTV.abs().max()
    for rule in rules:
        if (rule.apply(plain_BTV) - given_BTV).abs().max() <= LOGIT_TOLERANCE * largest:
            return rule
    named = ", ".join(f"{key}={value:g}" for key, value in numbers.items())
    raise ArtifactError(
        f"{config.model_type} is not supported: it changes its logits after the LM head in a way "
        f"that no single scale or cap explains ({named or 'no key is named like it'})"
    )


def _reason(error: Exception) -> str:
    """What a library raised, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_positive_number(value: Any) -> bool:
    """A number above 0 that is no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
