"""A training step is the same for every layout of processes: loss, per-window losses, gradient norm, weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")
RELATIVE = 1e-5
# Reference case (one process, no ZeRO) -> layouts of two processes that must agree with it.
LAYOUTS = {
    "0:1:4:SSLL": ["3:1:4:SSLL", "3:2:4:SSLL", "0:1:4:SSLL", "0:2:4:SSLL"],
    "0:1:2:UULL": ["3:1:2:UULL", "3:2:2:UULL"],  # grouped-query heads; short documents that cross the rank border
    "0:1:1:LLUU": ["3:2:1:LLUU"],  # one key/value head for two ranks
    "0:1:4:SS": ["3:1:4:SS", "3:2:4:SS"],  # short windows only
    "0:1:4:LL": ["3:1:4:LL", "3:2:4:LL"],  # long windows only
}


def run_cases(output: Path, processes: int, cases: list[str]) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launcher, str(WORKER), str(output), *cases]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_cases(tmp_path_factory.mktemp("parity") / "one.json", 1, list(LAYOUTS))


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> dict:
    cases = [case for layouts in LAYOUTS.values() for case in layouts]
    return run_cases(tmp_path_factory.mktemp("parity") / "two.json", 2, cases)


@pytest.mark.parametrize(("reference", "layout"), [(r, x) for r, layouts in LAYOUTS.items() for x in layouts])
def test_two_processes_equal_one(single: dict, double: dict, reference: str, layout: str) -> None:
    expected, found = single[reference], double[layout]
    for step_expected, step_found in zip(expected["steps"], found["steps"], strict=True):
        assert step_found["targets"] == step_expected["targets"]
        assert step_found["loss"] == pytest.approx(step_expected["loss"], rel=RELATIVE)
        assert step_found["gradient_norm"] == pytest.approx(step_expected["gradient_norm"], rel=RELATIVE)
        assert step_found["by_window"] == pytest.approx(step_expected["by_window"], rel=RELATIVE, nan_ok=True)
    assert found["weights"] == pytest.approx(expected["weights"], rel=RELATIVE)


def test_reference_is_plain_torch(single: dict) -> None:
    """The one-process numbers themselves, against a loop without DeepSpeed and without our attention."""
    sys.path.insert(0, str(WORKER.parent))
    import plain_reference

    for reference in LAYOUTS:
        expected = plain_reference.first_step(reference)
        found = single[reference]["steps"][0]
        assert found["loss"] == pytest.approx(expected["loss"], rel=RELATIVE)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=RELATIVE)
