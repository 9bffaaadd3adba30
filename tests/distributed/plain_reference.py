"""The training steps of a parity case in plain torch and transformers, in one process.

Each document by itself (no packing, no mask of ours), eager attention, transformers' own RoPE code
in both windows, torch's AdamW: nothing of this project but the segments' tokens and the factors'
numbers.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from parity_worker import (
    LENGTH,
    NUM_STEPS,
    ORIGINAL_LEN,
    TRAINING,
    SegmentsInMemory,
    factors,
    tiny_llama,
)
from torch import nn
from transformers import LlamaForCausalLM

from longrope2.rope.factors import Window


def long_model(short: nn.Module) -> nn.Module:
    """The same weights (shared, not copied) under transformers' ``longrope`` with our factors."""
    config = short.config.to_dict()
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": LENGTH / ORIGINAL_LEN,
        "original_max_position_embeddings": ORIGINAL_LEN,
        "short_factor": [1.0] * len(factors().factors),
        "long_factor": list(factors().factors),
        "attention_factor": factors().long_attention_scale,
    }
    config["max_position_embeddings"] = LENGTH
    model = LlamaForCausalLM(type(short.config).from_dict(config))
    for module, twin in zip(model.modules(), short.modules(), strict=True):
        for name, parameter in twin.named_parameters(recurse=False):
            setattr(module, name, parameter)
    model.set_attn_implementation("eager")
    return model


def losses_of(
    model: nn.Module, tokens: torch.Tensor, spans: list[tuple[int, int]]
) -> tuple[torch.Tensor, int]:
    """Summed loss of the spans, each run by itself, and the number of targets."""
    total, targets = torch.zeros(()), 0
    for start, end in spans:
        logits = model(tokens[None, start:end]).logits[0, :-1]
        total = total + F.cross_entropy(logits, tokens[start + 1 : end], reduction="sum")
        targets += end - start - 1
    return total, targets


def train(heads: str, kinds: str) -> dict[str, Any]:
    """Loss and gradient norm of every step, and the weights after the last."""
    short = tiny_llama(heads)
    short.set_attn_implementation("eager")
    long = long_model(short)
    matrices = [p for n, p in short.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in short.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": TRAINING.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=TRAINING.learning_rate,
        betas=(TRAINING.beta1, TRAINING.beta2),
    )
    steps = []
    for _ in range(NUM_STEPS):
        sums, targets = dict.fromkeys(Window, torch.zeros(())), dict.fromkeys(Window, 0)
        for index in range(len(kinds)):
            segment = SegmentsInMemory(kinds).segment(index)
            spans = [(0, LENGTH)]
            if segment.window is Window.SHORT:
                bounds = pairwise([0, *segment.doc_ends.tolist()])
                spans = [
                    span
                    for span, pad in zip(bounds, segment.doc_is_padding, strict=True)
                    if not pad
                ]
            model = long if segment.window is Window.LONG else short
            total, number = losses_of(
                model, torch.from_numpy(segment.tokens.astype("int64")), spans
            )
            sums[segment.window] = sums[segment.window] + total
            targets[segment.window] += number
        loss = sum(sums.values()) / sum(targets.values())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(short.parameters(), TRAINING.gradient_clip)
        optimizer.step()
        steps.append(
            {
                "loss": loss.item(),
                "gradient_norm": norm.item(),
                "targets": list(targets.values()),
                "by_window": [
                    (sums[w] / targets[w]).item() if targets[w] else float("nan") for w in Window
                ],
            }
        )
    return {"steps": steps, "weights": {name: p.detach() for name, p in short.named_parameters()}}
