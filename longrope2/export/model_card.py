"""The README of an exported model: what it is, how to load it, and what today's engines do with it."""

import math
from typing import Any

from longrope2.rope import RescaleFactors

__all__ = ["model_card"]

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [longrope2, long-context]
---
# {architecture}, window extended from {original_len:,} to {target_len:,} tokens

The window of a pre-trained model was extended with [LongRoPE2](https://arxiv.org/abs/2502.20082) ({scale:g} times).
Sequences of up to {original_len:,} tokens are read with the original RoPE, longer ones with the rescaled RoPE. Licence
and intended use are those of the base model.

| | |
|---|---|
| original window L0 | {original_len:,} tokens |
| extended window L | {target_len:,} tokens |
| RoPE base, rotary dimension | {rope_base:g}, {rotary_dim} |
| method | {method} |
| critical dimension (cosine index) | {critical_index} |
| attention factor, both windows | {attention_factor:g} |
| weights | {dtype} |

Rescale factors of the long window, by cosine index: {factors}.
Short window: {short_factors}. `factors.json` holds the same numbers with their origin.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```

When this folder was written it was loaded with transformers {transformers_version}, and its logits were compared with
the trained model's at {original_len:,} and {original_len_plus_1:,} tokens: one length on either side of the switch.

## What to know before serving it

- transformers switches once per forward pass, **for the whole batch**: one sequence beyond {original_len:,} tokens
  moves all others of its batch to the long window's RoPE. Put short and long sequences into separate batches.
- When generation crosses {original_len:,} tokens, transformers keeps the key/value cache that was computed under the
  short window's RoPE (for this model class). That is not the model that was trained. Start with a prompt that is beyond
  {original_len:,} tokens already, stay within, or run the prompt again after the crossing, as `launch.generate` does.
- vLLM and SGLang do not read `attention_factor`: at the time of writing they multiply cosine and sine by
  {engine_scale:.4f} (sqrt(1 + ln s / ln L0)) in both windows, which is not this model. Engines that choose the factors
  once at load use the long window's for short texts as well.
"""


def model_card(config: dict[str, Any], factors: RescaleFactors) -> str:
    """Text of README.md.

    Args:
        config: The exported config.json.
        factors: The factors in it.
    """
    import transformers

    original_len = factors.geometry.original_len
    short = "the original RoPE (all factors 1)"
    if factors.short_factors is not None:
        short = "factors " + _numbers(factors.short_factors)
    return CARD.format(
        architecture=(config.get("architectures") or [config["model_type"]])[0],
        original_len=original_len,
        original_len_plus_1=original_len + 1,
        target_len=factors.target_len,
        scale=factors.scale,
        rope_base=factors.geometry.rope_base,
        rotary_dim=factors.geometry.rotary_dim,
        method=factors.method,
        critical_index="none" if factors.critical_index is None else factors.critical_index,
        attention_factor=factors.long_attention_scale,
        dtype=config["dtype"],
        factors=_numbers(factors.factors),
        short_factors=short,
        transformers_version=transformers.__version__,
        engine_scale=math.sqrt(1 + math.log(factors.scale) / math.log(original_len)) if factors.scale > 1 else 1.0,
    )


def _numbers(values: tuple[float, ...]) -> str:
    """Factors, short enough to read."""
    return ", ".join(f"{value:.4g}" for value in values)
