"""Proof that an exported folder is the trained model: plain transformers against our own.

The quick way is bounded whatever the model's size: stored weights one file at a time, and logits of
the first layers alone, of few tokens. It rests on every layer of a kind being computed alike.

Shape legend: T = tokens, V = vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError
from longrope2.export.hugging_face import rotary_fault
from longrope2.export.progress import say
from longrope2.export.variants import ExportVerify
from longrope2.inference.generation import window_for_length
from longrope2.model.given import cut_layers, find_head_rule, look_at
from longrope2.model.loading import device_and_dtype, find_weights, load_windowed_model
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors

# Of the largest logit, float32: two attention kernels differ by rounding, no more.
LOGIT_TOLERANCE = 1e-4
# Last positions compared; the logits of a whole long window do not fit in memory. The quick way
# reads no other tokens.
_COMPARED_TOKENS = 64


def verify_export(
    checkpoint: Path,
    factors: RescaleFactors,
    folder: Path,
    dtype: torch.dtype,
    lengths: Sequence[int],
    verify: ExportVerify = ExportVerify.full,
) -> dict[int, float]:
    """Compare logits on random tokens, in float32 from weights rounded to the exported format.

    The checkpoint is run by our own windowed model, which is told the window, the folder by plain
    transformers, which finds the window by itself; take ``lengths`` from both windows.

    Returns:
        Length -> largest absolute difference over the largest absolute logit.

    Raises:
        ArtifactError: a difference above ``LOGIT_TOLERANCE``; or, quick, a stored weight that is
            not the checkpoint's.
    """
    quick = verify is ExportVerify.quick
    at = f"at {' and '.join(map(str, lengths))} tokens"
    if quick:
        say("checking", "the weights as they are stored")
        _compare_weights(checkpoint, folder, dtype)
    # One model at a time: two copies of a large one in float32 may not fit.
    say("checking", f"the checkpoint's logits {at}")
    ours = _our_logits(checkpoint, factors, dtype, lengths, quick=quick)
    say("checking", f"plain transformers' logits {at}")
    theirs, causes = _transformers_logits(checkpoint, factors, folder, lengths, quick=quick)
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
    checkpoint: Path,
    factors: RescaleFactors,
    dtype: torch.dtype,
    lengths: Sequence[int],
    *,
    quick: bool,
) -> dict[int, Tensor]:
    """Last logits [T, V] of the checkpoint, or of its first layers, at each length."""
    device, _ = device_and_dtype()
    if quick:
        first_layers = _load_first_layers(checkpoint, look_at(checkpoint).config)
        model = WindowedModel(first_layers, factors).to(device).eval()
    else:
        model = load_windowed_model(checkpoint, factors, device=device, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    vocab_size = model.hf.config.vocab_size
    logits = {}
    for length in lengths:
        window = window_for_length(length, factors.geometry.original_len)
        tokens_BT, positions_BT = _random_text(length, vocab_size, quick=quick)
        tokens_BT, positions_BT = tokens_BT.to(device), positions_BT.to(device)
        kept = slice(-_COMPARED_TOKENS, None)
        kept_BTV = model.logits(tokens_BT, window, keep=kept, positions_BT=positions_BT)
        logits[length] = kept_BTV[0].cpu()
    return logits


@torch.inference_mode()
def _transformers_logits(
    checkpoint: Path, factors: RescaleFactors, folder: Path, lengths: Sequence[int], *, quick: bool
) -> tuple[dict[int, Tensor], list[str]]:
    """Last logits [T, V] of the exported model at each length; what of it is not the checkpoint's.

    The latter is looked at in the model as transformers runs it, for the message of a difference.
    """
    device, _ = device_and_dtype()
    model: Any
    if quick:
        model = _load_first_layers(folder, AutoConfig.from_pretrained(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    logits, causes = {}, list[str]()
    ours, theirs = look_at(checkpoint).head_rule, find_head_rule(model.config)
    if ours != theirs:
        key = theirs.key or ours.key
        causes.append(f"its logits are {theirs}, the checkpoint's {ours}: {key} of config.json")
    for length in lengths:
        tokens_BT, positions_BT = _random_text(length, model.config.vocab_size, quick=quick)
        where = {} if not quick else {"position_ids": positions_BT.to(device)}
        kept_BTV = model(
            input_ids=tokens_BT.to(device), logits_to_keep=_COMPARED_TOKENS, **where
        ).logits
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


def _load_first_layers(folder: Path, config: Any) -> Any:
    """A folder's model with as few layers as show every kind, float32; the others are not read."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the weights of all other layers
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, config=cut_layers(config), dtype=torch.float32
        )
    finally:
        transformers_logging.set_verbosity(before)


def _compare_weights(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Refuse stored weights that are not the checkpoint's in the exported number format."""
    files = zip(find_weights(checkpoint).by_file(), find_weights(folder).by_file(), strict=True)
    for (file, given), (_, written) in files:
        for name, tensor in given.items():
            wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            found = written.get(name)
            if found is None or found.dtype != wanted.dtype or not torch.equal(found, wanted):
                raise ArtifactError(
                    f"{folder}: {name} in {file} is not the checkpoint's in {dtype} "
                    "(export.dtype); nothing was exported"
                )


def _random_text(length: int, vocab_size: int, *, quick: bool) -> tuple[Tensor, Tensor]:
    """One row of token ids and their positions [1, T], the same for both models.

    Of a text of ``length`` tokens; quick: the last ones alone.
    """
    first = max(0, length - _COMPARED_TOKENS) if quick else 0
    generator = torch.Generator().manual_seed(length)
    tokens_BT = torch.randint(vocab_size, (1, length - first), generator=generator)
    return tokens_BT, torch.arange(first, length)[None]
