"""Files of benchmarks instead of the hub, and the hub at named commits; without lm-eval."""

import csv
import json
import socket
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from longrope2.errors import DataError
from longrope2.evaluation.config import ShortTasksConfig, short_task_faults
from longrope2.evaluation.short_task_files import (
    REVISIONS,
    data_identity,
    leaf_tasks,
    write_task_files,
)
from longrope2.evaluation.short_tasks import give_up_at_once_offline

DATA = Path("tests/fixtures/benchmarks")


class Kind(Enum):
    """The kinds of lm-eval's index."""

    TASK = 1
    GROUP = 2
    TAG = 3


@dataclass
class Entry:
    """An entry of lm-eval's index."""

    kind: Kind
    cfg: dict = field(default_factory=dict)
    tags: set = field(default_factory=set)
    yaml_path: Path = Path("/lm_eval/task.yaml")


def task(source, subset=None, **splits):
    return Entry(Kind.TASK, {"dataset_path": source, "dataset_name": subset, **splits})


INDEX = {
    "gsm8k_cot": task(
        "openai/gsm8k", "main", test_split="test", num_fewshot=8, fewshot_config={"samples": [{}]}
    ),
    "gsm8k": task("openai/gsm8k", "main", test_split="test", training_split="train", num_fewshot=5),
    "hellaswag": task("Rowan/hellaswag", training_split="train", validation_split="validation"),
    "truthfulqa_mc2": task(
        "truthfulqa/truthful_qa", "multiple_choice", validation_split="validation", num_fewshot=0
    ),
    "mmlu_anatomy": task("cais/mmlu", "anatomy", test_split="test", fewshot_split="dev"),
    "mmlu_stem_tasks": Entry(Kind.TAG, tags={"mmlu_anatomy"}),
    "mmlu": Entry(Kind.GROUP, {"task": ["mmlu_stem_tasks"]}),
    "mmlu_pro_law": task(
        "TIGER-Lab/MMLU-Pro", test_split="test", fewshot_split="validation", num_fewshot=5
    ),
    "mmlu_pro": Entry(Kind.GROUP, {"task": ["mmlu_pro_law"]}),
    "mine": task("json", None, test_split="test"),
}


def rows_of(tmp_path, name, num_fewshot=0, data=DATA):
    (path,) = write_task_files(name, INDEX, tmp_path, data, num_fewshot).values()
    written = json.loads(path.read_text())
    assert written["include"] == "/lm_eval/task.yaml" and written["dataset_path"] == "json"
    (file,) = written["dataset_kwargs"]["data_files"].values()
    return written, [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_groups_and_tags_stand_for_their_tasks(tmp_path):
    assert list(leaf_tasks("mmlu", INDEX)) == ["mmlu_anatomy"]
    assert list(leaf_tasks("nothing", INDEX)) == []
    assert write_task_files("mine", INDEX, tmp_path) == {}


@pytest.mark.parametrize("name", ["gsm8k_cot", "hellaswag", "truthfulqa_mc2", "mmlu", "mmlu_pro"])
def test_the_hub_is_read_at_a_commit(tmp_path, name):
    ((leaf, path),) = write_task_files(name, INDEX, tmp_path).items()
    revision = REVISIONS[INDEX[leaf].cfg["dataset_path"]]
    assert json.loads(path.read_text()) == {
        "include": "/lm_eval/task.yaml",
        "task": leaf,
        "dataset_kwargs": {"revision": revision},
    }
    assert len(revision) == 40 and data_identity(None) == REVISIONS


def test_questions_of_gsm8k_are_those_of_its_file(tmp_path):
    _, rows = rows_of(tmp_path, "gsm8k_cot", num_fewshot=8)
    assert len(rows) == 6 and rows[0]["question"].startswith("Janet\u2019s ducks lay 16 eggs")
    assert [row["answer"].split("#### ")[1] for row in rows[:2]] == ["18", "3"]


def test_hellaswag_keeps_its_endings_and_label(tmp_path):
    written, rows = rows_of(tmp_path, "hellaswag")
    assert rows[0]["activity_label"] == "Roof shingle removal" and rows[0]["label"] == "3"
    assert rows[0]["endings"][3] == "starts pulling up roofing on a roof."
    assert written["training_split"] is None and written["dataset_name"] is None


def test_truthfulqas_lists_are_made_of_its_table(tmp_path):
    _, rows = rows_of(tmp_path, "truthfulqa_mc2")
    with (DATA / "truthfulqa/TruthfulQA.csv").open() as file:
        table = list(csv.DictReader(file))
    for row, source in zip(rows, table, strict=True):
        right, wrong = (
            source["Correct Answers"].split("; "),
            source["Incorrect Answers"].split("; "),
        )
        assert row["mc2_targets"]["choices"] == right + wrong
        assert sum(row["mc2_targets"]["labels"]) == len(right)
        assert row["mc1_targets"]["choices"] == [source["Best Answer"], *wrong]
        assert row["mc1_targets"]["labels"] == [1] + [0] * len(wrong)


def test_truthfulqas_own_lists_come_first(tmp_path):
    folder = tmp_path / "data" / "truthfulqa"
    folder.mkdir(parents=True)
    (folder / "TruthfulQA.csv").write_text("never read")
    entry = {"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"c": 1}}
    (folder / "mc_task.json").write_text(json.dumps([entry]))
    _, rows = rows_of(tmp_path / "out", "truthfulqa_mc2", data=tmp_path / "data")
    assert rows == [
        {
            "question": "q",
            "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["c"], "labels": [1]},
        }
    ]


def test_mmlu_and_mmlu_pro_have_the_hubs_columns(tmp_path):
    _, rows = rows_of(tmp_path, "mmlu")
    assert rows[0]["choices"] == ["Dyslexia", "Epilepsy", "Hydrocephalus", "Narcolepsy"]
    assert rows[0]["answer"] == 3 and rows[0]["question"].startswith("Which of the following is a")
    _, rows = rows_of(tmp_path, "mmlu_pro")
    assert len(rows) == 56 and set(rows[0]) == {
        "question", "options", "answer", "cot_content", "category",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shots", "path"),
    [
        ("gsm8k", None, "gsm8k/train.jsonl"),
        ("hellaswag", 10, "hellaswag/hellaswag_train.jsonl"),
        ("mmlu", 5, "mmlu/dev/anatomy_dev.csv"),
        ("mmlu_pro", None, "mmlu_pro/validation.jsonl"),
    ],
)
def test_worked_examples_need_their_files(tmp_path, name, shots, path):
    with pytest.raises(DataError, match=f"suite.short_tasks.data: .*{path} is not there"):
        write_task_files(name, INDEX, tmp_path, DATA, shots)


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("gsm8k_cot", "gsm8k/test.jsonl", '{"q": 1}', "line 1 is no row of this benchmark"),
        ("gsm8k_cot", "gsm8k/test.jsonl", "no json", "it needs question, answer"),
        ("mmlu", "mmlu/test/anatomy_test.csv", "a,b,c,d,e,F", "row 1 is not question, four cho"),
        ("truthfulqa_mc2", "truthfulqa/TruthfulQA.csv", "A,B\n1,2", "is not TruthfulQA's table"),
        ("truthfulqa_mc2", "truthfulqa/mc_task.json", "[1]", "mc_task.json is not TruthfulQA's"),
    ],
)
def test_files_that_are_laid_out_differently_are_named(tmp_path, name, file, text, said):
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        write_task_files(name, INDEX, tmp_path / "out", tmp_path / "data", 0)


def test_scores_belong_to_the_contents_of_the_files(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.write_text("one")
    first = data_identity(tmp_path)
    path.write_text("two")
    assert list(first) == ["gsm8k/test.jsonl"] and data_identity(tmp_path) != first


def test_a_folder_that_is_not_there_is_named():
    (fault, *_) = short_task_faults(ShortTasksConfig(data="/nowhere"))
    assert fault == "suite.short_tasks.data=/nowhere is no folder; null reads the hub"


@pytest.mark.parametrize(
    ("settings", "reached", "expected"),
    [({}, False, True), ({}, True, False), ({"HTTPS_PROXY": "http://proxy"}, False, False)],
)
def test_a_hub_that_cannot_be_reached_is_not_tried_again(monkeypatch, settings, reached, expected):
    from datasets import config as datasets_config
    from huggingface_hub import constants

    class Connection:
        def close(self):
            """Nothing is open."""

    def connect(address, timeout):
        assert address == ("huggingface.co", 443) and timeout <= 5
        if not reached:
            raise OSError("no route")
        return Connection()

    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "create_connection", connect)
    for module in (constants, datasets_config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    give_up_at_once_offline()
    assert (constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE) == (expected, expected)
