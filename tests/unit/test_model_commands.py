"""What the commands refuse about a model: by name, with exit code 2, before anything is written."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.pack import main as pack_main
from longrope2.command import run_command
from longrope2.errors import ArtifactError
from longrope2.export.gguf_file import write_gguf
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.files.artifacts import Manifest, hashes_of, write_manifest
from longrope2.files.folder_hashes import CACHE_VARIABLE
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

TINY = Path(__file__).parents[2] / "models" / "tiny"
FACTORS = closed_form_factors(RopeMethod.ntk, RopeGeometry(32, 10_000.0, 128), 256)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segments: without any, a training is refused for that, before its model is loaded."""
    folder = tmp_path_factory.mktemp("runs")
    size = ["--target", "256", "--corpus", "sample", "--model", "tiny"]
    quotas = [
        "quotas.stdlib_modules={short: 3000, long: 3000}",
        "quotas.stdlib_topics={short: 0, long: 0}",
        "quotas.retrieval={short: 0, long: 0}",
    ]
    pack_main([*size, *quotas, "run.name=packed", f"run.root={folder}"])
    return folder / "packed" / "1_segments"


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """What a training of the miniature leaves."""
    folder = tmp_path / "final"
    shutil.copytree(TINY, folder)
    (folder / "factors.json").write_text(FACTORS.to_json())
    write_manifest(folder, Manifest("checkpoint", files=hashes_of(folder)))
    return folder


def refusal(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> str:
    """The one message of a refused command; nothing is written, not even a view of the model."""
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    fixed = ["target_len=256", f"run.root={runs}", "run.name=x"]
    monkeypatch.setattr(sys, "argv", [f"launch.{command}", *words, *fixed])
    with pytest.raises(SystemExit) as ended:
        run_command(importlib.import_module(f"launch.{command}").main)
    captured = capsys.readouterr()
    assert ended.value.code == 2, captured.err
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert not runs.exists()
    # Of what is costly to make, a tokenizer is kept.
    assert not cache.exists() or [p.name for p in cache.iterdir()] == ["tokenizers"]
    return captured.err


def reading(command: str, final: Path, tmp_path: Path) -> list[str]:
    """A command that reads the checkpoint."""
    (tmp_path / "prompt.txt").write_text("import os\n")
    return {
        "evaluate": [
            "model=tiny",
            "corpus=sample",
            "evaluation.perplexity.scored_tokens=8",
            "evaluation.reference=trained",
            f"evaluation.subjects=[{{name: trained, checkpoint: {final}}}]",
        ],
        "export": ["model=tiny", f"export.checkpoint={final}", "export.cost_windows=0"],
        "generate": [
            "model=tiny",
            f"generate.checkpoint={final}",
            f"generate.prompt_file={tmp_path / 'prompt.txt'}",
        ],
    }[command]


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[NORM]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | {"more": torch.ones(2)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def leave_a_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / WEIGHTS).write_text(pointer)


def add_another_index(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    weight_map["more"] = weight_map.pop(NORM)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_a_second_file(folder: Path) -> None:
    norm = {NORM: load_file(folder / WEIGHTS)[NORM]}
    save_file(norm, folder / "more.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lose_a_tensor, f"missing: {NORM}; unknown: none"),
    "unknown": (add_a_tensor, "missing: none; unknown: more"),
    "pointer": (leave_a_pointer, "is a Git LFS pointer, not the weights; run `git lfs pull`"),
    "index": (add_another_index, f"named but not there: more; there but not named: {NORM}"),
    "doubled": (add_a_second_file, f"{NORM} is in {WEIGHTS} and more.safetensors"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("command", ["evaluate", "export", "generate"])
def test_a_damaged_checkpoint(
    command: str, damage: str, final: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    change, text = DAMAGES[damage]
    change(final)
    words = reading(command, final, tmp_path)
    if damage in ("missing", "unknown", "pointer"):  # the others change nothing that is listed
        changed = f"{final / WEIGHTS} is not as it was written (SHA-256): bring it back"
        assert changed in refusal(command, words, tmp_path, monkeypatch, capsys)
    write_manifest(final, Manifest("checkpoint", files=hashes_of(final)))
    message = refusal(command, words, tmp_path, monkeypatch, capsys)
    assert text in message and str(final) in message


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_writers_refuse_the_same(damage: str, final: Path, tmp_path: Path) -> None:
    """Those that copy or convert tensors ask the same question as those that load a model."""
    export = tmp_path / "export"
    write_hugging_face_folder(final, FACTORS, export, torch.float32)
    change, text = DAMAGES[damage]
    change(final)
    change(export)
    with pytest.raises(ArtifactError) as caught:
        write_hugging_face_folder(final, FACTORS, tmp_path / "again", torch.float32)
    assert text in str(caught.value)
    with pytest.raises(ArtifactError) as caught:
        write_gguf(export, FACTORS, tmp_path / "model.gguf", name="tiny")
    assert text in str(caught.value)
    assert not list((tmp_path / "again").glob("*.safetensors"))
    assert not (tmp_path / "model.gguf").exists()


UNSUPPORTED = {
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1: training draws no dropout"),
    "state": ({"layer_types": ["conv"] + ["full_attention"] * 3}, "layer_types has conv"),
    "window": (
        {"model_type": "mistral", "sliding_window": 200},
        "sliding_window=200 is below target_len=256",
    ),
    "wrapper": ({"text_config": {"vocab_size": 3}}, "text_config: llama wraps a language model"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq)"),
    "scaled": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "already has RoPE scaling 'yarn'",
    ),
}


@pytest.mark.parametrize("kind", list(UNSUPPORTED))
@pytest.mark.parametrize("command", ["train", "train dry_run=true", "generate"])
def test_an_unsupported_model(
    command: str,
    kind: str,
    final: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    settings, text = UNSUPPORTED[kind]
    config = json.loads((final / "config.json").read_text())
    (final / "config.json").write_text(json.dumps(config | settings))
    write_manifest(final, Manifest("checkpoint", files=hashes_of(final)))
    command, *options = command.split()
    if command == "train":
        given = ["experiment=tiny_extend", "training.tokens=2048", "rope=yarn"]
        given.append(f"segments={packed}")
        words = [*given, "training.global_batch_tokens=512", f"model.path={final}", *options]
    else:
        words = [*reading(command, final, tmp_path), f"model.path={final}"]
    words.append("model.name=mine")
    message = refusal(command, words, tmp_path, monkeypatch, capsys)
    assert text in message and str(final) in message


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("options", [[], ["dry_run=true"]])
def test_training_refuses_damaged_weights(
    damage: str,
    options: list[str],
    final: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    """Before any rank starts, and in a dry run too."""
    change, text = DAMAGES[damage]
    change(final)
    given = ["experiment=tiny_extend", "training.tokens=2048", "rope=yarn", f"model.path={final}"]
    words = [*given, f"segments={packed}", "training.global_batch_tokens=512", *options]
    assert text in refusal("train", words, tmp_path, monkeypatch, capsys)
