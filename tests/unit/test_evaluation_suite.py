"""``python -m launch.evaluate suite=...`` on the miniature: shards, resuming, the gate, faults."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from longrope2.evaluation import answering, subjects
from longrope2.evaluation.config import CalibrationConfig, CalibrationRule, calibration_faults
from longrope2.evaluation.results import read_answers
from longrope2.files.artifacts import read_manifest

SUBJECTS = (
    "evaluation.subjects=[{name: base, rope: {method: none}}, {name: ntk, rope: {method: ntk}}]"
)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output, standard error."""

    def run(*arguments):
        options = (
            f"run.root={tmp_path}",
            "model=tiny",
            "run.name=r",
            "target_len=1024",
            "corpus=sample",
            "suite=needle_map",
            "suite.lengths=[512,1024]",
            f"evaluation.sample_cache={tmp_path}/cache",
            "suite.needle_map.haystack=noise",
            SUBJECTS,
            "suite.needle_map.depths=[0.5,1.0]",
            "suite.needle_map.repeats=1",
            "tracking.wandb=disabled",
        )
        monkeypatch.setattr(sys, "argv", ["evaluate", *options, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_module("launch.evaluate", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_shards_answer_their_part_and_the_last_sums_up(evaluate, tmp_path, monkeypatch):
    folder = tmp_path / "r" / "4_evaluations"
    code, out, _ = evaluate("dry_run=true")
    assert (
        code == 0 and "needle map 2 depths x 1, noise, at 512, 1024" in out and not folder.exists()
    )
    code, out, err = evaluate("evaluation.shard=2/2")
    assert code == 0, err
    assert "shard 2/2 is done; 4 answers of other shards are still missing" in out
    assert not (folder / "suite.json").exists() and len(read_answers(folder / "answers")) == 4
    code, out, err = evaluate("evaluation.shard=1/2")
    assert code == 0, err
    summary = json.loads((folder / "suite.json").read_text())
    assert [(c["subject"], c["length"], c["num_samples"]) for c in summary["cells"]] == [
        (name, length, 2) for name in ("base", "ntk") for length in (512, 1024)
    ]
    assert all(set(c["sides"]) == {"long"} and c["score"] is not None for c in summary["cells"])
    assert summary["calibration"] == {"passed": True, "rules": []} and len(summary["paired"]) == 2
    assert read_manifest(folder, "evaluations").counts["num_subjects"] == 2
    monkeypatch.setattr(subjects, "load_windowed_model", None)  # another answer would call it
    code, _, err = evaluate()
    assert code == 0, err
    assert json.loads((folder / "suite.json").read_text()) == summary


@pytest.mark.slow
def test_a_shard_that_gave_a_task_up_waits_for_the_others_all_the_same(
    evaluate, tmp_path, monkeypatch
):
    make_decoder = answering.make_decoder

    def short_of_memory(rows, chunk):
        decode = make_decoder(rows, chunk)

        def generate(model, samples, stop_ids):
            if len(samples[0].prompt_T) > 600:
                raise MemoryError
            return decode(model, samples, stop_ids)

        return generate

    monkeypatch.setattr(answering, "make_decoder", short_of_memory)
    folder = tmp_path / "r" / "4_evaluations"
    code, out, err = evaluate("evaluation.shard=2/2")
    assert code == 0, err
    assert "shard 2/2 is done; 2 answers of other shards are still missing" in out
    assert not (folder / "suite.json").exists() and not (folder / "manifest.json").exists()
    code, out, err = evaluate("evaluation.shard=1/2")
    assert code == 0, err
    cells = json.loads((folder / "suite.json").read_text())["cells"]
    assert [(c["length"], c["score"] is None, c.get("reason", "")[:13]) for c in cells] == [
        (512, False, ""),
        (1024, True, "out of memory"),
    ] * 2


@pytest.mark.slow
def test_a_base_model_that_breaks_a_rule_stops_the_extended_one(evaluate, tmp_path):
    """The untrained base finds no needle at 8 times its window."""
    rule = "calibration.rules=[{score: needle_map/needle_map/1024, low: 50, high: 100}]"
    code, _, err = evaluate(rule)
    assert code == 2 and err.count("error: ") == 1
    assert (
        "does not reproduce its known scores: needle_map/needle_map/1024 is 0.00, "
        "expected 50 to 100" in err
    )
    folder = tmp_path / "r" / "4_evaluations"
    assert {answer.subject for answer in read_answers(folder / "answers").values()} == {"base"}
    assert not (folder / "suite.json").exists()
    code, out, err = evaluate(rule, "calibration.required=false")
    assert code == 0, err
    assert "needle_map/needle_map/1024: broken (50 to 100, found 0.0)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("suite.measures=false", "suite.needle_map=null"),
            "suite runs nothing: set suite.measures=true, or choose",
        ),
        (
            ("suite.lengths=[512,2048]",),
            "suite.lengths=[512, 2048] must be distinct lengths of at most target_len=1024",
        ),
        (
            ("suite.needle_map.depths=[2]",),
            "suite.needle_map.depths=[2.0] must be distinct numbers from 0 to 1",
        ),
        (("evaluation.shard=3/2",), "evaluation.shard=3/2 must be i/n with i from 1 to n"),
        (
            ("evaluation.prefill_chunk=0", "evaluation.decode_rows=0", "evaluation.workers=-1"),
            "evaluation.workers=-1",
        ),
        (
            ("calibration.rules=[{score: a, low: 5, high: 1}]",),
            "calibration.rules[0]: score='a' needs low=5.0 below high",
        ),
        (
            ("calibration.rules=[{score: ruler/niah_single1/4096, low: 5}]",),
            "calibration.rules[0]: no suite gives a score 'ruler/niah_single1/4096'; "
            "write lm_eval/TASK, or SUITE/TASK/",
        ),
        (("calibration.rules=[{score: ruler/vt, low: 5}]",), "no suite gives a score 'ruler/vt'"),
        (
            ("calibration.rules=[{score: lm_eval/mmlu/4096, low: 5}]",),
            "no suite gives a score 'lm_eval/mmlu/4096'",
        ),
        (
            ("checkpoint=/nowhere",),
            "evaluation.subjects[1] (extended): checkpoint=/nowhere does not exist",
        ),
    ],
)
def test_faults_are_one_message_and_write_nothing(evaluate, tmp_path, arguments, message):
    code, _, err = evaluate(*arguments)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "path", sorted(Path("conf/calibration").glob("*.yaml")), ids=lambda path: path.stem
)
def test_rules_that_are_shipped_can_be_tried(path):
    rules = [CalibrationRule(**rule) for rule in yaml.safe_load(path.read_text())["rules"]]
    rules += [CalibrationRule("ruler/average/4096", 5), CalibrationRule("loft/nq/131072", 5)]
    assert calibration_faults(CalibrationConfig(rules)) == []
