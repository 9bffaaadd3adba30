"""Node checks of ``launch.doctor``: what is said of which node, and which nodes are left out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import node
from launch.doctor.network import faults_of_links, links_command
from launch.doctor.node import faults_of_nodes, nodes_command, report_refused

ROOT = Path(__file__).parent.parent.parent


def report(*faults: str, **versions: str) -> dict[str, Any]:
    return {"faults": list(faults), "versions": {"torch": "2.13.0", **versions}}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({"n1": report(), "n2": report()}, []),
        (
            {"n1": report(), "n2": report("GPU 3 does not compute: ECC")},
            [("n2", "GPU 3 does not compute: ECC")],
        ),
        (
            {"n1": report(), "n2": None},
            [("n2", "no report: it did not run the check (doctor-n2.log)")],
        ),
        (
            {"n1": report(), "n2": report(), "n3": report(torch="2.12.0")},
            [("n3", "torch is 2.12.0, the other nodes have 2.13.0")],
        ),
        (
            {"n1": report(), "n2": report(torch="2.12.0")},
            [("", "torch differs: 2.13.0 on n1, 2.12.0 on n2")],
        ),
        (
            {"n1": report(nccl="2.27"), "n2": report(nccl="2.27"), "n3": report()},
            [("n3", "nccl is None, the other nodes have 2.27")],
        ),
    ],
)
def test_faults_of_nodes(reports: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert faults_of_nodes(reports) == expected


def measured(
    clocks: dict[str, float], pairs: dict[str, float], device: str = "gpu"
) -> dict[str, Any]:
    """A measurement; pairs as ``{"n1 n2": GB/s}``."""
    listed = [{"nodes": names.split(), "gbps": speed} for names, speed in pairs.items()]
    return {"device": device, "clock_seconds": clocks, "all_reduce_gbps": 80.0, "pairs": listed}


RING = {"n1 n2": 90.0, "n2 n3": 88.0, "n3 n4": 91.0, "n4 n1": 90.0}
SAME_TIME = dict.fromkeys(("n1", "n2", "n3", "n4"), 0.0)


@pytest.mark.parametrize(
    ("found", "min_gbps", "expected"),
    [
        (measured(SAME_TIME, RING), 0.0, []),
        (measured(SAME_TIME, RING), 50.0, []),
        (
            measured({**SAME_TIME, "n3": 60.0}, RING),
            0.0,
            [("n3", "its clock is +60.0 s off the others'")],
        ),
        (
            measured({"n1": 0.0, "n2": -9.0}, {"n1 n2": 9.0}),
            0.0,
            [("", "the clocks of n1 and n2 are 9.0 s apart")],
        ),
        (
            measured(SAME_TIME, {**RING, "n2 n3": 10.0, "n3 n4": 11.0}),
            0.0,
            [("n3", "with its neighbours is below 45 GB/s")],
        ),
        (measured(SAME_TIME, {**RING, "n2 n3": 10.0}), 0.0, []),  # a slow link has no one node
        (measured(SAME_TIME, {**RING, "n2 n3": 10.0, "n3 n4": 11.0}, "cpu"), 0.0, []),
        (
            measured(
                dict.fromkeys(("n1", "n2", "n3"), 0.0), {"n1 n2": 90.0, "n2 n3": 5.0, "n3 n1": 6.0}
            ),
            0.0,
            [("n3", "others have 90")],
        ),
        (
            measured({"n1": 0.0, "n2": 0.0}, {"n1 n2": 9.0}),
            50.0,
            [("", "all-reduce at 9 GB/s, at least 50 are asked for")],
        ),
        (
            measured({"n1": 0.0}, {}),
            100.0,
            [("", "all-reduce at 80 GB/s, at least 100 are asked for (MIN_BANDWIDTH_GBPS)")],
        ),
    ],
)
def test_faults_of_links(
    found: dict[str, Any], min_gbps: float, expected: list[tuple[str, str]]
) -> None:
    faults = faults_of_links(found, min_gbps)
    assert [node for node, _ in faults] == [node for node, _ in expected]
    for (_, fault), (_, words) in zip(faults, expected, strict=True):
        assert words in fault


def test_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes on stdout for the job script, every fault with its node on stderr, exit code 1."""
    report_refused([], what="2 nodes: nothing wrong")
    with pytest.raises(SystemExit) as ended:
        report_refused([("n3", "a"), ("n2", "b"), ("", "c"), ("n3", "d")], what="")
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.out == "n2,n3\n"
    assert said.err.splitlines() == [
        f"doctor: {fault}" for fault in ("2 nodes: nothing wrong", "n3: a", "n2: b", "c", "n3: d")
    ]


def test_network_that_never_came_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "ended-n2.json").write_text(
        json.dumps({"node": "n2", "time": 1.0, "exit_codes": {"1": 1}})
    )
    (tmp_path / "network" / "rank-001.err").write_text("RuntimeError: no route to host")
    with pytest.raises(SystemExit):
        links_command([str(tmp_path)])
    said = capsys.readouterr()
    assert said.out == "n2\n"
    assert "n2: the nodes could not exchange data: RuntimeError: no route to host" in said.err


def test_commands_on_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of this very machine as n1: a CPU node with its disk looked at."""
    environment = {**os.environ, "SLURMD_NODENAME": "n1", "SLURM_GPUS_ON_NODE": "2"}
    words = [
        "node",
        str(tmp_path),
        "--device",
        "cpu",
        "--scratch",
        str(tmp_path / "none"),
        "--min-free-gb",
        "1e9",
    ]
    command = [sys.executable, "-m", "launch.doctor", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "node-n1.json").read_text())
    assert found["versions"]["torch"].startswith("2.")
    assert found["faults"][0] == f"{tmp_path / 'none'} is missing or cannot be written to"
    assert "at least 1e+09 are asked for (MIN_FREE_GB)" in found["faults"][1]
    with pytest.raises(SystemExit):
        nodes_command([str(tmp_path), "n1,n2"])
    assert capsys.readouterr().out == "n1,n2\n"


def test_gpus_that_slurm_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert node._gpu_faults(8) == ["Slurm promised 8 GPUs, torch sees 0"]


def test_another_package_called_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (fault,) = node._apex_faults()
    assert "is not NVIDIA's" in fault and fault.endswith("(pip uninstall apex)")
