"""The planner's figures beside counted ones: what is compared with what, and what is said of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from longrope2.model.shape import ModelShape, Workload
from longrope2.planning.memory import Layout, Recompute, predict_memory
from longrope2.training.meter import Phase
from longrope2.training.verify import Verification, print_verification, verify

SHAPE = ModelShape.from_folder(Path(__file__).parents[2] / "models" / "llama3_8b")
WORK = Workload(131_072, 8_388_608, 0, long_share=0.7, short_document_tokens=4096)
LAYOUT = Layout(8, 8, Recompute.dense)
GATHER, REDUCE, EXCHANGE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"


def phases() -> list[Phase]:
    """A rank's counts by hand.

    16,384 tokens, 6 FLOPs a weight and 2 again of the layers', whole squares of 4096-wide heads,
    two gathers in bf16, gradients in float32, q, k, v and output there and back.
    """
    found = [Phase("model and engine", peak_bytes=2**33)]
    weights, layers = 7_504_658_432, 6_979_321_856
    for kind, length in (("short", 4096), ("long", 131_072)):
        products = 2 * (3 * weights + layers) * 16_384
        moved = Counter(
            {(GATHER, 64): 4 * 8_030_261_248 - 2 * 10**9, (REDUCE, 64): 4 * 8_030_261_248}
        )
        if kind == "long":
            moved[EXCHANGE, 8] = 2 * 32 * 16_384 * (2 * 4096 + 2 * 1024) * 2
        found += [
            Phase(f"{kind}: forward", peak_bytes=2**30),
            Phase(f"{kind}: loss", peak_bytes=2**34),
            Phase(
                f"{kind}: backward",
                peak_bytes=2**35,
                product_flops=products,
                attention_flops=14 * 32 * 4096 * length * 16_384,
                collectives=Counter(dict.fromkeys(moved, 1)),
                collective_bytes=moved,
            ),
        ]
    host = Counter({"longrope2/training/step.py:1 read": 2})
    return [*found, Phase("update", peak_bytes=2**32, host_reads=host)]


def verified(of_phases: list[Phase]) -> Verification:
    return verify(SHAPE, WORK, LAYOUT, of_phases, mixed=True)


def test_figures_of_a_context_axis_by_hand() -> None:
    """Two context ranks: a long query reads five eighths of the segment on average.

    Keys are gathered with the rank's own, their gradients sent half; heads by 8 ranks as before.
    """
    found = phases()
    layout, tokens = replace(LAYOUT, data=4, context=2), 8192
    long = next(phase for phase in found if phase.name == "long: backward")
    heads = 2 * 32 * tokens * (2 * 4096 + 2 * 1024) * 2
    keys = 32 * tokens * 2 * 2 * 1024 * 2
    long.attention_flops = 14 * 32 * 4096 * (131_072 * 5 // 8) * tokens
    long.collective_bytes[EXCHANGE, 8], long.collective_bytes[EXCHANGE, 2] = heads, keys
    long.collective_bytes[GATHER, 2] = keys
    figures = {
        figure.what: figure for figure in verify(SHAPE, WORK, layout, found, mixed=True).figures
    }
    assert figures["long: attention, whole squares"].difference == pytest.approx(0)
    assert figures["long: exchanged, sent"].difference == pytest.approx(0)
    of_weights = figures["short: weights and keys gathered"]
    of_both = figures["long: weights and keys gathered"]
    assert of_both.planned - of_weights.planned == pytest.approx(keys / 1e9)
    assert of_both.counted - of_weights.counted == pytest.approx(keys / 1e9)


def test_flops_and_traffic_by_hand() -> None:
    figures = {figure.what: figure for figure in verified(phases()).figures}
    for kind in ("short", "long"):
        assert figures[f"{kind}: products"].difference == pytest.approx(0, abs=1e-9)
        assert figures[f"{kind}: attention, whole squares"].difference == pytest.approx(0)
        assert figures[f"{kind}: exchanged, sent"].difference == pytest.approx(0)
        assert figures[f"{kind}: gradients reduced"].difference == pytest.approx(0)
    assert figures["short: exchanged, sent"].counted == 0 < figures["long: exchanged, sent"].counted
    moments = {what: f.counted for what, f in figures.items() if what.startswith("memory")}
    assert list(moments.values()) == [16.0, 32.0, 4.0, 32.0]  # GiB


def test_every_moment_is_compared_with_its_own_phases() -> None:
    moments = predict_memory(SHAPE, WORK, LAYOUT).moments
    measured = phases()
    ends = {"loss": "loss", "backward": "layer", "update": "update"}
    for phase in measured:
        moment = ends.get(phase.name.split()[-1], "update")
        phase.peak_bytes = round(moments[moment])
    assert not [f for f in verified(measured).wrong if f.unit == "GiB"]
    measured[-1].peak_bytes //= 2  # far below the peak, and wrong all the same
    assert [f.what for f in verified(measured).wrong if f.unit == "GiB"] == ["memory in the update"]
    for phase in measured:
        phase.peak_bytes = round(0.9 * phase.peak_bytes)
    wrong = [figure.what for figure in verified(measured).wrong]
    assert "memory at the loss" in wrong and "memory, the peak" in wrong


def test_every_segment_is_long_without_mixed_windows() -> None:
    found = verify(SHAPE, WORK, LAYOUT, phases(), mixed=False)
    figures = {figure.what: figure for figure in found.figures}
    exchanged = "short: exchanged, sent"
    assert figures[exchanged].planned == figures["long: exchanged, sent"].planned > 0
    assert figures[exchanged].difference == float("inf")


def test_weights_of_hpz_groups_are_gathered_from_all_ranks_once_a_step() -> None:
    layout = replace(LAYOUT, zero=replace(LAYOUT.zero, hpz_size=8))
    figures = verify(SHAPE, WORK, layout, phases(), mixed=True).figures
    everywhere = next(f for f in figures if f.what == "step: weights gathered from all ranks")
    assert everywhere.planned == pytest.approx(2 * SHAPE.parameters / 1e9)


def test_what_differs_is_marked_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    changed = phases()
    changed[3].product_flops = round(1.1 * changed[3].product_flops)
    found = verified(changed)
    wrong = [figure.what for figure in found.wrong]
    assert "short: products" in wrong and "long: products" not in wrong
    print_verification(found)
    printed = capsys.readouterr().out
    assert "-9.1 % *" in printed
    assert "2 longrope2/training/step.py:1 read" in printed
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["layout"]["recompute"] == "dense" and len(plain["phases"]) == len(changed)
    collectives = plain["phases"][3]["collectives"]
    assert {(c["name"], c["ranks"]) for c in collectives} == {(GATHER, 64), (REDUCE, 64)}
    products = next(f for f in plain["figures"] if f["what"] == "short: products")
    assert products["difference"] == -0.0909
