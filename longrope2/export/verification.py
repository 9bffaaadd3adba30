"""Proof that an exported folder is the trained model: plain transformers against our own.

Shape legend: T = tokens, V = vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longrope2.errors import ArtifactError
from longrope2.export.hugging_face import rotary_fault
from longrope2.inference.generation import window_for_length
from longrope2.model.given import find_head_rule, look_at
from longrope2.model.loading import device_and_dtype, find_weights, load_windowed_model
from longrope2.rope.factors import RescaleFactors

# Of the largest logit, float32: two attention kernels differ by rounding, no more.
LOGIT_TOLERANCE = 1e-4
# Last positions compared; the logits of a whole long window do not fit in memory.
_COMPARED_TOKENS = 64


def verify_export(
    checkpoint: Path,
    factors: RescaleFactors,
    folder: Path,
    dtype: torch.dtype,
    lengths: Sequence[int],
) -> dict[int, float]:
    """Compare logits on random tokens, in float32 from weights rounded to the exported format.

    The checkpoint is run by our own windowed model, which is told the window, the folder by plain
    transformers, which finds the window by itself; take ``lengths`` from both windows.

    Returns:
        Length -> largest absolute difference over the largest absolute logit.

    Raises:
        ArtifactError: a difference above ``LOGIT_TOLERANCE``.
    """
    # One model at a time: two copies of a large one in float32 may not fit.
    ours = _our_logits(checkpoint, factors, dtype, lengths)
    theirs, causes = _transformers_logits(checkpoint, factors, folder, lengths)
    differences = {}
    for length in lengths:
        largest = float(ours[length].abs().max())
        differences[length] = float((ours[length] - theirs[length]).abs().max()) / largest
        if not differences[length] <= LOGIT_TOLERANCE:
            raise ArtifactError(
                f"{folder}: at {length} tokens plain transformers gives logits that differ from "
                f"the checkpoint's by {differences[length]:.2g} of the largest logit (allowed: "
                f"{LOGIT_TOLERANCE:g}); nothing was exported. {_cause(folder, dtype, causes)}"
            )
    return differences


@torch.inference_mode()
def _our_logits(
    checkpoint: Path, factors: RescaleFactors, dtype: torch.dtype, lengths: Sequence[int]
) -> dict[int, Tensor]:
    """Last logits [T, V] of the checkpoint at each length."""
    device, _ = device_and_dtype()
    model = load_windowed_model(checkpoint, factors, device=device, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    vocab_size = model.hf.config.vocab_size
    logits = {}
    for length in lengths:
        window = window_for_length(length, factors.geometry.original_len)
        tokens_BT = _random_tokens(length, vocab_size).to(device)
        kept_BTV = model.logits(tokens_BT, window, keep=slice(-_COMPARED_TOKENS, None))
        logits[length] = kept_BTV[0].cpu()
    return logits


@torch.inference_mode()
def _transformers_logits(
    checkpoint: Path, factors: RescaleFactors, folder: Path, lengths: Sequence[int]
) -> tuple[dict[int, Tensor], list[str]]:
    """Last logits [T, V] of the exported model at each length; what of it is not the checkpoint's.

    The latter is looked at in the model as transformers runs it, for the message of a difference.
    """
    device, _ = device_and_dtype()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    logits, causes = {}, list[str]()
    ours, theirs = look_at(checkpoint).head_rule, find_head_rule(model.config)
    if ours != theirs:
        key = theirs.key or ours.key
        causes.append(f"its logits are {theirs}, the checkpoint's {ours}: {key} of config.json")
    for length in lengths:
        tokens_BT = _random_tokens(length, model.config.vocab_size).to(device)
        kept_BTV = model(input_ids=tokens_BT, logits_to_keep=_COMPARED_TOKENS).logits
        logits[length] = kept_BTV[0].cpu()
        window = window_for_length(length, factors.geometry.original_len)
        if fault := rotary_fault(model, factors, window):
            causes.append(f"at {length} tokens it has {fault}")
    return logits, causes


def _cause(folder: Path, dtype: torch.dtype, causes: list[str]) -> str:
    """Why the logits differ, as far as it can be seen."""
    stored = {
        values.dtype
        for _, tensors in find_weights(folder).by_file()
        for values in tensors.values()
        if values.is_floating_point()
    }
    if stored != {dtype}:
        formats = ", ".join(sorted(map(str, stored)))
        causes = [*causes, f"its weights are {formats}, not {dtype} (export.dtype)"]
    if causes:
        return f"The cause: {'; '.join(causes)}"
    return (
        "Logits' scale and cap, rotary table and number format are the same: its layers compute "
        "something else"
    )


def _random_tokens(length: int, vocab_size: int) -> Tensor:
    """One row of token ids, the same for both models."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
