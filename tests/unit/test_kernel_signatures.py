"""Kernels that only a GPU runs: our calls bind to their real signatures, which a CPU computes here.

``kernel_signatures.json`` holds the parameters as they stand in the named release. Where a package
is installed its source is read and compared; nothing of it is imported. Each adapter then calls a
reference that takes what the real function takes: names, positions, defaults, layouts, the scale,
grouped heads.
"""

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention_kernels import DOC_ENDS, HEADS, KV_HEADS, fake_varlen, random_qkv
from test_norms import built, loss_and_gradients
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention.kernels import AttentionKernel
from longrope2.attention.layout import build_layout
from longrope2.attention.windowed import windowed_attention
from longrope2.model.norms import NormKernel, use_norm
from longrope2.rope.factors import Window
from longrope2.training.config import OptimizerKind, TrainingConfig
from longrope2.training.optimizer import make_optimizer

FACTS = json.loads((Path(__file__).parent / "kernel_signatures.json").read_text())
OTHER_SCALE = 0.2  # not 1 / sqrt(head dim), which kernels take by themselves


def signature(kernel: str, function: str) -> inspect.Signature:
    """The parameters that ``kernel_signatures.json`` holds."""
    return inspect.signature(eval(f"lambda {FACTS[kernel]['functions'][function]}: None"))


def bound(kernel: str, function: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute`` with keywords, behind the real function's parameters."""
    parameters = signature(kernel, function)

    def call(*args: Any, **keywords: Any) -> Any:
        given = parameters.bind(*args, **keywords)
        given.apply_defaults()
        return compute(**given.arguments)

    return call


def parameters_in_source(file: Path, name: str) -> str:
    """``def``'s parameters without annotations, as the facts write them."""
    *outer, last = name.split(".")
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in outer:
        body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == part)
    function = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == last)
    everything = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    for argument in everything:
        argument.annotation = None
    text = ast.unparse(function.args)
    return str(inspect.signature(eval(f"lambda {text}: None")))[1:-1]


@pytest.mark.parametrize("kernel", FACTS)
def test_the_facts_are_those_of_the_package_that_is_here(kernel: str) -> None:
    package, _, inner = FACTS[kernel]["module"].partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed; its parameters: {FACTS[kernel]['read_in']}")
    file = Path(spec.origin).parent / f"{inner.replace('.', '/')}.py"
    for name, parameters in FACTS[kernel]["functions"].items():
        assert parameters_in_source(file, name) == parameters, f"{kernel}: {name}"


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    return fake_varlen(q, k, v, (ends, ends), q.shape[-1] ** -0.5 if scale is None else scale)


def flash_varlen(*, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **rest) -> Tensor:
    longest = int(cu_seqlens_q.diff().max())
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert (rest["max_seqlen_q"], rest["max_seqlen_k"]) == (longest, longest)
    assert (rest["dropout_p"], rest["window_size"], rest["softcap"]) == (0.0, (-1, -1), 0.0)
    return attend_varlen(q, k, v, cu_seqlens_q, softmax_scale)


def flash_dense(*, q, k, v, softmax_scale, causal, **rest) -> Tensor:
    assert causal and (rest["dropout_p"], rest["window_size"]) == (0.0, (-1, -1))
    ends = torch.tensor([0, q.shape[1]])
    return torch.stack([attend_varlen(*row, ends, softmax_scale) for row in zip(q, k, v)])  # noqa: B905


def torch_varlen(*, query, key, value, cu_seq_q, cu_seq_k, scale, window_size, **rest) -> Tensor:
    assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k)  # causal, in its words
    assert rest["enable_gqa"] or query.shape[1] == key.shape[1]
    assert rest["max_q"] == rest["max_k"] == int(cu_seq_q.diff().max())
    return attend_varlen(query, key, value, cu_seq_q, scale)


def install(kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """References in place of the packages' functions."""
    name = kernel.value
    if kernel is AttentionKernel.flash_attn:
        module: Any = ModuleType(name)
        module.flash_attn_func = bound(name, "flash_attn_func", flash_dense)
        module.flash_attn_varlen_func = bound(name, "flash_attn_varlen_func", flash_varlen)
        monkeypatch.setitem(sys.modules, name, module)
        return
    function = bound(name, "varlen_attn", torch_varlen)
    # The adapter asks the function for its parameters.
    function.__signature__ = signature(name, "varlen_attn")  # pyright: ignore
    module = SimpleNamespace(varlen_attn=function)
    monkeypatch.setitem(sys.modules, FACTS[name]["module"], module)


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("kernel", [AttentionKernel.flash_attn, AttentionKernel.torch_varlen])
def test_attention_through_the_whole_adapter(
    monkeypatch: pytest.MonkeyPatch, kernel: AttentionKernel, window: Window, kv_heads: int
) -> None:
    """Output and gradients equal sdpa's, with a scale that is no kernel's default."""
    install(kernel, monkeypatch)
    results = []
    for chosen in (kernel, AttentionKernel.sdpa):
        q, k, v = random_qkv(kv_heads)
        layout = build_layout(window, DOC_ENDS, kernel=chosen)
        out = windowed_attention(q, k, v, layout, OTHER_SCALE)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def liger_norm(*, X, W, eps, offset, casting_mode, in_place, **rest) -> Tensor:
    # In place would overwrite the gradient that the residual stream goes on with.
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    return rms_norm(X, W, eps)


def apex_norm(*, input, weight, normalized_shape, eps, memory_efficient) -> Tensor:
    assert tuple(normalized_shape) == tuple(input.shape[-1:]) and not memory_efficient
    return rms_norm(input, weight, eps)


@pytest.mark.parametrize("kernel", [NormKernel.liger, NormKernel.apex])
def test_norms_through_the_whole_adapter(
    monkeypatch: pytest.MonkeyPatch, kernel: NormKernel
) -> None:
    """Loss and gradients of a model equal those with its own norms."""
    if kernel is NormKernel.liger:
        forward = bound("liger", "LigerRMSNormFunction.forward", liger_norm)
        function = SimpleNamespace(apply=lambda *args: forward(None, *args))  # autograd's, no names
        module = SimpleNamespace(LigerRMSNormFunction=function)
        monkeypatch.setitem(sys.modules, FACTS["liger"]["module"], module)
    else:
        function = bound("apex_norm", "fused_rms_norm_affine", apex_norm)
        module = SimpleNamespace(fused_rms_norm_affine=function)
        monkeypatch.setitem(sys.modules, FACTS["apex_norm"]["module"], module)
    model, plain = (built(LlamaForCausalLM, LlamaConfig) for _ in range(2))
    assert use_norm(model, kernel) == 5
    found, expected = loss_and_gradients(model), loss_and_gradients(plain)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def adam(*, params, lr, betas, eps, weight_decay, adam_w_mode, **rest) -> torch.optim.AdamW:
    assert adam_w_mode and rest["bias_correction"] and not rest["amsgrad"]
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@pytest.mark.parametrize("library", ["apex", "deepspeed"])
def test_optimizers_through_the_whole_adapter(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """Three steps equal torch's, decay of matrices alone included."""
    fake = bound(f"{library}_adam", "FusedAdam.__init__", lambda self, **given: adam(**given))
    module = SimpleNamespace(FusedAdam=lambda *args, **keywords: fake(None, *args, **keywords))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", module)
    found, expected = (
        stepped(kind)
        for kind in (OptimizerKind(f"{library}_fused_adam"), OptimizerKind.torch_adamw)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def stepped(kind: OptimizerKind) -> list[Tensor]:
    """Parameters of a small model after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3, bias=False))
    training = TrainingConfig(optimizer=kind, learning_rate=0.1, weight_decay=0.5, beta1=0.7)
    optimizer = make_optimizer(model, training)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]
