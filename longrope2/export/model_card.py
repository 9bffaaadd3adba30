"""The README of an exported model: what it is, who reads it, what a static choice costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longrope2.export.card_engines import engines_section
from longrope2.export.variants import ExportVariant, ExportVerify, variant_factors
from longrope2.model.folder import NO_WINDOW
from longrope2.model.scoring import token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.hf_config import UNSCALED_TYPE

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [longrope2, long-context]
---
# {architecture}, {title}

{made} {holds} \
Licence and intended use are those of the base
model.

| | |
|---|---|
| variant | {variant.value} |
| original window L0 | {original_len:,} tokens |
| window of this folder | {applied.target_len:,} tokens |
| RoPE base, rotary dimension | {geometry.rope_base:g}, {geometry.rotary_dim} |
| method | {factors.method} |
| critical dimension (cosine index) | {critical_index} |
| attention factor | {applied.long_attention_scale:g} |
| weights | {config[dtype]} |

Rescale factors up to {original_len:,} tokens: {short_factors}.
{beyond}`factors.json` holds the same numbers with their origin.
{attention}{origin}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```

{checked} on either side of the end of the original window, as far as this folder reaches.

## Which engines read it correctly

{engines}

{attention_factor_note}

## What a choice made once costs

{cost}
"""
_TRAINED = """\
The window of a pre-trained model was extended from {original_len:,} to {target_len:,} tokens \
({scale:g} times) with
[LongRoPE2](https://arxiv.org/abs/2502.20082)'s mixed windows: trained so that \
sequences of up to {original_len:,} tokens
are read with the original RoPE, longer ones with the rescaled RoPE."""
_UNTRAINED = """\
**This model was not trained at {target_len:,} tokens, nor with the factors below.** \
Its weights are the pre-trained model's,
made for {original_len:,} tokens; only its RoPE is rescaled, to reach {scale:g} times as far. \
Sequences of up to {original_len:,} tokens are
to be read with the short window's RoPE, longer ones with the long window's."""
_ORIGIN = """
## Where the factors come from

{origin}.
{provenance}
How well the model reads beyond {original_len:,} tokens with them was not measured by this export.
"""
_CHECKED = {
    ExportVerify.full: """\
When this folder was written it was loaded with transformers {transformers_version}, \
and its logits were compared with
{compared}""",
    ExportVerify.quick: """\
When this folder was written its weights were compared with those it was made of, \
and its first layers were loaded with
transformers {transformers_version}: their logits were compared with {compared}, at positions""",
}
_TITLES = {
    ExportVariant.dual: "window extended from {original_len:,} to {target_len:,} tokens",
    ExportVariant.long_only: "window of {target_len:,} tokens, one RoPE for all lengths",
    ExportVariant.short_only: "inside its original window of {original_len:,} tokens",
}
_HOLDS = {
    ExportVariant.dual: "This folder holds both.",
    ExportVariant.long_only: "This folder holds the rescaled RoPE only, for engines that cannot "
    "switch.",
    ExportVariant.short_only: "This folder holds the original RoPE only, for engines that cannot "
    "switch.",
}
_NOTE = """\
vLLM and SGLang do not read `attention_factor`; `short_mscale` and `long_mscale` \
in config.json tell them the same number.
transformers warns that it does not know these two keys; it does not need them."""
_SLIDING = """
The base model's config.json asks for a sliding window{tokens}. \
{full}
attention, so the folder's config.json says {sliding_window:,}, the whole extended window.
"""


@dataclass(frozen=True)
class StaticCost:
    """Perplexity of the same short texts under either RoPE."""

    short_perplexity: float
    long_perplexity: float
    num_windows: int
    max_tokens: int
    text: str
    """What the texts were."""

    @property
    def ratio(self) -> float:
        """Above 1: what a static choice of the rescaled RoPE loses on short texts."""
        return self.long_perplexity / self.short_perplexity


def measure_static_cost(model: WindowedModel, windows: Sequence[Tensor], text: str) -> StaticCost:
    """Perplexity of every token but the first of ``windows``, texts within L0, [T]."""
    perplexities = []
    for window in (Window.SHORT, Window.LONG):
        rows = [tokens_T[None].to(model.hf.device) for tokens_T in windows]
        nats = torch.cat([token_nll(model, row_BT, window).flatten() for row_BT in rows])
        perplexities.append(math.exp(nats.double().mean()))
    longest = max(len(tokens_T) for tokens_T in windows)
    return StaticCost(*perplexities, num_windows=len(windows), max_tokens=longest, text=text)


def model_card(
    base_config: dict[str, Any],
    config: dict[str, Any],
    factors: RescaleFactors,
    variant: ExportVariant,
    cost: StaticCost | None,
    origin: str | None = None,
    verify: ExportVerify = ExportVerify.full,
) -> str:
    """Text of README.md for the exported ``config``, of which ``cost`` may be unmeasured.

    ``origin`` says what the factors of untrained weights come from; None is a trained model.
    ``verify`` is how the folder is checked.
    """
    import transformers

    applied, geometry = variant_factors(factors, variant), factors.geometry
    lengths = {"original_len": geometry.original_len, "target_len": factors.target_len}
    unscaled = config["rope_parameters"]["rope_type"] == UNSCALED_TYPE
    short, long = applied.short_factors, f"Beyond: {_numbers(applied.factors)}.\n"
    trained = origin is None
    compared = "the trained model's" if trained else "the pre-trained model's with these factors"
    version = transformers.__version__
    title = _TITLES[variant].format(**lengths)
    if not trained and variant is not ExportVariant.short_only:
        title += ", without training"
    return _CARD.format(
        **lengths,
        architecture=(config.get("architectures") or [config["model_type"]])[0],
        title=title,
        made=(_TRAINED if trained else _UNTRAINED).format(**lengths, scale=factors.scale),
        checked=_CHECKED[verify].format(compared=compared, transformers_version=version),
        origin="" if trained else _origin(origin, factors),
        holds=_HOLDS[variant],
        variant=variant,
        factors=factors,
        applied=applied,
        geometry=geometry,
        config=config,
        critical_index="none" if factors.critical_index is None else factors.critical_index,
        short_factors="all 1, the original RoPE" if short is None else _numbers(short),
        beyond="" if variant is ExportVariant.short_only else long,
        attention=_attention(base_config, config, trained=trained),
        engines=engines_section(
            config,
            variant,
            lengths,
            unscaled=unscaled,
            trained=trained,
            transformers_version=version,
        ),
        attention_factor_note="It needs no rescaling of RoPE." if unscaled else _NOTE,
        cost=_cost(cost, variant, lengths),
    )


def _origin(origin: str, factors: RescaleFactors) -> str:
    """What the factors come from, and all that was written down with them."""
    noted = [f"- {name}: {' '.join(text.split())}" for name, text in factors.provenance.items()]
    provenance = "\n".join(["", *noted, ""]) if noted else ""
    original_len = factors.geometry.original_len
    return _ORIGIN.format(origin=origin, provenance=provenance, original_len=original_len)


def _attention(base_config: dict[str, Any], config: dict[str, Any], *, trained: bool) -> str:
    """A sentence where the exported config has another sliding window than the base model."""
    given, exported = base_config.get("sliding_window"), config.get("sliding_window")
    if given == exported:
        return ""
    tokens = f" of {given:,} tokens" if given and given != NO_WINDOW else ""
    full = "This model was trained with full" if trained else "Here it was read with full"
    return _SLIDING.format(tokens=tokens, sliding_window=exported, full=full)


def _cost(cost: StaticCost | None, variant: ExportVariant, lengths: dict[str, int]) -> str:
    """What is lost on short texts under a rescaled RoPE, or that nobody measured it."""
    if variant is ExportVariant.short_only:
        inside = f"Nothing inside {lengths['original_len']:,} tokens"
        return f"{inside}; beyond them this variant does not read at all."
    static = "An engine set to the long window" if variant is ExportVariant.dual else "This variant"
    loses = f"{static} reads short texts with the rescaled RoPE."
    if cost is None:
        return f"{loses} What that costs was not measured for this model."
    return (
        f"{loses} Measured when this folder was written, on {cost.num_windows} texts\n"
        f"of at most {cost.max_tokens:,} tokens ({cost.text}): perplexity "
        f"{cost.long_perplexity:.4g} instead of\n{cost.short_perplexity:.4g} with the original "
        f"RoPE ({100 * (cost.ratio - 1):+.1f} %). Short tasks were not."
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
