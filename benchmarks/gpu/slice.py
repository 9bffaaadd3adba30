"""``python -m benchmarks.gpu.slice``: what one rank of a long run computes, on one device alone.

With 8 ranks per segment of 131,072 tokens, a rank of LLaMA3-8B runs every dense product over its
16,384 tokens, and attention for 4 of 32 query heads and 1 of 8 key/value heads over all 131,072.
Both are done here with the training code itself; the exchange between ranks is replaced by a
rearrangement in memory of the same shape and size, so communication is all that is missing (and
parameter gathers, and the optimizer). Layers are as many as asked for, or as fit.

Per window kind: seconds of forward and backward, tokens per second, peak memory, FLOPs and causal
MFU (model/shape.py). ``--tiny`` shows on a CPU that the script works.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention import windowed
from longrope2.attention.kernels import choose_kernel
from longrope2.attention.layout import Axis, build_layout
from longrope2.kernel_choice import AttentionKernel, NormKernel
from longrope2.model.norms import choose_norm, use_norm
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.training.engine import apply_recompute
from longrope2.training.forecast import peak_tflops


@dataclass(frozen=True)
class Slice:
    """Sizes of the measurement; the model's are LLaMA3-8B's."""

    segment_tokens: int = 131_072
    sequence: int = 8
    """Ranks that would share the segment."""
    document_tokens: int = 4096
    """Documents of a short window."""
    hidden: int = 4096
    intermediate: int = 14_336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256
    rope_base: float = 500_000.0

    @property
    def local_tokens(self) -> int:
        """Tokens of the rank."""
        return self.segment_tokens // self.sequence


LLAMA3_8B = Slice()
TINY = Slice(segment_tokens=512, document_tokens=32, hidden=64, intermediate=96, heads=8,
             kv_heads=8, vocabulary=101, rope_base=10_000.0)  # fmt: skip


def measure(
    size: Slice, layers: int, recompute: Recompute, device: torch.device, *, rounds: int = 3
) -> dict[str, Any]:
    """Both windows through a model of ``layers`` layers.

    The best of ``rounds`` passes of each window after a first one counts.
    """
    bf16 = device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    kernel = choose_kernel(AttentionKernel.auto, device, dtype)
    peak = peak_tflops(device, None, bf16=bf16)
    model, shape = _model(size, layers, device, dtype)
    norm = choose_norm(NormKernel.auto, device, dtype)
    use_norm(model.hf, norm.kernel)
    apply_recompute(model.hf, recompute)
    model.train()
    found: dict[str, Any] = {
        "layers": layers,
        "recompute": recompute.value,
        "kernel": str(kernel),
        "norm": str(norm),
        "windows": {},
    }
    for window in Window:
        seconds, memory = _passes(model, size, window, kernel.kernel, device, rounds)
        span = size.segment_tokens if window is Window.LONG else size.document_tokens
        flops = shape.training_flops(
            size.local_tokens, float(size.segment_tokens) * span / size.sequence
        )
        found["windows"][window.value] = {
            "seconds": seconds,
            "tokens_per_second": size.local_tokens / seconds,
            "tflop": flops / 1e12,
            "memory_peak_bytes": memory,
            "mfu": flops / seconds / (peak * 1e12) if peak else None,
        }
    return found


def _model(
    size: Slice, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[WindowedModel, ModelShape]:
    """A random model made on the device, and its sizes."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=False,
        max_position_embeddings=size.segment_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        shape = ModelShape.from_folder(Path(folder))
    geometry = RopeGeometry(size.hidden // size.heads, size.rope_base, size.segment_tokens // 16)
    factors = closed_form_factors(RopeMethod.yarn, geometry, size.segment_tokens)
    torch.manual_seed(0)
    with device:
        hf = LlamaForCausalLM._from_config(config, dtype=dtype)
    return WindowedModel(hf, factors), shape


def _passes(
    model: WindowedModel,
    size: Slice,
    window: Window,
    kernel: AttentionKernel,
    device: torch.device,
    rounds: int,
) -> tuple[float, int | None]:
    """Best seconds of forward and backward, and the peak memory."""
    ends = list(range(size.document_tokens, size.segment_tokens + 1, size.document_tokens))
    everyone: Any = _NoGroup(size.sequence)
    layout = build_layout(
        window, ends, sequence=Axis(size.sequence - 1, size.sequence, everyone), kernel=kernel
    ).to(device)
    tokens_BT = torch.randint(size.vocabulary, (1, size.local_tokens), device=device)
    labels_BT = torch.randint(size.vocabulary, (1, size.local_tokens), device=device)
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        patch.object(windowed, "tokens_to_heads", _tokens_to_heads),
        patch.object(windowed, "heads_to_tokens", _heads_to_tokens),
    ):
        for _ in range(rounds + 1):
            model.zero_grad(set_to_none=True)
            _wait_for(device)
            began = time.perf_counter()
            (model(tokens_BT, labels_BT, window, layout) / size.local_tokens).backward()
            _wait_for(device)
            times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return min(times[1:]), memory


@dataclass(frozen=True)
class _NoGroup:
    """Stands in for a process group of ``size`` ranks."""

    size: int


def _tokens_to_heads(
    q: Tensor, k: Tensor, v: Tensor, group: _NoGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, D] -> [B, H / n, T * n, D]: other ranks' tokens are our other heads'."""

    def rearranged(x: Tensor) -> Tensor:
        heads = x.unflatten(1, (group.size, x.shape[1] // group.size))
        return heads.transpose(1, 2).flatten(2, 3).contiguous()

    return rearranged(q), rearranged(k), rearranged(v)


def _heads_to_tokens(out_BThD: Tensor, group: _NoGroup) -> Tensor:
    """[B, T * n, H / n, D] -> [B, T, H, D]."""
    tokens = out_BThD.unflatten(1, (group.size, out_BThD.shape[1] // group.size))
    return tokens.transpose(1, 2).flatten(2, 3).contiguous()


def _wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _most_layers(
    size: Slice, recompute: Recompute, device: torch.device, largest: int
) -> dict[str, Any]:
    """The measurement with the most layers that fit, found by halving."""
    layers = largest
    while True:
        try:
            return measure(size, layers, recompute, device)
        except torch.cuda.OutOfMemoryError:
            if layers == 1:
                raise
        torch.cuda.empty_cache()
        layers = max(1, layers * 3 // 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.slice", description="One rank of a long run, on one device."
    )
    tiny = "a tiny model and segment, on whatever device there is"
    parser.add_argument("--tiny", action="store_true", help=tiny)
    as_fit = "layers; as many as fit, at most 32, when not given"
    parser.add_argument("--layers", type=int, help=as_fit)
    policies = {"type": Recompute, "choices": list(Recompute), "default": Recompute.dense}
    parser.add_argument("--recompute", **policies)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("LLaMA3-8B's slice needs a CUDA device; --tiny runs anywhere")
    size, layers = (TINY, given.layers or 2) if given.tiny else (LLAMA3_8B, given.layers)
    if layers:
        found = measure(size, layers, given.recompute, device)
    else:
        found = _most_layers(size, given.recompute, device, 32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    figures = {"device": name, "torch": torch.__version__, "slice": size.__dict__, **found}
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
