"""``slurm/pipeline.sh`` on the miniature: job arrays, a stage that fails, and the rerun."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import EmulatedSlurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STAGES = ("pack", "search", "train", "evaluate", "export")
PACK = [
    "corpus=sample", "align=2", "quotas.stdlib_modules={short: 30000, long: 30000}",
    "quotas.stdlib_topics={short: 0, long: 0}", "quotas.retrieval={short: 20000, long: 20000}",
    "tokens_per_unit=8192", "tokens_per_shard=8192",
]  # fmt: skip
SIZE = ["model=tiny", "target_len=256"]
# Words of the whole chain: each stage's own, and few resources for all.
WORDS = [
    "--time=20", "target_len=256", "run.name=chain",
    "pack:model=tiny", *(f"pack:{word}" for word in PACK), "pack:cluster.jobs=6",
    "pack:--cpus-per-task=1",
    "search:--gpus-per-node=2", "search:model=tiny", "search:corpus=sample", "search:search=quick",
    "search:search.population=4", "search:search.parents=2", "search:search.iterations=1",
    "search:search.num_samples=2", "search:search.min_needle_loss_gain_at_target=null",
    "search:search.fresh_samples=0",
    "train:--nodes=2", "train:--gpus-per-node=2", "train:experiment=tiny",
    "train:training.global_batch_tokens=512",
    "train:training.tokens=4096", "train:training.warmup_steps=2",
    "evaluate:--array=1-2", "evaluate:model=tiny", "evaluate:corpus=sample",
    "evaluate:evaluation=miniature",
    "evaluate:suite=needle_map", "evaluate:suite.measures=true",
    "evaluate:suite.needle_map.repeats=1",
    "evaluate:suite.needle_map.depths=[0.5]", "evaluate:suite.lengths=[128,256]",
    "evaluate:evaluation.lengths=[128,256]", "evaluate:evaluation.needle.samples_per_depth=1",
    "evaluate:evaluation.perplexity.num_windows=2", "evaluate:evaluation.retention.num_windows=2",
    "evaluate:evaluation.perplexity.scored_tokens=32",
    "export:model=tiny", "tracking.wandb=disabled",
]  # fmt: skip
WORDS_OF_SOME = ("tracking.wandb=disabled",)


def pipeline(checkout: Path, cluster: EmulatedSlurm, *words: str) -> tuple[dict[str, str], str]:
    """Stage -> job id, and what was printed."""
    tracked = [word for word in WORDS if word not in WORDS_OF_SOME]
    tracked += [
        f"{stage}:{word}" for word in WORDS_OF_SOME for stage in ("search", "train", "evaluate")
    ]
    command = ["slurm/pipeline.sh", "llama3_128k", *tracked, *words]
    ended = subprocess.run(
        command, cwd=checkout, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return dict(re.findall(r"^(\w+) +job (\d+)", ended.stdout, re.MULTILINE)), ended.stdout


def states(cluster: EmulatedSlurm, jobs: dict[str, str]) -> dict[str, str]:
    """Stage -> state, when all have ended."""
    return {stage: cluster.wait_for(job, 1800)["JobState"] for stage, job in jobs.items()}


def hashes(folder: Path) -> dict[str, str]:
    """File -> hash of the segments themselves."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.arrow"))
    }


@pytest.fixture(scope="module")
def failed(checkout: Path, small_cluster: EmulatedSlurm) -> tuple[dict[str, str], dict[str, str]]:
    """A chain whose training is asked for something impossible."""
    jobs, printed = pipeline(checkout, small_cluster, "train:training.learning_rate=-1")
    assert tuple(jobs) == STAGES
    assert (
        f"squeue -j {','.join(jobs.values())}" in printed
        and "tail -f runs/chain/pipeline.log" in printed
    )
    again = subprocess.run(
        ["slurm/pipeline.sh", "llama3_128k", "run.name=chain"],
        cwd=checkout,
        env=small_cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2 and "runs/chain is in the queue already" in again.stderr
    return jobs, states(small_cluster, jobs)


def test_a_failed_stage_stops_the_chain_and_says_what_to_read(
    checkout: Path, failed: tuple
) -> None:
    jobs, ended = failed
    noted = (checkout / "runs" / "chain" / "pipeline.log").read_text()
    assert ended == {
        "pack": "COMPLETED",
        "search": "COMPLETED",
        "train": "FAILED",
        "evaluate": "CANCELLED",
        "export": "CANCELLED",
    }, noted
    log = checkout / "slurm" / "logs" / f"train_llama3_128k-{jobs['train']}.log"
    assert f"train_llama3_128k (job {jobs['train']}): failed; read {log}, mend it" in noted
    assert "training.learning_rate=-1.0 must be above 0" in log.read_text()


def test_packing_over_three_nodes_gives_the_bytes_of_one_process(
    checkout: Path, small_cluster: EmulatedSlurm, failed: tuple
) -> None:
    log = (checkout / "slurm" / "logs" / f"pack_llama3_128k-{failed[0]['pack']}.log").read_text()
    arrays = re.findall(r"slurm: (\d+) array tasks, first id (\d+)_0", log)
    shown = [
        small_cluster.command("scontrol", "show", "job", f"{first}_{i}")
        for n, first in arrays
        for i in range(int(n))
    ]
    nodes = {node for text in shown for node in re.findall(r" NodeList=(\S+)", text)}
    assert nodes == {"n1", "n2", "n3"}
    subprocess.run(
        [sys.executable, "-m", "data_prep.pack", *SIZE, *PACK, "run.name=one_process", "workers=1"],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    array, single = (
        hashes(checkout / "runs" / name / "1_segments") for name in ("chain", "one_process")
    )
    assert len(single) > 1 and array == single


def test_a_rerun_goes_on_and_finishes(
    checkout: Path, small_cluster: EmulatedSlurm, failed: tuple
) -> None:
    jobs, printed = pipeline(checkout, small_cluster)
    assert tuple(jobs) == ("train", "evaluate", "export")
    assert "pack      complete: runs/chain/1_segments" in printed
    noted = (checkout / "runs" / "chain" / "pipeline.log").read_text
    assert set(states(small_cluster, jobs).values()) == {"COMPLETED"}, noted()
    for product in ("1_segments", "2_factors", "3_checkpoints", "4_evaluations", "5_exports"):
        assert (checkout / "runs" / "chain" / product / "manifest.json").is_file()
    assert noted().count(": done") == 6  # two tasks of the evaluation
    assert (checkout / "runs" / "chain" / "4_evaluations" / "suite.json").is_file()
    _, printed = pipeline(checkout, small_cluster)
    assert "nothing to do" in printed and printed.count("complete:") == 5
