"""Which kernel is chosen and why, and what kernels that need a GPU are handed.

The kernels here are fakes: brute-force attention with the real functions' signatures. The real ones
are compared in tests/gpu/test_kernels.py.
"""

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longrope2.attention.kernels import Varlen, choose_kernel, varlen_attention
from longrope2.attention.layout import Axis, Gathered, build_layout
from longrope2.attention.windowed import attend_parts, windowed_attention
from longrope2.errors import ConfigError
from longrope2.kernel_choice import AttentionKernel
from longrope2.rope.factors import Window

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 64
DOC_ENDS = (5, 21, 22, 40, 64)
SCALING = HEAD_DIM**-0.5
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def fake_varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lens: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """Brute force over the documents between the cumulative lengths of queries and keys.

    The last query of a document reads its last key, as both kernels have it.
    """
    k_TKD, v_TKD = (
        x.repeat_interleave(q_THD.shape[1] // x.shape[1], dim=1) for x in (k_TKD, v_TKD)
    )
    (document_T, left_T), (document_C, left_C) = map(places, lens)
    allowed_TC = (document_T[:, None] == document_C) & (left_C >= left_T[:, None])
    scores_HTC = torch.einsum("thd,chd->htc", q_THD, k_TKD) * scale
    weights_HTC = scores_HTC.masked_fill(~allowed_TC, float("-inf")).softmax(-1)
    return torch.einsum("htc,chd->thd", weights_HTC, v_TKD)


def places(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token its document, and how many tokens of that are left."""
    token_T = torch.arange(int(ends[-1]))
    document_T = torch.bucketize(token_T, ends[1:], right=True)
    return document_T, ends[1:][document_T] - token_T


class FakeFlashAttention(ModuleType):
    """The two functions of the flash-attn package that are used, with its signatures."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[str] = []

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ) -> Tensor:
        assert (
            causal and dropout_p == 0 and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[0] == 0
        )
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        self.calls.append(f"varlen {cu_seqlens_q.tolist()}")
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return fake_varlen(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale)

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ) -> Tensor:
        assert causal and dropout_p == 0 and q.shape[0] == 1
        self.calls.append(f"dense {q.shape[1]} of {k.shape[1]}")
        lens = (torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]]))
        return fake_varlen(q[0], k[0], v[0], lens, softmax_scale)[None]


def fake_varlen_attn_of_torch_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert is_causal and query.shape[1] == key.shape[1], "2.10 has no grouped heads"
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    return fake_varlen(query, key, value, (cu_seq_q, cu_seq_k), query.shape[-1] ** -0.5)


def fake_varlen_attn_of_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    return fake_varlen(query, key, value, (cu_seq_q, cu_seq_k), scale)


def random_qkv(kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [
        (1, HEADS, LENGTH, HEAD_DIM),
        (1, kv_heads, LENGTH, HEAD_DIM),
        (1, kv_heads, LENGTH, HEAD_DIM),
    ]
    q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


def assert_same_as_sdpa(kernel: AttentionKernel, window: Window, kv_heads: int) -> None:
    """Output and gradients through ``windowed_attention`` with either layout."""
    results = []
    for chosen in (kernel, AttentionKernel.sdpa):
        q, k, v = random_qkv(kv_heads)
        out = windowed_attention(q, k, v, build_layout(window, DOC_ENDS, kernel=chosen), SCALING)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("window", list(Window))
def test_arguments_of_flash_attn(
    monkeypatch: pytest.MonkeyPatch, window: Window, kv_heads: int
) -> None:
    fake = FakeFlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    assert_same_as_sdpa(AttentionKernel.flash_attn, window, kv_heads)
    assert fake.calls == [
        f"varlen {[0, *DOC_ENDS]}" if window is Window.SHORT else f"dense {LENGTH} of {LENGTH}"
    ]


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize(
    "function", [fake_varlen_attn_of_torch_2_10, fake_varlen_attn_of_torch_2_13]
)
def test_arguments_of_torch_varlen(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], window: Window, kv_heads: int
) -> None:
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=function)
    )
    assert_same_as_sdpa(AttentionKernel.torch_varlen, window, kv_heads)


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("kernel", [AttentionKernel.flash_attn, AttentionKernel.torch_varlen])
def test_fewer_queries_than_keys(
    monkeypatch: pytest.MonkeyPatch, kernel: AttentionKernel, rank: int, window: Window
) -> None:
    """Parts of a context rank: every kernel lets the last query read the last key."""
    fake = FakeFlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    new = SimpleNamespace(varlen_attn=fake_varlen_attn_of_torch_2_13)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", new)
    q, k, v = random_qkv(KV_HEADS)
    outputs = []
    for chosen in (kernel, AttentionKernel.sdpa):
        layout = build_layout(window, DOC_ENDS, context=Axis(rank, 2), kernel=chosen)
        assert isinstance(layout.documents, Gathered)
        own = torch.cat([q[:, :, a:b] for a, b in layout.own_spans], dim=2)
        keys = [tuple(x[:, :, slice(*p.keys)] for x in (k, v)) for p in layout.documents.parts]
        outputs.append(attend_parts(own, keys, layout.documents, SCALING))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    if kernel is AttentionKernel.flash_attn:
        long = ["dense 16 of 16", "dense 16 of 64"], ["dense 16 of 32", "dense 16 of 48"]
        short = ["varlen [0, 5, 21, 22, 32]"], ["dense 8 of 18", "varlen [0, 24]"]
        assert fake.calls == (long if window is Window.LONG else short)[rank]


def test_a_scale_that_an_old_torch_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(varlen_attn=fake_varlen_attn_of_torch_2_10)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    q, k, v = (x[0].transpose(0, 1) for x in random_qkv(HEADS))
    with pytest.raises(RuntimeError, match="takes no scale, and this model's is 0.5"):
        whole = Varlen(AttentionKernel.torch_varlen, torch.tensor([0, LENGTH]), LENGTH)
        varlen_attention(q, k, v, whole, 0.5)


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_of_an_aligned_segment_gets_its_own_documents(rank: int) -> None:
    layout = build_layout(
        Window.SHORT, (10, 32, 50, 64), sequence=Axis(rank, 2), kernel=AttentionKernel.flash_attn
    )
    documents = layout.documents
    assert isinstance(documents, Varlen) and layout.exchange_group is None
    assert documents.cu_lens_N.tolist() == [[0, 10, 32], [0, 18, 32]][rank]
    assert documents.max_len == [22, 18][rank]


@pytest.mark.parametrize("kernel", [AttentionKernel.flash_attn, AttentionKernel.torch_varlen])
def test_forcing_an_absent_kernel_is_one_clear_error(kernel: AttentionKernel) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_kernel(kernel, CPU, torch.bfloat16)
    assert refused.value.faults == (
        f"attention.kernel={kernel.value} cannot run here: it needs a CUDA device, this is cpu; "
        "use auto or sdpa",
    )


def test_a_float32_run_on_a_gpu_has_sdpa_only() -> None:
    with pytest.raises(
        ConfigError,
        match=r"it needs bf16, this is float32 \(training.precision\); use auto or sdpa",
    ):
        choose_kernel(AttentionKernel.flash_attn, CUDA, torch.float32, run=False)
    assert (
        choose_kernel(AttentionKernel.auto, CUDA, torch.float32, run=False).kernel
        is AttentionKernel.sdpa
    )


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choice = choose_kernel(AttentionKernel.auto, CUDA, torch.bfloat16, run=False)
    assert choice.kernel is AttentionKernel.sdpa
    assert (
        "no flash_attn: the flash-attn package is not installed (pip install flash-attn"
        in choice.reason
    )
    assert (
        f"no torch_varlen: torch {torch.__version__} has no varlen_attn; it came with 2.10"
        in choice.reason
    )


def test_auto_takes_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    choice = choose_kernel(AttentionKernel.auto, CUDA, torch.bfloat16, run=False)
    assert str(choice) == "flash_attn (auto)"
    forced = choose_kernel(AttentionKernel.torch_varlen, CUDA, torch.bfloat16, run=False)
    assert str(forced) == "torch_varlen (forced by attention.kernel)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the probe succeeds on a GPU")
def test_a_kernel_that_fails_when_run_is_passed_over() -> None:
    """Torch's own varlen is there but this torch has no CUDA: only running it shows that."""
    choice = choose_kernel(AttentionKernel.auto, CUDA, torch.bfloat16)
    assert choice.kernel is AttentionKernel.sdpa
    assert re.search(
        "no torch_varlen: "
        "(AssertionError: Torch not compiled with CUDA|RuntimeError: Found no NVIDIA)",
        choice.reason,
    )


@pytest.mark.parametrize("kernel", list(AttentionKernel)[1:])
@pytest.mark.parametrize("window", list(Window))
def test_moving_a_layout_keeps_it(kernel: AttentionKernel, window: Window) -> None:
    layout = build_layout(window, DOC_ENDS, kernel=kernel)
    moved = layout.to("meta")
    before, after = layout.documents, moved.documents
    assert type(after) is type(before)
    buckets = zip(getattr(before, "buckets", ()), getattr(after, "buckets", ()), strict=True)
    for old, new in ((layout, moved), (before, after), *buckets):
        for name, value in vars(old).items():
            found = getattr(new, name)
            if isinstance(value, Tensor):
                assert (found.device.type, found.shape) == ("meta", value.shape)
            else:
                assert name in ("documents", "buckets") or found == value
