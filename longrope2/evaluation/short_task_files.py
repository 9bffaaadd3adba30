"""Which data the short tasks read: the hub's at commits named here, or the benchmarks' own files.

lm-eval's task files name a data set of the hub and no commit. For every task that is asked a task
file is written that includes lm-eval's and changes nothing but where its rows come from, so that a
change at the hub is no other score, and a machine without the hub can read files instead. These are
the published ones, below ``suite.short_tasks.data``:

    gsm8k/test.jsonl (train.jsonl for tasks with worked examples of it)  openai/grade-school-math
    hellaswag/hellaswag_val.jsonl, hellaswag_train.jsonl                 rowanz/hellaswag
    mmlu/{dev,test}/SUBJECT_{dev,test}.csv                               hendrycks/test, data.tar
    mmlu_pro/{test,validation}.jsonl                                     rows of TIGER-Lab/MMLU-Pro
    truthfulqa/mc_task.json, or TruthfulQA.csv                           sylinrl/TruthfulQA
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope2.errors import DataError
from longrope2.files.artifacts import write_text

REVISIONS = {
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "TIGER-Lab/MMLU-Pro": "b189ec765aa7ed75c8acfea42df31fdae71f97be",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "truthfulqa/truthful_qa": "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
    "openai/gsm8k": "740312add88f781978c0658806c59bc2815b9866",
}
"""Commit of the hub's data set by its name there."""
_FOLDERS = {
    "cais/mmlu": "mmlu",
    "TIGER-Lab/MMLU-Pro": "mmlu_pro",
    "Rowan/hellaswag": "hellaswag",
    "truthfulqa/truthful_qa": "truthfulqa",
    "openai/gsm8k": "gsm8k",
}
_HELLASWAG_SPLITS = {"validation": "val", "train": "train", "test": "test"}
_HELLASWAG_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
TRUTHFULQA_LISTS, TRUTHFULQA_TABLE = "truthfulqa/mc_task.json", "truthfulqa/TruthfulQA.csv"
_KEY = "suite.short_tasks.data"
Rows = list[dict[str, Any]]


def leaf_tasks(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that a name of lm-eval's index stands for: itself, or those of a group or tag."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name == "GROUP":
        members = entry.cfg.get("task", [])
        for member in [members] if isinstance(members, str) else members:
            if isinstance(member, str):
                yield from leaf_tasks(member, index)
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from leaf_tasks(member, index)
    else:
        yield name


def write_task_files(
    name: str,
    index: Mapping[str, Any],
    folder: Path,
    data: Path | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Path]:
    """Task files in ``folder`` for all that ``name`` stands for and whose data set is known here.

    Args:
        name: Task, group or tag.
        index: lm-eval's own: name -> entry with its file and configuration.
        folder: Where they are written.
        data: Folder with the benchmarks' files; None is the hub.
        num_fewshot: Worked examples in front of a question; None is the task's own number.

    Returns:
        Task -> its file.

    Raises:
        DataError: a file is missing or laid out differently; names it.
    """
    written = {}
    for leaf in leaf_tasks(name, index):
        config = index[leaf].cfg
        source = config.get("dataset_path")
        if source not in REVISIONS:
            continue
        changes: dict[str, Any] = {"include": str(index[leaf].yaml_path), "task": leaf}
        if data is None:
            known = config.get("dataset_kwargs") or {}
            changes["dataset_kwargs"] = {**known, "revision": REVISIONS[source]}
        else:
            changes |= _local_source(config, data, folder / "data", num_fewshot)
        # JSON is YAML.
        written[leaf] = folder / f"{leaf}.yaml"
        write_text(written[leaf], json.dumps(changes, indent=1) + "\n")
    return written


def data_identity(data: Path | None) -> dict[str, str]:
    """What the scores depend on: commits, or the hash of every file below ``data``."""
    if data is None:
        return dict(REVISIONS)
    files = sorted(path for path in data.glob("*/**/*") if path.is_file())
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _local_source(
    config: Mapping[str, Any], data: Path, folder: Path, num_fewshot: int | None
) -> dict[str, Any]:
    """Rows of the splits that a task needs, written where lm-eval reads them."""
    source, subset = config["dataset_path"], config.get("dataset_name")
    asked = config.get("test_split") or config["validation_split"]
    shots = config.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    examples = config.get("fewshot_config") or {}
    worked = config.get("fewshot_split") or config.get("training_split") or asked
    splits = [asked]
    if shots and not examples.get("samples"):
        splits.append(worked)
    files = {}
    for split in dict.fromkeys(splits):
        path = folder / f"{_FOLDERS[source]}-{subset or 'all'}-{split}.jsonl"
        if not path.is_file():
            rows = _READERS[source](data / _FOLDERS[source], split, subset)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path.resolve())
    changes = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    dropped = {
        key: None for key in ("training_split", "fewshot_split") if config.get(key) not in files
    }
    return {**changes, **dropped}


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{_KEY}: {path} is not there; see the files listed for {_KEY}")
    return path.read_text(encoding="utf-8")


def _json_rows(path: Path, fields: Sequence[str]) -> Rows:
    """Those fields of the rows of a JSON-lines file."""
    rows = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        try:
            found = json.loads(line)
            rows.append({field: found[field] for field in fields})
        except (ValueError, KeyError, TypeError) as error:
            fault = f"{path}, line {number} is no row of this benchmark ({error!r})"
            raise DataError(f"{_KEY}: {fault}; it needs {', '.join(fields)}") from None
    return rows


def _gsm8k(folder: Path, split: str, subset: str | None) -> Rows:
    return _json_rows(folder / f"{split}.jsonl", ("question", "answer"))


def _hellaswag(folder: Path, split: str, subset: str | None) -> Rows:
    path = folder / f"hellaswag_{_HELLASWAG_SPLITS[split]}.jsonl"
    # The hub's labels are strings.
    return [{**row, "label": str(row["label"])} for row in _json_rows(path, _HELLASWAG_FIELDS)]


def _mmlu_pro(folder: Path, split: str, subset: str | None) -> Rows:
    fields = ("question", "options", "answer", "cot_content", "category")
    return _json_rows(folder / f"{split}.jsonl", fields)


def _mmlu(folder: Path, split: str, subset: str | None) -> Rows:
    path = folder / split / f"{subset}_{split}.csv"
    rows = []
    for number, row in enumerate(csv.reader(_text_of(path).splitlines(keepends=True)), start=1):
        if len(row) != 6 or row[5] not in tuple("ABCD"):
            fault = f"{path}, row {number} is not question, four choices and a letter"
            raise DataError(f"{_KEY}: {fault}; give hendrycks/test's own files")
        rows.append({"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])})
    return rows


def _truthfulqa(folder: Path, split: str, subset: str | None) -> Rows:
    """The lists of ``mc_task.json``, or lists made of the table's columns where it is not there."""
    lists = folder / Path(TRUTHFULQA_LISTS).name
    if not lists.is_file() and (folder / Path(TRUTHFULQA_TABLE).name).is_file():
        return _truthfulqa_of_table(folder / Path(TRUTHFULQA_TABLE).name)
    rows = []
    try:
        for entry in json.loads(_text_of(lists)):
            targets = {
                key: {"choices": list(entry[key]), "labels": list(entry[key].values())}
                for key in ("mc1_targets", "mc2_targets")
            }
            rows.append({"question": entry["question"], **targets})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"{lists} is not TruthfulQA's ({error!r})"
        raise DataError(f"{_KEY}: {fault}; give sylinrl/TruthfulQA's own file") from None
    return rows


def _truthfulqa_of_table(path: Path) -> Rows:
    rows = []
    for row in csv.DictReader(_text_of(path).splitlines(keepends=True)):
        try:
            best, right = row["Best Answer"].strip(), _answers(row["Correct Answers"])
            wrong = _answers(row["Incorrect Answers"])
            question = row["Question"]
        except (KeyError, AttributeError) as error:
            fault = f"{path} is not TruthfulQA's table ({error!r})"
            raise DataError(f"{_KEY}: {fault}; give sylinrl/TruthfulQA's own file") from None
        one = {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)}
        all_right = {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}
        rows.append({"question": question, "mc1_targets": one, "mc2_targets": all_right})
    return rows


def _answers(text: str) -> list[str]:
    return [answer.strip() for answer in text.split(";") if answer.strip()]


_READERS = {
    "cais/mmlu": _mmlu,
    "TIGER-Lab/MMLU-Pro": _mmlu_pro,
    "Rowan/hellaswag": _hellaswag,
    "truthfulqa/truthful_qa": _truthfulqa,
    "openai/gsm8k": _gsm8k,
}
