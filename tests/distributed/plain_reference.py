"""The first training step of a parity case in plain torch and transformers: each document by itself, no packing."""

import torch
import torch.nn.functional as F
from parity_worker import LENGTH, SegmentsInMemory, factors, tiny_llama

from longrope2.rope import Window


def first_step(case: str) -> dict[str, float]:
    """Loss per target token and gradient norm of step 1, from eager attention and transformers' own RoPE code."""
    _, _, kv_heads, kinds = case.split(":")
    short = tiny_llama(int(kv_heads))
    short.set_attn_implementation("eager")
    losses, targets = [], 0
    for index in range(len(kinds)):
        segment = SegmentsInMemory(kinds).segment(index)
        tokens = torch.from_numpy(segment.tokens.astype("int64"))
        if segment.window is Window.LONG:
            spans = [(0, LENGTH)]
        else:
            bounds = [0, *segment.doc_ends.tolist()]
            real = [not padding for padding in segment.doc_is_padding]
            spans = [(a, b) for a, b, keep in zip(bounds, bounds[1:], real, strict=False) if keep]
        for start, end in spans:
            rotary = short.model.rotary_emb
            inv_freq, scale = rotary.inv_freq.clone(), rotary.attention_scaling
            if segment.window is Window.LONG:
                rotary.inv_freq.copy_(inv_freq / torch.tensor(factors().factors))
                rotary.attention_scaling = factors().long_attention_scale
            logits = short(tokens[None, start:end]).logits[0, :-1]
            rotary.inv_freq.copy_(inv_freq)
            rotary.attention_scaling = scale
            losses.append(F.cross_entropy(logits, tokens[start + 1 : end], reduction="sum"))
            targets += end - start - 1
    loss = torch.stack(losses).sum() / targets
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in short.parameters() if p.grad is not None]).norm()
    return {"loss": loss.item(), "gradient_norm": norm.item()}
