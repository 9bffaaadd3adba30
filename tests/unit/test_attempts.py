"""What a job does after its ranks, decided on exit codes, checkpoints and what they wrote."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from launch.cluster.attempts import (
    UNKNOWN_LEAD_SECONDS,
    Attempt,
    FirstFailure,
    begin,
    decide,
    end,
    first_failure,
    main,
    nodes_without_end,
    progress_of,
    read_attempts,
    stop_lead,
)
from longrope2.command import rank_exit_code
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.training.heartbeat import Beat

GONE = "torch.distributed.DistBackendError: Connection closed by peer [127.0.0.1]:4711"


def attempt(
    outcome: str, found: int, left: int, code: int = 0, *, blamed: tuple[str, ...] = ()
) -> Attempt:
    return Attempt("7", 0, "n[1-2]", found, left, outcome, code, list(blamed))


def rank_failed(
    logs: Path, node: str, codes: dict[int, int], errors: dict[int, tuple[str, float]]
) -> None:
    """What a node's agent and its ranks leave in the folder of logs."""
    (logs / f"ended-{node}.json").write_text(
        json.dumps({"node": node, "time": 100.0, "exit_codes": codes})
    )
    for rank, (text, when) in errors.items():
        file = logs / f"rank-{rank:03d}.err"
        file.write_text(text)
        os.utime(file, (when, when))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 75, 1: 75}, 75),
        ({0: 1, 3: 75}, 75),
        ({0: -9, 1: 2}, 2),
        ({0: -9, 1: -15}, 1),
        ({5: 3, 4: 1}, 1),
    ],
)
def test_exit_code_of_a_node(codes: dict[int, int], expected: int) -> None:
    assert rank_exit_code(codes) == expected


def test_how_early_a_training_must_be_told(tmp_path: Path) -> None:
    """Twice the longest micro-step of late and the newest save, and a minute; 900 s unmeasured."""
    assert stop_lead(tmp_path) == UNKNOWN_LEAD_SECONDS == 900
    records = [{"step": 1, "perf/micro_step_seconds_long": 99.0}] + [
        {"step": step, "perf/micro_step_seconds_short": 2.0, "perf/micro_step_seconds_long": 12.5}
        for step in range(2, 102)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert stop_lead(tmp_path) == 900
    manifest = Manifest("training_state", details={"write_seconds": 640.2})
    write_manifest(tmp_path / "step_00000101", manifest)
    (tmp_path / "latest").write_text("step_00000101\n")
    assert stop_lead(tmp_path) == 60 + 1306
    write_manifest(tmp_path / "step_00000101", Manifest("training_state"))  # of an older version
    assert stop_lead(tmp_path) == 900


@pytest.mark.parametrize(
    ("attempts", "verdict", "words"),
    [
        ([attempt("done", 10, 20)], "done", "done"),
        ([attempt("stopped", 10, 14, 75)], "requeue", "all is saved at 14"),
        ([attempt("stopped", 10, 10, 1)], "requeue", "had not saved in time: goes on from 10"),
        ([attempt("failed", 10, 10, 2)], "stop", "a fault that no restart mends"),
        ([attempt("failed", 10, 10, 1)], "requeue", "starts again, from 10"),
        (
            [attempt("failed", 10, 10, 1, blamed=("n2",))],
            "requeue n2",
            "starts again without n2, from 10",
        ),
        (
            [attempt("failed", 10, 10, 1)] * 3,
            "stop",
            "3 attempts in a row ended where they had begun, with progress at 10",
        ),
        ([attempt("failed", 0, 10, 1), *[attempt("failed", 10, 10, 1)] * 2], "requeue", "from 10"),
        ([attempt("failed", 10, 10, 1)] * 2 + [attempt("failed", 10, 12, 1)], "requeue", "from 12"),
        (
            [
                attempt("failed", 10, 10, 1),
                *[attempt("terminated", 10, 10)] * 5,
                attempt("failed", 10, 10, 1),
            ],
            "requeue",
            "from 10",
        ),
        ([attempt("stopped", 4, 4, 75)] * 3, "stop", "3 attempts in a row"),
        (
            [attempt("begun", 10, 10)] * 2 + [attempt("failed", 10, 10, 1)],
            "stop",
            "3 attempts in a row",
        ),
    ],
)
def test_decision(attempts: list[Attempt], verdict: str, words: str) -> None:
    decided, reason = decide(attempts, None)
    assert decided == verdict
    assert words in reason


def test_a_rank_s_fault_of_the_user_stops_whatever_the_other_codes() -> None:
    failure = FirstFailure("n1", 0, 2, "error: the configuration has 1 fault(s)")
    assert decide([attempt("failed", 0, 0, 137)], failure)[0] == "stop"


def test_the_cause_comes_before_its_consequences(tmp_path: Path) -> None:
    """Rank 3 raised; others lost their peer, one by an earlier clock; its agent ended rank 1."""
    rank_failed(tmp_path, "n1", {0: 1, 1: -15}, {0: (GONE, 50.0), 1: ("", 40.0)})
    rank_failed(tmp_path, "n2", {3: 1}, {3: ("Traceback ...\nValueError: loss is None", 51.0)})
    failure = first_failure(tmp_path)
    assert failure is not None and (failure.node, failure.rank) == ("n2", 3)
    assert failure.text.endswith("ValueError: loss is None") and not failure.is_the_nodes_fault


@pytest.mark.parametrize(
    ("code", "text", "is_the_nodes_fault"),
    [
        (-9, "", True),
        (-7, "", True),
        (-15, "", False),
        (1, "RuntimeError: CUDA error: uncorrectable ECC error", True),
        (1, "ValueError: x", False),
        (1, GONE, False),
    ],
)
def test_which_failures_are_the_node_s(code: int, text: str, is_the_nodes_fault: bool) -> None:
    assert FirstFailure("n1", 0, code, text).is_the_nodes_fault is is_the_nodes_fault


def test_nodes_that_left_no_word(tmp_path: Path) -> None:
    rank_failed(tmp_path, "n1", {0: 1}, {0: (GONE, 1.0)})
    assert nodes_without_end(tmp_path, ["n1", "n2"]) == ["n2"]
    failure = first_failure(tmp_path)
    assert failure is not None and failure.is_consequence


def test_progress(tmp_path: Path) -> None:
    """Steps of the newest checkpoint; else files and lines of journals, no metrics or attempts."""
    factors, checkpoints = tmp_path / "2_factors", tmp_path / "3_checkpoints"
    assert progress_of(factors) == progress_of(checkpoints) == 0
    for folder in (factors, checkpoints):
        (folder / "answers").mkdir(parents=True)
        for name, lines in (
            ("a.jsonl", 3),
            ("answers/b.jsonl", 2),
            ("c", 7),
            ("metrics.jsonl", 9),
            ("attempts.jsonl", 9),
        ):
            (folder / name).write_text("{}\n" * lines)
    assert progress_of(factors) == 3 + 3 + 2
    assert progress_of(checkpoints) == 0
    (checkpoints / "latest").write_text("step_00000120\n")
    assert progress_of(checkpoints) == 120


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verdict on stdout, the failing rank's traceback last on stderr; lost attempts count."""
    product, logs = tmp_path / "3_checkpoints", tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")

    def run(event: str, *words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["attempts", event, str(product), *words])
        main()
        said = capsys.readouterr()
        return said.out, said.err

    rank_failed(logs, "n2", {2: -9, 3: 1}, {2: ("Fatal: out of luck", 1.0), 3: (GONE, 2.0)})
    run("begin")
    verdict, text = run("end", "--code", "1", "--logs", str(logs), "--nodes", "n1,n2")
    assert verdict == "requeue n2\n"
    assert text.splitlines()[-2:] == [
        "--- rank 2 on n2 ended first (killed by signal 9):",
        "Fatal: out of luck",
    ]
    run("begin")  # and was never heard of again
    run("begin")
    run("terminated")
    assert [a.outcome for a in read_attempts(product, job="7")] == ["failed", "begun", "terminated"]
    run("begin")
    with pytest.raises(
        SystemExit,
        match=r"3 attempts in a row ended where they had begun, with progress at 0 \(on n\[1-2\]\)",
    ):
        run("begin")
    with pytest.raises(
        SystemExit, match="The last was cut off without a word, as when its node dies"
    ):
        run("begin")
    assert read_attempts(product, job="8") == []


def test_a_torn_record_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin(tmp_path, [])
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"job": "7", "restart"')
    begin(tmp_path, read_attempts(tmp_path, job="7"))
    assert [a.outcome for a in read_attempts(tmp_path, job="7")] == ["begun", "begun"]
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"job": "7"}\n')
    with pytest.raises(ArtifactError, match=r"attempts.jsonl is damaged at line 3"):
        read_attempts(tmp_path, job="7")


def test_a_hang_leaves_out_the_node_of_the_silent_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are the heartbeat's own."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    now = time.time()
    beats = [
        Beat(0, "n1", 11, 5, 3, "forward", now - 90, now),
        Beat(3, "n2.cluster", 12, 4, 3, "forward", now - 95, now - 80),
    ]
    text = "\n".join(beat.describe(now, 20.0) for beat in beats) + "\nstack" * 100
    rank_failed(tmp_path, "n1", {0: 76}, {0: (text, 1.0)})
    begin(tmp_path, [])
    end(tmp_path, read_attempts(tmp_path, job="7"), 76, stopped=False, logs=tmp_path, silent=["n2"])
    assert read_attempts(tmp_path, job="7")[-1].blamed == ["n2"]


def test_a_job_that_goes_on_without_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only peers are missed: the node that left no word is left out."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    rank_failed(tmp_path, "n1", {0: 1}, {0: (GONE, 1.0)})
    begin(tmp_path, [])
    end(tmp_path, read_attempts(tmp_path, job="7"), 1, stopped=False, logs=tmp_path, silent=["n2"])
    assert read_attempts(tmp_path, job="7")[-1].blamed == ["n2"]
