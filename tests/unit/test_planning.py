"""The planner against published and derived figures, and its FLOPs against torch's own counter."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention.layout import build_layout
from longrope2.model.shape import ModelShape, Workload
from longrope2.model.windowed import WindowedModel
from longrope2.planning.choice import choose_layout, find_refusal
from longrope2.planning.hardware import HardwareConfig, make_machine
from longrope2.planning.memory import (
    Layout,
    Recompute,
    ZeroBuffers,
    load_bytes,
    predict_memory,
    saved_layer_bytes_per_token,
)
from longrope2.planning.timing import (
    attention_flops,
    exchange_bytes,
    exchange_passes,
    forward_hours,
    gather_bytes,
    gathered_from_all,
    key_bytes,
    predict_time,
    product_flops,
)
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

GIB = 2**30
ROOT = Path(__file__).parent.parent.parent
LLAMA = ModelShape.from_folder(ROOT / "models" / "llama3_8b")
PHI = ModelShape.from_folder(ROOT / "models" / "phi3_mini")
MIX = Workload(131_072, 8_388_608, 10_000_000_000, long_share=0.7, short_document_tokens=4096)
A100 = make_machine(HardwareConfig(gpu="A100"))


def layout(recompute: str = "full", sequence: int = 8, **fields) -> Layout:
    return Layout(64 // sequence, sequence, Recompute(recompute), **fields)


def with_share(share: float) -> Workload:
    return dataclasses.replace(MIX, long_share=share)


def test_parameters_of_the_papers_models() -> None:
    assert LLAMA.parameters == 8_030_261_248 and LLAMA.matrix_parameters / 1e9 == pytest.approx(
        7.505, abs=5e-4
    )
    assert PHI.parameters == 3_821_079_552 and PHI.matrix_parameters / 1e9 == pytest.approx(
        3.722, abs=5e-4
    )


@pytest.mark.parametrize(
    ("shape", "hours", "share", "short", "gflops", "causal", "whole"),
    [
        (LLAMA, 54, 0.7, 4096, 118.1, 0.304, 0.493),
        (LLAMA, 54, 0.9, 4096, 138.1, 0.356, 0.596),
        (LLAMA, 54, 40_000 / 72_000, 4096, 103.8, 0.267, 0.419),
        (PHI, 39, 0.7, 1024, 76.6, 0.273, 0.467),
    ],
)
def test_utilisation_of_the_papers_runs(shape, hours, share, short, gflops, causal, whole) -> None:
    """10 B tokens on 64 A100 (paper, section 4.1)."""
    work = dataclasses.replace(MIX, long_share=share, short_document_tokens=short)
    rate = 1e10 / (hours * 3600 * 64)
    assert work.mean_model_flops(shape) / 1e9 == pytest.approx(gflops, abs=0.1)
    assert rate * work.mean_model_flops(shape) / 312e12 == pytest.approx(causal, abs=6e-4)
    assert rate * work.mean_model_flops(shape, whole_square=True) / 312e12 == pytest.approx(
        whole, abs=1.1e-3
    )


@pytest.mark.parametrize(
    ("recompute", "share", "hours"),
    [
        ("full", 0.7, 38.1),
        ("full", 0.9, 45.3),
        ("dense", 0.7, 32.2),
        ("dense", 0.9, 37.8),
        ("none", 0.7, 29.5),
        ("none", 0.9, 35.1),
    ],
)
def test_compute_floors(recompute: str, share: float, hours: float) -> None:
    """Products at 220 and FlashAttention-2 at 180 TFLOP/s, no communication."""
    time = predict_time(LLAMA, with_share(share), layout(recompute), A100)
    assert time.floor_hours == pytest.approx(hours, abs=0.06)
    assert time.hours > time.floor_hours


def test_memory_of_llama_on_64_gpus_by_part() -> None:
    memory = predict_memory(LLAMA, MIX, layout("full"))
    float32_sums = (
        2 * LLAMA.parameters / 64
    )  # the reference counts gradients in bf16, 16 bytes a parameter
    assert (memory.states - float32_sums) / GIB == pytest.approx(1.87, abs=0.01)
    assert 8 * (memory.states - float32_sums) / GIB == pytest.approx(15, abs=0.1)  # on 8 GPUs
    assert memory.checkpoints / GIB == 4.0
    assert LLAMA.head_parameters * 4 / GIB == pytest.approx(2.0, abs=0.05)
    assert (
        131_072 // 8 * LLAMA.vocabulary * 4 / GIB == pytest.approx(7.8, abs=0.05)
        and memory.logits / GIB < 1.3
    )
    assert 2 * LLAMA.layer_parameters / GIB == pytest.approx(0.4, abs=0.01)
    outputs = 32 * 16_384 * (4096 * 2 + 32 * 4) / GIB
    assert outputs == pytest.approx(4, abs=0.1)
    assert memory.peak / GIB + outputs == pytest.approx(
        20, abs=0.5
    )  # attention outputs kept, and nothing else of attention


def test_dense_recompute_keeps_all_that_attention_reads() -> None:
    dense, full = (predict_memory(LLAMA, MIX, layout(name)) for name in ("dense", "full"))
    per_token = 2 * (3 * 4096 + 2 * 1024) + 4 * 32
    assert dense.attention == 32 * 16_384 * per_token
    assert dense.layer == full.layer - 16_384 * per_token
    assert predict_memory(LLAMA, MIX, layout("dense", offload=True)).attention == 0


def test_without_recompute_nothing_fits_at_eight_ranks() -> None:
    assert predict_memory(LLAMA, MIX, layout("none")).peak > A100.usable_bytes
    # With fused norms and MLP it would be 68 GiB of activations: 4H + 2H, attention, gate, up and
    # their product.
    fused = (
        saved_layer_bytes_per_token(LLAMA, layout("none", 1)) - 2 * 4 * LLAMA.hidden - 2 * LLAMA.mlp
    )
    assert 32 * 16_384 * (fused - 128) / GIB == pytest.approx(68, abs=0.5)


def test_traffic_of_llama_on_64_gpus() -> None:
    assert exchange_bytes(LLAMA, MIX, layout()) / 32 / 1e6 == pytest.approx(294, abs=0.5)
    assert exchange_bytes(LLAMA, MIX, layout()) / 1e9 == pytest.approx(9.4, abs=0.05)
    assert sum(gather_bytes(LLAMA, layout())) / 1e9 == pytest.approx(62.2, abs=0.1)
    assert sum(
        gather_bytes(LLAMA, layout(zero=ZeroBuffers(gradient_bytes=2)))
    ) / 1e9 == pytest.approx(46.2, abs=0.1)
    assert exchange_bytes(LLAMA, MIX, layout(sequence=1)) == 0
    assert gather_bytes(LLAMA, Layout(1, 1, Recompute.full)) == (0, 0)
    assert load_bytes(LLAMA, layout()) == 2 * LLAMA.parameters


def test_some_layers_recomputed_keep_and_repeat_their_share() -> None:
    """By hand: 12 layers under the policy, 20 that keep everything and repeat nothing."""
    some, all_of_them = layout("dense", recompute_layers=12), layout("dense")
    memory, whole = predict_memory(LLAMA, MIX, some), predict_memory(LLAMA, MIX, layout("none"))
    dense = predict_memory(LLAMA, MIX, all_of_them)
    assert memory.activations == whole.activations * 20 / 32
    assert memory.attention == dense.attention * 12 / 32
    assert memory.checkpoints == 12 * 16_384 * 4096 * 2
    assert memory.layer == whole.layer  # the last layer is kept
    assert product_flops(LLAMA, layout("none")) == 6 * LLAMA.matrix_parameters
    repeated = product_flops(LLAMA, some) - product_flops(LLAMA, layout("none"))
    assert repeated == 2 * 12 * LLAMA.layer_parameters
    assert exchange_passes(LLAMA, layout("full", recompute_layers=8)) == 2 + 8 / 32
    forward, twelve = 1e12, layout("full", recompute_layers=12)
    assert attention_flops(LLAMA, twelve, forward) == (3.5 + 12 / 32) * forward
    assert attention_flops(LLAMA, some, forward) == 3.5 * forward


def test_layouts_recompute_no_more_than_they_must() -> None:
    choice = choose_layout(LLAMA, MIX, A100, ZeroBuffers(), (1,), fused_norms=True)
    best = next(
        fit
        for fit in choice.fitting
        if fit.layout.recompute is Recompute.dense and fit.layout.recompute_layers is not None
    )
    number = best.layout.recompute_layers
    assert number is not None and 0 < number < LLAMA.num_layers
    fewer = dataclasses.replace(best.layout, recompute_layers=number - 1)
    assert predict_memory(LLAMA, MIX, fewer).peak > A100.usable_bytes >= best.memory.peak
    every = dataclasses.replace(best.layout, recompute_layers=None)
    assert best.time.hours < predict_time(LLAMA, MIX, every, A100).hours
    assert any(fit.layout == every for fit in choice.fitting)


def test_hpz_gathers_from_all_ranks_once_a_step() -> None:
    eight = ZeroBuffers(hpz_size=8)
    assert gathered_from_all(LLAMA, layout(), 8) == 1
    weights, _ = gather_bytes(LLAMA, layout(zero=eight))
    everywhere = 8 * weights * gathered_from_all(LLAMA, layout(zero=eight), 8)
    assert everywhere == pytest.approx(2 * LLAMA.parameters)  # one forward pass in bf16
    one_group = Layout(1, 8, Recompute.full, zero=eight)
    assert gathered_from_all(LLAMA, one_group, 8) == 1


def test_a_thin_network_shows_in_short_windows_only() -> None:
    thin = make_machine(HardwareConfig(gpu="A100", network_gb_per_second=25 / 8))
    time = predict_time(LLAMA, MIX, layout(), thin)
    assert time.micro_steps[Window.LONG].exposed_gathers == 0
    assert time.micro_steps[Window.SHORT].gathers > 2  # 64 GB over one adapter: more than 2 s
    two_ways = predict_time(LLAMA, MIX, layout(zero=ZeroBuffers(hpz_size=8)), thin)
    assert two_ways.micro_steps[Window.SHORT].gathers < time.micro_steps[Window.SHORT].gathers
    bound = dataclasses.replace(thin, network_bytes=thin.network_bytes / 10)
    exposed = predict_time(LLAMA, MIX, layout(), bound).micro_steps[Window.SHORT]
    assert exposed.total == pytest.approx(exposed.gathers)


def test_a_segment_over_two_nodes_exchanges_over_links_and_network_at_once() -> None:
    """By hand: 8 key/value heads become 16 under 16 processes; 7 peers on the node, 8 beyond."""
    to_each = 2 * 32 * 8192 * (2 * 4096 + 2 * 16 * 128) * 2 / 16
    time = predict_time(LLAMA, MIX, layout("dense", 16), A100).micro_steps[Window.LONG]
    assert time.exchange == pytest.approx(8 * to_each / (0.7 * 25e9))
    fast = dataclasses.replace(A100, network_bytes=A100.node_link_bytes * 2)
    time = predict_time(LLAMA, MIX, layout("dense", 16), fast).micro_steps[Window.LONG]
    assert time.exchange == pytest.approx(7 * to_each / (0.7 * 300e9))


def test_context_ranks_gather_keys_and_values() -> None:
    """By hand: 8 key/value heads of 128 channels in bf16, 16,384 tokens a rank and axis."""
    alone = Layout(8, 1, Recompute.dense, context=8)
    assert exchange_bytes(LLAMA, MIX, alone) == 0
    assert key_bytes(LLAMA, MIX, layout()) == 0
    others = 32 * 7 * 16_384 * 2 * 8 * 128 * 2
    assert key_bytes(LLAMA, MIX, alone) == others
    inside = predict_time(LLAMA, MIX, alone, A100).micro_steps[Window.LONG]
    assert inside.exchange == pytest.approx(2 * others / (0.7 * 300e9))
    # Eight ranks exchange heads on a node; each gathers one head's keys from the other node.
    over_nodes = Layout(4, 8, Recompute.full, context=2)
    assert over_nodes.num_processes == 64 and over_nodes.local_tokens(MIX) == 8192
    heads, keys = (of(LLAMA, MIX, over_nodes) for of in (exchange_bytes, key_bytes))
    assert keys == 32 * 65_536 * 2 * 128 * 2
    found = predict_time(LLAMA, MIX, over_nodes, A100).micro_steps
    assert found[Window.LONG].exchange == pytest.approx(
        3 * (heads / (0.7 * 300e9) + keys / (0.7 * 25e9))
    )
    assert found[Window.SHORT].exchange == 0


def test_memory_of_context_ranks() -> None:
    """Gathered keys and values are kept, and their gradients may outgrow those of the MLP."""
    alone = Layout(8, 1, Recompute.dense, context=8)
    kept = 2 * (2 * 4096 + 2 * 8 * 1024) + 4 * 32  # no second output: no heads are exchanged
    assert predict_memory(LLAMA, MIX, alone).attention == 32 * 16_384 * kept
    full = Layout(8, 1, Recompute.full, context=8)
    saved = saved_layer_bytes_per_token(LLAMA, full)
    mlp = 2 * (2 * 14_336 + 2 * 4096)
    assert predict_memory(LLAMA, MIX, full).layer == 16_384 * (saved + mlp)
    wide = Layout(1, 1, Recompute.full, context=64)
    keys = 2 * (8 * 1024 * 64 + 2 * 4096 + 2 * 4096 - 4 * 14_336)
    saved = saved_layer_bytes_per_token(LLAMA, wide)
    assert predict_memory(LLAMA, MIX, wide).layer == 2048 * (saved + keys)


def test_layouts_with_a_context_axis() -> None:
    """Heads no longer limit how many GPUs share a segment: 512 train at a million tokens."""
    many = dataclasses.replace(A100, num_gpus=512)
    million = dataclasses.replace(MIX, target_len=1_048_576)
    best = choose_layout(LLAMA, million, many, ZeroBuffers(), (1,)).best
    assert best is not None and best.layout.segment_ranks == 64 and best.layout.data == 8
    assert best.layout.sequence <= 32
    odd_heads = ModelShape(576, 30, 9, 3, 64, 1536, 49_152, tied=True)
    eight = dataclasses.replace(A100, num_gpus=8)
    one_segment = dataclasses.replace(MIX, step_tokens=131_072)
    best = choose_layout(odd_heads, one_segment, eight, ZeroBuffers(), (1,)).best
    assert best is not None and (best.layout.sequence, best.layout.context) == (1, 8)
    odd_target = dataclasses.replace(MIX, target_len=131_080, step_tokens=131_080 * 64)
    wide = Layout(4, 1, Recompute.full, context=16)
    refusal = find_refusal(LLAMA, odd_target, A100, wide)
    assert refusal is not None
    assert refusal.reason == "16 processes cannot share 131080 tokens evenly"


def test_fused_norms_keep_and_move_less() -> None:
    """Two norms a layer: no float32 copy of 4096 channels, and 4 bytes a channel for 36."""
    fused, plain = (layout("none", fused_norms=value) for value in (True, False))
    saved = (
        predict_memory(LLAMA, MIX, plain).activations
        - predict_memory(LLAMA, MIX, fused).activations
    )
    assert saved == 32 * 16_384 * 2 * 4096 * 4
    times = [
        predict_time(LLAMA, MIX, x, A100).micro_steps[Window.LONG].elementwise
        for x in (plain, fused)
    ]
    assert times[0] - times[1] == pytest.approx(3 * 32 * 16_384 * 2 * 4096 * 32 / (0.85 * 2039e9))


def test_offloading_costs_time_and_frees_checkpoints() -> None:
    kept, away = (layout("full", offload=offload) for offload in (False, True))
    moments = [predict_memory(LLAMA, MIX, x).moments["loss"] for x in (kept, away)]
    freed = moments[0] - moments[1]
    assert freed == predict_memory(LLAMA, MIX, kept).checkpoints
    seconds = [
        predict_time(LLAMA, MIX, x, A100).micro_steps[Window.LONG].total for x in (kept, away)
    ]
    assert seconds[1] - seconds[0] == pytest.approx(2 * freed / 20e9)


def test_flops_are_those_torch_counts() -> None:
    """Both windows, forward and backward; torch counts attention's whole square."""
    sizes = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    shape = ModelShape(32, 2, 4, 4, 8, 88, 128, tied=False)
    model = WindowedModel(
        LlamaForCausalLM(sizes),
        closed_form_factors(RopeMethod.pi, RopeGeometry(8, 10_000.0, 256), 512),
    )
    ends = [128, 256, 512]
    squares = {Window.LONG: 512**2, Window.SHORT: 128**2 + 128**2 + 256**2}
    for window in Window:
        tokens_BT = torch.randint(0, 128, (1, 512))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            # Plain logits: the counter does not look into torch's fused loss.
            logits_BTV = model.logits(tokens_BT, window, build_layout(window, ends))
            F.cross_entropy(logits_BTV[0], tokens_BT[0]).backward()
        expected = 512 * shape.model_flops(squares[window] / 512, whole_square=True)
        assert counter.get_total_flops() == expected
        causal = 512 * shape.model_flops(squares[window] / 512)
        assert expected - causal == 3 * 2 * 2 * 32 * squares[window]


def test_best_layout_is_the_fastest_that_fits() -> None:
    choice = choose_layout(LLAMA, MIX, A100, ZeroBuffers())
    best = choice.best
    assert (
        best is not None
        and best.layout.num_processes == 64
        and best.memory.peak <= A100.usable_bytes
    )
    runnable = [c for c in choice.fitting if c.layout.micro_batch == 1]
    assert best.time.hours <= 1.01 * min(c.time.hours for c in runnable)
    keys = [(round(c.time.hours, 3), c.memory.peak) for c in choice.fitting]
    assert keys == sorted(keys)  # of equal hours the one that takes less memory
    reasons = {r.layout.sequence: r.reason for r in choice.refused if r.memory is None}
    assert reasons[64] == "64 processes cannot share 32 query and 8 key/value heads"
    too_large = next(r for r in choice.refused if r.memory and r.layout == layout("none"))
    assert too_large.reason == "112 GiB of 74; the largest part is activations with 102 GiB"


def test_nothing_fits_says_what_is_short() -> None:
    one = make_machine(HardwareConfig(gpu="A100"), num_gpus=1)
    choice = choose_layout(LLAMA, MIX, one, ZeroBuffers(), (1,))
    assert choice.best is None and choice.closest is not None
    assert "the largest part is states with 135 GiB" in choice.closest.reason
    uneven = choose_layout(
        LLAMA, dataclasses.replace(MIX, step_tokens=3 * 131_072), A100, ZeroBuffers(), (1,)
    )
    assert "the 3 segments of a step cannot be worked on 8 at a time" in {
        r.reason for r in uneven.refused
    }
    odd = dataclasses.replace(MIX, target_len=131_073, step_tokens=131_073 * 64)
    assert any(
        "cannot share 131073 tokens evenly" in r.reason
        for r in choose_layout(LLAMA, odd, A100, ZeroBuffers()).refused
    )


def test_a_configured_layout_that_cannot_run_says_why() -> None:
    def reason(
        machine=A100, workload=MIX, sequence: int = 8, recompute: str = "dense"
    ) -> str | None:
        refusal = find_refusal(LLAMA, workload, machine, layout(recompute, sequence))
        return refusal and refusal.reason

    assert reason() is None
    assert reason(sequence=64) == "64 processes cannot share 32 query and 8 key/value heads"
    eight = dataclasses.replace(A100, num_gpus=8)
    assert reason(eight) == "64 processes need more than the 8 GPUs there are"
    assert reason(recompute="none") == "112 GiB of 74; the largest part is activations with 102 GiB"
    uneven = dataclasses.replace(MIX, target_len=100_000)
    assert (
        reason(workload=uneven)
        == "a step of 8388608 tokens is no whole number of segments of 100000"
    )
    assert choose_layout(LLAMA, uneven, A100, ZeroBuffers()).fitting == ()


def test_forward_passes_of_the_stages() -> None:
    products = 2 * (LLAMA.matrix_parameters - LLAMA.head_parameters) / 220e12
    attention = 2 * 32 * 4096 * 131_072 / 180e12
    hours = 10 * 131_072 * (products + attention) / 64 / 3600
    assert forward_hours(LLAMA, A100, [(131_072, 10)]) == pytest.approx(hours)
