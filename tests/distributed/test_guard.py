"""However DeepSpeed applies steps, a refused one leaves parameters and optimizer as they were."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("guard_worker.py")
CASES = ("0:fp32", "0:bf16", "1:fp32", "2:bf16", "3:fp32", "3:offload")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("guard") / "results.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(WORKER), str(output), *CASES]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", CASES)
def test_refused_steps_change_nothing(results: dict, case: str) -> None:
    guarded, twin, once = (results[case][name] for name in ("guarded", "twin", "once"))
    assert guarded["applied"] == [True, False, False, False, True]
    assert (guarded["weights"], guarded["state"]) == (twin["weights"], twin["state"])
    assert twin["weights"] != once["weights"] and twin["state"] != once["state"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_reported_of_them(results: dict, case: str) -> None:
    found = results[case]["guarded"]
    ordinary, nan_loss, infinite_gradient, huge_loss, _ = zip(
        found["losses"], found["norms"], strict=True
    )
    assert math.isnan(nan_loss[0]) and not math.isfinite(nan_loss[1])
    assert math.isfinite(infinite_gradient[0]) and not math.isfinite(infinite_gradient[1])
    assert huge_loss[0] > 1e5 * ordinary[0] and 1e4 < huge_loss[1] < math.inf
