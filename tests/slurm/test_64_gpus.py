"""The unmodified training script on 8 nodes of 8 GPUs: every node gets its torchrun line."""

import json
import subprocess
from pathlib import Path

import pytest
from emulated import EmulatedSlurm

pytestmark = pytest.mark.slow

# Stands for Python: writes down how it was called and on which node, and answers what the scripts
# ask.
RECORDER = """#!/usr/bin/env python3
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "launch.train"]:
    prepared = arguments[arguments.index("--prepare") + 1]
    open(prepared, "w").write("runs/recorded/3_checkpoints/config.yaml")
if arguments[:3] == ["-m", "launch.cluster.attempts", "end"]:
    print("done")
names = ("SLURMD_NODENAME", "SLURM_NODEID", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES")
seen = {name: os.environ.get(name) for name in names}
with open(os.environ["RECORDED"] + "/" + str(time.time_ns()) + "-" + str(os.getpid()), "w") as file:
    json.dump([seen, arguments], file)
"""


@pytest.fixture(scope="module")
def calls(checkout: Path, large_cluster: EmulatedSlurm) -> tuple[str, list[tuple[dict, list[str]]]]:
    """Job id, and everything the job ran: environment and arguments, in order."""
    recorder, recorded = checkout / "recorder", checkout / "recorded"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    recorded.mkdir()
    (checkout / "slurm" / "site.env").write_text(
        f"PYTHON=({recorder})\nexport RECORDED={recorded}\n"
    )
    words = ["sbatch", "--parsable", "slurm/train_llama3_128k.sh"]
    submitted = subprocess.run(
        words,
        cwd=checkout,
        env=large_cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    job_id = submitted.stdout.strip()
    ended = large_cluster.wait_for(job_id, 120)
    log = checkout / "slurm" / "logs" / f"train_llama3_128k-{job_id}.log"
    assert ended["JobState"] == "COMPLETED", log.read_text()
    return job_id, [tuple(json.loads(path.read_text())) for path in sorted(recorded.iterdir())]


def test_what_slurm_gave(calls: tuple, large_cluster: EmulatedSlurm) -> None:
    job = large_cluster.job(calls[0])
    assert (job["NumNodes"], job["TresPerNode"], job["Requeue"]) == ("8", "gres:gpu:8", "1")
    assert job["TimeLimit"] == "1-00:00:00"


def test_every_node_gets_the_right_torchrun_line(calls: tuple) -> None:
    job_id, made = calls
    lines = [
        (seen, call)
        for seen, call in made
        if call[:2] == ["-m", "launch.cluster.node_agent"] and "launch.train" in call
    ]
    assert sorted(seen["SLURMD_NODENAME"] for seen, _ in lines) == [f"n{i}" for i in range(1, 9)]
    for seen, call in lines:
        assert seen["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert call == [
            "-m",
            "launch.cluster.node_agent",
            "--nnodes=8",
            "--nproc-per-node=8",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=n1:{20000 + int(job_id) % 12000}",
            f"--rdzv-id={job_id}.0.ranks",
            f"--log-dir=slurm/logs/train_llama3_128k-{job_id}/start-0/ranks",
            "-m",
            "launch.train",
            "--config",
            "runs/recorded/3_checkpoints/config.yaml",
        ]


def test_the_doctor_comes_first_on_every_node_and_one_process_composes(calls: tuple) -> None:
    """Node checks, their comparison, the network over all nodes, one composition, the ranks."""
    made = calls[1]
    words = [
        call[2] if call[1] == "launch.doctor" else call[1].rpartition(".")[2] for _, call in made
    ]
    words = [
        "ranks" if "launch.train" in call and call[1] == "launch.cluster.node_agent" else word
        for word, (_, call) in zip(words, made, strict=True)
    ]
    expected = (
        ["node"] * 8
        + ["nodes"]
        + ["node_agent"] * 8
        + ["links", "train", "attempts"]
        + ["ranks"] * 8
        + ["attempts"]
    )
    assert words == expected
    composed = next(call for _, call in made if call[1] == "launch.train")
    assert composed[2:] == [
        "--prepare",
        composed[3],
        "experiment=llama3_8b_128k",
        "parallel.processes=64",
    ]
    assert sorted(
        seen["SLURMD_NODENAME"] for seen, call in made if call[1:3] == ["launch.doctor", "node"]
    ) == [f"n{i}" for i in range(1, 9)]
