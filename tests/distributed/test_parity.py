"""A training step is the same for every layout of processes, and for plain torch in one."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("parity_worker.py")
RELATIVE = 1e-5
STREAMS = ("SSSS", "UUUU", "LLLL", "SSSSLLLL")
KV_HEADS = (4, 1)  # divisible by every size; replicated for 2 and 4 ranks
# Every ZeRO stage, sequence-parallel size, stream and head layout, on four ranks in one launch.
ALL_LAYOUTS = [
    f"{z}:{s}:{kv}:{kinds}" for z, s, kv, kinds in product((0, 3), (1, 2, 4), KV_HEADS, STREAMS)
]
# The part of them that two ranks show, and two query heads per key/value head.
FEW_LAYOUTS = ["3:2:4:SSLL", "3:1:4:SSLL", "0:2:4:SSLL", "3:2:2:UULL", "3:2:1:LLUU",
               "3:2x1:9/3:UULL"]  # fmt: skip
# The context axis with every ZeRO stage and each kind of segment, ``context x sequence`` ranks a
# segment; 9 query heads cannot be shared by 2, 4 or 8 ranks.
CONTEXT_LAYOUTS = {
    4: ["3:4x1:9/3", "3:2x1:9/3", "3:2x2:32/8", "0:2x2:32/8", "1:2x2:40/10", "2:4x1:40/10"],
    8: ["3:8x1:9/3", "3:4x1:9/3", "3:2x1:9/3", "3:4x2:32/8", "3:2x4:32/8", "3:2x2:40/10",
        "0:8x1:32/8", "1:4x2:40/10", "2:2x2:32/8"],
}  # fmt: skip
CONTEXT_STREAM = "SSSSUUUULLLL"
CHECKS = ["selftest", "disagreement", "recompute", "shares"]


def run_cases(processes: int, cases: list[str]) -> dict[str, Any]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.pt"
        command = [sys.executable, *launcher, str(WORKER), str(output), *cases]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=800, check=False
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
        return torch.load(output)


@cache
def plain(heads: str, kinds: str) -> dict[str, Any]:
    """The case in one process, without this project's model code."""
    if str(WORKER.parent) not in sys.path:
        sys.path.insert(0, str(WORKER.parent))
    import plain_reference

    return plain_reference.train(heads, kinds)


def assert_equal_to_plain(found: dict[str, Any], case: str) -> None:
    _, _, heads, kinds = case.split(":")
    expected = plain(heads, kinds)
    for step_expected, step_found in zip(expected["steps"], found["steps"], strict=True):
        assert step_found["targets"] == step_expected["targets"]
        assert step_found["loss"] == pytest.approx(step_expected["loss"], rel=RELATIVE)
        assert step_found["gradient_norm"] == pytest.approx(
            step_expected["gradient_norm"], rel=RELATIVE
        )
        assert step_found["by_window"] == pytest.approx(
            step_expected["by_window"], rel=RELATIVE, nan_ok=True
        )
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        difference = (found["weights"][name] - value).double().norm() / value.double().norm()
        assert difference < RELATIVE, f"{name}: {difference:.2e}"


@pytest.fixture(scope="module")
def double() -> dict[str, Any]:
    return run_cases(2, [*FEW_LAYOUTS, *CHECKS])


@pytest.fixture(scope="module")
def fourfold() -> dict[str, Any]:
    return run_cases(4, ALL_LAYOUTS)


@pytest.mark.parametrize("case", FEW_LAYOUTS)
def test_two_processes_equal_one(double: dict[str, Any], case: str) -> None:
    assert_equal_to_plain(double[case], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_LAYOUTS)
def test_four_processes_equal_one(fourfold: dict[str, Any], case: str) -> None:
    assert_equal_to_plain(fourfold[case], case)


@pytest.fixture(scope="module", params=CONTEXT_LAYOUTS)
def shared(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    cases = [f"{layout}:{CONTEXT_STREAM}" for layout in CONTEXT_LAYOUTS[request.param]]
    return request.param, run_cases(request.param, cases)


@pytest.mark.slow
def test_context_ranks_equal_one(shared: tuple[int, dict[str, Any]]) -> None:
    ranks, found = shared
    for layout in CONTEXT_LAYOUTS[ranks]:
        case = f"{layout}:{CONTEXT_STREAM}"
        assert_equal_to_plain(found[case], case)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 6])
def test_selftest_in_every_grid_of_three_and_six(ranks: int) -> None:
    found = run_cases(ranks, ["grids"])["grids"]
    assert len(found) == {3: 2, 6: 5}[ranks] * 2
    assert set(found.values()) == {None}


@pytest.mark.slow
def test_one_process_with_deepspeed_equals_plain_torch() -> None:
    cases = [f"{zero}:1:{kv}:SSSSLLLL" for zero in (0, 3) for kv in KV_HEADS]
    found = run_cases(1, cases)
    for case in cases:
        assert_equal_to_plain(found[case], case)


def test_selftest_passes_and_leaves_the_random_state(double: dict[str, Any]) -> None:
    found = double["selftest"]
    assert [found[layout] for layout in ("2:3", "2:0", "1:3", "fused norm")] == [None] * 4
    assert found["random state"] == "True"


def test_selftest_names_what_differs(double: dict[str, Any]) -> None:
    scale, rotary = double["selftest"]["gradient scale"], double["selftest"]["rotary window"]
    assert "the self-test before training failed: short window: gradient norm" in scale
    assert "long window: gradient norm" in scale and "window: loss" not in scale
    assert "1 data x 2 sequence, ZeRO stage 3; 4 query and 1 key/value heads" in scale
    assert "long window: loss" in rotary and "short window" not in rotary
    assert (
        "short window: loss" in double["selftest"]["norm"]
        and "long window: loss" in double["selftest"]["norm"]
    )


def test_ranks_that_work_on_different_things(double: dict[str, Any]) -> None:
    found = double["disagreement"]
    assert found["same"] is None
    assert (
        "step 7: rank 1 works on segments 1 0, the others of its segment on 0 1" in found["segment"]
    )
    assert "step 7: rank 1 works on windows long short, the others on long long" in found["window"]


def test_recompute_policies_under_zero_3(double: dict[str, Any]) -> None:
    """Equal to the last bit; under ``dense`` neither attention nor the exchange runs again."""
    none, dense, full = (double["recompute"][name] for name in ("none", "dense", "full"))
    layers_and_micro_steps = 2 * 2
    for found, runs in ((none, 1), (dense, 1), (full, 2)):
        assert found["attention"] == found["exchange"] == runs * layers_and_micro_steps
        assert (found["loss"], found["norm"]) == (none["loss"], none["norm"])
        assert all(
            torch.equal(value, none["weights"][name]) for name, value in found["weights"].items()
        )


@pytest.mark.slow
def test_recompute_policies_with_gathered_keys() -> None:
    """Equal to the last bit; under ``dense`` nothing is gathered again."""
    found = run_cases(2, ["recompute_context"])["recompute_context"]
    none, layers_and_micro_steps = found["none"], 2 * 2
    for name, runs in (("none", 1), ("dense", 1), ("full", 2)):
        assert found[name]["exchange"] == runs * layers_and_micro_steps
        assert found[name]["attention"] == runs * none["attention"]
        assert (found[name]["loss"], found[name]["norm"]) == (none["loss"], none["norm"])
        for parameter, value in found[name]["weights"].items():
            assert torch.equal(value, none["weights"][parameter])


def test_no_rank_holds_the_whole_model(double: dict[str, Any]) -> None:
    found = double["shares"]
    assert found["bytes"] > 80e6
    for rank in found["ranks"]:
        assert rank["equal"] and rank["tied"] and rank["random_equal"]
        assert rank["held"] == pytest.approx(0.5, abs=0.01)
        assert rank["peak"] < 0.6  # its half, and one whole parameter
