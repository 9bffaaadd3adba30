"""Products on disk: atomic writes, manifests, model identity."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longrope2.command import run_command
from longrope2.config import ModelConfig
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import (
    Manifest,
    atomic_path,
    describe_input,
    read_manifest,
    sha256_of_file,
    write_manifest,
    write_text,
)
from longrope2.model.folder import (
    find_config_file,
    local_model_folder,
    look_before,
    model_identity,
    resolve_model_folder,
)

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "product.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["product.txt"]


def test_known_hash(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of_file(tmp_path / "empty") == EMPTY_SHA256


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = Manifest("segments", counts={"tokens": 3}, seeds={"seed": 1}, files={"a": "b"})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path, "segments") == manifest
    assert describe_input(tmp_path)["sha256"] == sha256_of_file(tmp_path / "manifest.json")


def test_unfinished_product(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no finished segments: manifest.json is missing"):
        read_manifest(tmp_path, "segments")


@pytest.mark.parametrize("text", ["{", '{"kind": "segments", "colour": 1}', "[]"])
def test_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="is not a manifest of this project"):
        read_manifest(tmp_path, "segments")


def test_manifest_of_another_kind_or_version(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest("factors"))
    with pytest.raises(ArtifactError, match="kind is 'factors', expected 'segments'"):
        read_manifest(tmp_path, "segments")
    write_manifest(tmp_path, Manifest("segments", schema_version=99))
    with pytest.raises(
        ArtifactError, match="schema_version is 99, this version reads 1; make it again"
    ):
        read_manifest(tmp_path, "segments")


def model_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    config = {"hidden_size": 8, "rope_theta": 1e4, "max_position_embeddings": 64, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_identity_ignores_rope_scaling_and_sees_architecture_and_tokenizer(tmp_path: Path) -> None:
    base = model_identity(model_folder(tmp_path / "base"))
    scaled = model_folder(
        tmp_path / "scaled", rope_scaling={"rope_type": "yarn"}, max_position_embeddings=4096
    )
    assert model_identity(scaled) == base
    wider = model_identity(model_folder(tmp_path / "wider", hidden_size=16))
    assert wider["architecture_sha256"] != base["architecture_sha256"]
    (scaled / "tokenizer.json").write_text('{"a": 1}')
    assert model_identity(scaled)["tokenizer_sha256"] != base["tokenizer_sha256"]


def test_identity_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        model_identity(folder)


def test_model_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        resolve_model_folder(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ArtifactError, match="neither a folder nor a hub id that can be reached"):
        resolve_model_folder("no/where/at/all")


@pytest.mark.parametrize("path", ["{}/nowhere", "./nowhere", "../nowhere", "~/nowhere", "~"])
def test_a_path_is_never_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A folder that is missing is missing: nothing is asked of the hub, in any of the ways in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    path = path.format(tmp_path)
    looked = "" if path.startswith("/") else r" \(looked for /.*\)"
    fault = f"={re.escape(path)} does not exist{looked}; give a local Hugging Face model folder$"
    with pytest.raises(ArtifactError, match=f"model.path{fault}"):
        resolve_model_folder(path)
    with pytest.raises(ArtifactError, match=f"rope.factors{fault}"):
        find_config_file(path, "rope.factors")
    (found,) = look_before(ModelConfig("m", path, 128)).faults
    assert re.match(f"model.path{fault}", found)
    assert local_model_folder(path) is None


def test_a_home_folder_is_expanded_and_a_file_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an experiment file too, which no shell reads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = model_folder(tmp_path / "m")
    assert find_config_file("~/m", "model.path") == folder / "config.json"
    with pytest.raises(ArtifactError, match="tokenizer.json is a file, not a folder; give a local"):
        resolve_model_folder(str(folder / "tokenizer.json"))


def test_user_errors_end_in_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ConfigError(["a=1 must be 2", "b=3 must be 4"])

    with pytest.raises(SystemExit) as ended:
        run_command(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: the configuration has 2 fault(s):\n  - a=1 must be 2\n  - b=3 must be 4\n"
    )


def test_other_errors_keep_their_traceback() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(fails)


def test_writers_with_equal_process_ids_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Containers on a shared disk number their processes alike."""
    with atomic_path(tmp_path / "x") as first, atomic_path(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_output_that_nobody_reads_to_its_end() -> None:
    """``python -m launch.generate ... | head -1``."""
    code = "from longrope2.command import run_command\n"
    code += "run_command(lambda: print('line\\n' * 1_000_000))"
    shell = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(
        ["bash", "-c", shell],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "line\n", "")
