"""Files of products: read with one message for what is wrong, compared with what was written."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longrope2.errors import ArtifactError, DamagedError
from longrope2.evaluation.before import finished_checkpoint, require_unchanged_subject
from longrope2.evaluation.schema import EvaluationSummary, read_summary
from longrope2.files import folder_hashes
from longrope2.files.artifacts import Manifest, read_manifest, sha256_of_file, write_manifest
from longrope2.files.checked import read_object
from longrope2.files.folder_hashes import CACHE_VARIABLE
from longrope2.files.unchanged import changed_files, require_as_listed, require_unchanged
from longrope2.tracking.metrics import read_metrics

DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Expecting value"),
        (b'{"a": ', "Expecting value"),
        (b'{"a": "\xff"}', "no UTF-8"),
        (DEEP.encode(), "nested too deeply"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b"[1]", "it holds no JSON object"),
        (b"9" * 5_000, "Exceeds the limit"),
    ],
)
def test_whatever_is_wrong_with_a_json_file_is_one_message(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        read_object(path, "a history", "make it again")
    text = str(caught.value)
    assert text.startswith(f"{path} is not a history: ") and fault in text
    assert text.endswith("; make it again") and "\n" not in text


def test_a_json_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"x cannot be read: Is a directory; make it again$"):
        (tmp_path / "x").mkdir()
        read_object(tmp_path / "x", "a history", "make it again")


def changed_manifest(folder: Path, changes: dict[str, Any]) -> Path:
    """A manifest of an earlier version, without a hash of itself; None removes a field."""
    content = asdict(Manifest("factors")) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"files": []}, "files must be an object"),
        ({"counts": 3}, "counts must be an object"),
        ({"kind": 3}, "kind must be a text"),
        ({"schema_version": True}, "schema_version must be a whole number"),
        ({"seeds": None, "inputs": None}, "it lacks inputs; it lacks seeds"),
        ({"colour": 1}, "it has an unknown field colour"),
        ({"files": {"a": 1}}, "files['a'] must be a hash of a file inside the folder"),
        ({"files": {"../a": "0"}}, "files['../a'] must be a hash of a file inside the folder"),
        ({"files": {"/a": "0"}}, "files['/a'] must be a hash of a file inside the folder"),
    ],
)
def test_a_field_of_a_manifest_is_checked_by_name(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    path = changed_manifest(tmp_path, changes) / "manifest.json"
    expected = f"{path} is not a manifest of this project: {fault}; bring it back, or remove it"
    with pytest.raises(DamagedError, match=re.escape(expected)):
        read_manifest(tmp_path, "factors")


def test_a_manifest_of_an_earlier_version_has_no_hash_of_itself(tmp_path: Path) -> None:
    changed_manifest(tmp_path, {"counts": {"tokens": 3}})
    assert read_manifest(tmp_path, "factors").counts == {"tokens": 3}


@pytest.mark.parametrize(("old", "new"), [('"tokens": 31', '"tokens": 32'), ("aaa", "aab")])
def test_a_changed_manifest_is_known(tmp_path: Path, old: str, new: str) -> None:
    write_manifest(tmp_path, Manifest("factors", counts={"tokens": 31}, files={"x": "aaa"}))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    words = f"{path} is not as it was written (its sha256 differs); bring it back, or remove it"
    with pytest.raises(DamagedError, match=re.escape(words)):
        read_manifest(tmp_path, "factors")


@pytest.fixture
def product(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = tmp_path / "product"
    (folder / "sub").mkdir(parents=True)
    names = ("a", "b", "sub/c", "d")
    for name in names:
        (folder / name).write_text(f"text of {name}")
    return folder, {name: sha256_of_file(folder / name) for name in names}


def test_what_stands_as_it_was_written(product: tuple[Path, dict[str, str]]) -> None:
    assert changed_files(*product) == []
    require_unchanged(*product, "make it again")


def test_changed_and_missing_files_are_named(product: tuple[Path, dict[str, str]]) -> None:
    folder, files = product
    (folder / "a").unlink()
    (folder / "sub" / "c").write_text("text of C")
    missing, changed = (
        f"{folder}/a is missing",
        f"{folder}/sub/c is not as it was written (SHA-256)",
    )
    assert changed_files(folder, files) == [missing, changed]
    with pytest.raises(DamagedError) as caught:
        require_unchanged(folder, files, "make it again")
    assert str(caught.value) == f"{missing}; {changed}: make it again"
    for name in ("b", "d"):
        (folder / name).write_text("")
    with pytest.raises(DamagedError, match="b is not as .*; and 1 more: make it again$"):
        require_unchanged(folder, files, "make it again")


def test_unchanged_files_are_hashed_once_and_a_changed_one_again(
    product: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that keeps size and time of change is another file all the same."""
    monkeypatch.setattr(folder_hashes, "SMALL_BYTES", 1)
    folder, files = product
    for name in files:
        os.utime(folder / name, (1_000_000, 1_000_000))
    hashed: list[str] = []

    def hashing(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(folder_hashes, "sha256_of_file", hashing)
    for _ in range(2):
        assert changed_files(folder, files) == []
    assert hashed == ["a", "b", "c", "d"]
    (folder / "b").write_text("text of B")
    os.utime(folder / "b", (1_000_000, 1_000_000))
    assert changed_files(folder, files) == [f"{folder}/b is not as it was written (SHA-256)"]
    assert hashed[4:] == ["b"]


def test_one_file_by_the_manifest_beside_it(product: tuple[Path, dict[str, str]]) -> None:
    folder, files = product
    require_as_listed(folder / "a", "make it again")  # nothing says what it was
    write_manifest(folder, Manifest("factors", files={"a": files["a"]}))
    require_as_listed(folder / "a", "make it again")
    for name in ("a", "b"):
        (folder / name).write_text("other")
    require_as_listed(folder / "b", "make it again")
    with pytest.raises(
        DamagedError, match=r"a is not as it was written \(SHA-256\): make it again"
    ):
        require_as_listed(folder / "a", "make it again")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match="manifest.json is not a manifest: .*; make it again$"):
        require_as_listed(folder / "a", "make it again")


CHECKPOINT = ("config.json", "factors.json", "tokenizer.model", "model.safetensors")


def checkpoint(folder: Path, names: tuple[str, ...] = CHECKPOINT) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    files = {name: sha256_of_file(folder / name) for name in names}
    write_manifest(folder, Manifest("checkpoint", files=files))
    return folder


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (0, "config.json"),
        (1, "factors.json"),
        (2, "tokenizer"),
        (3, r"\*\.safetensors"),
        (None, r"config\.json, factors\.json, tokenizer, \*\.safetensors"),
    ],
)
def test_a_checkpoint_lists_what_a_model_needs(
    tmp_path: Path, left_out: int | None, named: str
) -> None:
    names = tuple(n for i, n in enumerate(CHECKPOINT) if left_out is not None and i != left_out)
    folder = checkpoint(tmp_path / "final", names)
    with pytest.raises(ArtifactError, match=f"manifest.json lists no {named}: it is of no whole"):
        finished_checkpoint(folder)


def test_a_checkpoint_is_used_as_it_was_written(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "final")
    require_unchanged_subject(folder)
    (folder / "model.safetensors").write_text("model.safetensorz")
    words = (
        r"model.safetensors is not as .*: bring it back; or remove manifest.json of 3_checkpoints"
    )
    with pytest.raises(DamagedError, match=words):
        require_unchanged_subject(folder)


def test_of_an_export_its_own_folder_counts(tmp_path: Path) -> None:
    names = [f"{folder}/config.json" for folder in ("dual", "long")]
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    files = {name: sha256_of_file(tmp_path / name) for name in names}
    write_manifest(tmp_path, Manifest("exports", files=files))
    (tmp_path / "long" / "config.json").write_text("{}")
    require_unchanged_subject(tmp_path / "dual")
    with pytest.raises(
        DamagedError, match="long/config.json is not as .*: .* launch.export's comm"
    ):
        require_unchanged_subject(tmp_path / "long")


def test_a_summary_is_read_as_the_manifest_lists_it(tmp_path: Path) -> None:
    path = tmp_path / EvaluationSummary.file_name
    path.write_text("{}")
    write_manifest(tmp_path, Manifest("evaluations", files={path.name: "0"}))
    with pytest.raises(DamagedError, match=r"evaluations.json is not as it was written"):
        read_summary(EvaluationSummary, tmp_path)


@pytest.mark.parametrize("line", ['{"step": 1.5}', '{"time": 1, "loss": "a"}', '{"step": null}'])
def test_a_metrics_line_that_holds_no_numbers_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"time": 1.5, "step": 1}}\n{line}\n')
    with pytest.raises(ArtifactError, match=r"metrics.jsonl is damaged at line 2; remove that"):
        read_metrics(tmp_path)
