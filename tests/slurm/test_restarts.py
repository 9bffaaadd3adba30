"""The job script with ranks that fail and unfit nodes, on real Slurm; ranks are stand-ins."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import EmulatedSlurm

pytestmark = pytest.mark.slow

# Stands for Python: the real one, but for training and the doctor. In the first start a rank on the
# second node is killed; in all later ones rank 0 raises.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
words = sys.argv[1:]
node, start = os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_RESTART_COUNT", "0")
if words[1] == "launch.train":
    product = pathlib.Path("runs/failing/3_checkpoints")
    product.mkdir(parents=True, exist_ok=True)
    (product / "latest").write_text("step_00000040")
    pathlib.Path(words[words.index("--prepare") + 1]).write_text(str(product / "config.yaml"))
elif words[1] == "launch.doctor":
    pass
elif words[1] == "launch.cluster.node_agent" and "launch.train" in words:
    flag = next(word for word in words if word.startswith("--log-dir="))
    logs = pathlib.Path(flag.removeprefix("--log-dir="))
    nodes = os.environ["SLURM_JOB_NODELIST"].replace("[", "").replace("-", ",")
    first = node == nodes.split(",")[0]
    if first:
        time.sleep(0 if start != "0" else 0.5)
        said = "ConnectionError: Connection closed by peer"
        said = said if start == "0" else "Traceback ...\\nValueError: at step 41"
        (logs / "rank-000.err").write_text(said)
        codes = {{0: 1, 1: -15}}
    else:
        codes = {{2: -9}} if start == "0" else {{2: -15, 3: -15}}
    ended = {{"node": node, "time": time.time(), "exit_codes": codes}}
    (logs / f"ended-{{node}}.json").write_text(json.dumps(ended))
    sys.exit(1)
elif words[1] != "launch.cluster.node_agent":
    os.execv(sys.executable, [sys.executable, *words])
"""


def submit(checkout: Path, cluster: EmulatedSlurm, name: str) -> tuple[dict[str, str], str]:
    """The job when it has ended, and its log."""
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        "--nodes=2",
        "--gpus-per-node=2",
        "slurm/train_llama3_128k.sh",
    ]
    submitted = subprocess.run(
        words, cwd=checkout, env=cluster.environment, capture_output=True, text=True, check=True
    )
    job_id = submitted.stdout.strip()
    ended = cluster.wait_for(job_id, 300)
    return ended, (checkout / "slurm" / "logs" / f"{name}-{job_id}.log").read_text()


def test_failures_without_progress_end_the_job(
    checkout: Path, small_cluster: EmulatedSlurm
) -> None:
    """Three starts, two without the killed rank's node; the log ends with the traceback."""
    stand_in, site = checkout / "stand_in", checkout / "slurm" / "site.env"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    usual = site.read_text()
    site.write_text(re.sub(r"PYTHON=.*", f"PYTHON=({stand_in})", usual))
    ended, log = submit(checkout, small_cluster, "failing")
    site.write_text(usual)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("FAILED", "2", "n2"), (
        log
    )
    assert "failed: starts again without n2, from 40" in log
    assert "rank 2 on n2 ended first (killed by signal 9)" in log
    assert (
        "stopped: 3 attempts in a row ended where they had begun, "
        "with progress at 40 (on n[1-2], n[1,3])" in log
    )
    assert log.splitlines()[-3:] == [
        "--- rank 0 on n1 ended first (exit code 1):",
        "Traceback ...",
        "ValueError: at step 41",
    ]
    lines = (
        (checkout / "runs" / "failing" / "3_checkpoints" / "attempts.jsonl")
        .read_text()
        .splitlines()
    )
    outcomes = [
        (line["outcome"], line["restart"], line["blamed"]) for line in map(json.loads, lines)
    ]
    assert outcomes == [
        ("begun", 0, []),
        ("failed", 0, ["n2"]),
        ("begun", 1, []),
        ("failed", 1, []),
        ("begun", 2, []),
        ("failed", 2, []),
    ]


def test_unfit_nodes_are_named_and_nothing_starts(
    checkout: Path, small_cluster: EmulatedSlurm
) -> None:
    """The real doctor: GPUs that torch does not see, and a disk that is too small."""
    site = checkout / "slurm" / "site.env"
    usual = site.read_text()
    site.write_text(
        usual.replace("DEVICE=cpu", "DEVICE=gpu").replace("MIN_FREE_GB=0.1", "MIN_FREE_GB=1e9")
    )
    ended, log = submit(checkout, small_cluster, "unfit")
    site.write_text(usual)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
    for node in ("n1", "n2"):
        assert f"doctor: {node}: Slurm promised 2 GPUs, torch sees 0" in log
        assert re.search(
            rf"doctor: {node}: /tmp has [0-9.]+ GB free, at least 1e\+09 are asked for", log
        )
    assert "nothing was started; to do without: sbatch --exclude=n1,n2" in log
    assert not (checkout / "runs").exists() or "unfit" not in {
        path.name for path in (checkout / "runs").iterdir()
    }
