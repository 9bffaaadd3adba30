"""Weights that do not fit their model are refused by name, alike whole and in shares."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import Manifest, hashes_of, write_manifest
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ROOT = Path(__file__).parents[2]
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def saved(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).save_pretrained(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return apply


def load(folder: Path, *, whole: bool) -> Any:
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(folder, 64), 256)
    if whole:
        return load_windowed_model(folder, factors)
    return load_windowed_model(folder, factors, take=lambda parameter: None)


def refusal(folder: Path) -> str:
    """The message, which must be the same on both paths and say the folder."""
    texts = []
    for whole in (True, False):
        with pytest.raises(ArtifactError) as caught:
            load(folder, whole=whole)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert str(folder) in texts[0]
    return texts[0]


def test_right_weights_are_equal_on_both_paths(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    for whole in (True, False):
        found = dict(load(folder, whole=whole).hf.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


CHANGES: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "no head": (lambda t: t.pop(HEAD), (f"missing: {HEAD}; unknown: none", "would be random")),
    "no norm": (lambda t: t.pop(NORM), (f"missing: {NORM}; unknown: none",)),
    "one more": (lambda t: t.update(more=torch.ones(2)), ("missing: none; unknown: more",)),
    "bare names": (
        renamed(lambda name: name.removeprefix("model.")),
        (f"missing: {EMBEDDING}", "and 17 more", "unknown: embed_tokens.weight", "'model.'"),
    ),
    "module": (renamed(lambda name: f"module.{name}"), ("'module.'", "without its wrapper")),
    "language model": (
        renamed(lambda name: f"language_model.{name}"),
        ("'language_model.'", "without its wrapper"),
    ),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), ("'_orig_mod.'",)),
    "another shape": (
        lambda t: t.update({NORM: torch.ones(3)}),
        (f"{NORM} has shape [3], not [32]",),
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_tensors_that_do_not_fit(folder: Path, name: str) -> None:
    change, texts = CHANGES[name]
    edit_tensors(folder, change)
    found = refusal(folder)
    assert all(text in found for text in texts), found


def test_more_layers_in_the_config_than_in_the_file(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    assert "missing: model.layers.2." in refusal(folder)


def test_fewer_layers_in_the_config_than_in_the_file(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    assert "missing: none; unknown: model.layers.1." in refusal(folder)


def test_a_tied_config_with_the_same_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    for whole in (True, False):
        hf = load(folder, whole=whole).hf
        assert hf.lm_head.weight is hf.model.embed_tokens.weight


def test_a_tied_config_with_only_the_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    expected = load_file(folder / "model.safetensors")[HEAD]
    for whole in (True, False):
        assert torch.equal(load(folder, whole=whole).hf.model.embed_tokens.weight, expected)


def test_a_tied_config_with_another_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    text = refusal(folder)
    assert HEAD in text and EMBEDDING in text and "tie_word_embeddings" in text


def split(folder: Path) -> dict[str, Any]:
    """Two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("one.safetensors", names[:9]), ("two.safetensors", names[9:])):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    return write_index(folder, {"metadata": {}, "weight_map": weight_map})


def write_index(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_with_their_index(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    split(folder)
    for whole in (True, False):
        found = dict(load(folder, whole=whole).hf.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_index_that_names_an_absent_file(folder: Path) -> None:
    split(folder)
    (folder / "two.safetensors").unlink()
    assert "names two.safetensors, which is not there; download it again" in refusal(folder)


def test_an_index_that_does_not_fit_its_files(folder: Path) -> None:
    index = split(folder)
    index["weight_map"][HEAD] = "two.safetensors"
    index["weight_map"]["more"] = index["weight_map"].pop(NORM)
    write_index(folder, index)
    text = refusal(folder)
    assert "does not fit its files" in text
    assert f"named but not there: {HEAD}" in text and f"there but not named: {NORM}" in text


@pytest.mark.parametrize("index", [{}, [], {"metadata": {}, "weight_map": [1]}, {"weight_map": {}}])
def test_an_index_that_is_none(folder: Path, index: Any) -> None:
    write_index(folder, index)
    assert "is no index of weights" in refusal(folder)


def test_a_tensor_in_two_indexed_files(folder: Path) -> None:
    index = split(folder)
    other = folder / "two.safetensors"
    first = load_file(folder / "one.safetensors")[HEAD]
    save_file(load_file(other) | {HEAD: first + 1}, other, metadata={"format": "pt"})
    write_index(folder, index)
    text = refusal(folder)
    assert f"{HEAD} is in one.safetensors and two.safetensors" in text


def test_a_tensor_in_two_files(folder: Path) -> None:
    save_file({HEAD: torch.ones(2048, 32)}, folder / "more.safetensors", metadata={"format": "pt"})
    assert f"{HEAD} is in model.safetensors and more.safetensors" in refusal(folder)


def test_files_that_transformers_would_not_read(folder: Path) -> None:
    """Two files and no index: transformers reads model.safetensors alone."""
    tensors = load_file(folder / "model.safetensors")
    save_file({HEAD: tensors.pop(HEAD)}, folder / "more.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_git_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "is a Git LFS pointer, not the weights; run `git lfs pull`" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_file(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "cannot be read as safetensors" in refusal(folder)


def test_only_pickled_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    text = refusal(folder)
    assert "holds no *.safetensors weights" in text and "pytorch_model.bin" in text


@pytest.mark.parametrize("what", ["missing", "unknown", "shape"])
def test_weights_that_transformers_converts(tmp_path: Path, what: str) -> None:
    """Stored expert by expert: what is wrong is only known when they are read."""
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES, num_local_experts=2, sliding_window=None)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    load(tmp_path, whole=False)
    changes: dict[str, Callable[[Tensors], object]] = {
        "missing": lambda t: t.pop(HEAD),
        "unknown": lambda t: t.update(more=torch.ones(2)),
        "shape": lambda t: t.update({NORM: torch.ones(3)}),
    }
    edit_tensors(tmp_path, changes[what])
    assert {"missing": HEAD, "unknown": "more", "shape": NORM}[what] in refusal(tmp_path)


@pytest.mark.parametrize("command", ["search", "evaluate", "export"])
def test_commands_refuse_a_model_without_its_head(tmp_path: Path, command: str) -> None:
    folder = saved(tmp_path / "model", bos_token_id=1, eos_token_id=2)
    edit_tensors(folder, lambda t: t.pop(HEAD))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "models" / "tiny" / name).read_bytes())
    runs = tmp_path / "runs"
    if command == "export":
        factors = closed_form_factors(RopeMethod.ntk, rope_geometry(folder, 128), 256)
        (folder / "factors.json").write_text(factors.to_json())
        write_manifest(folder, Manifest("checkpoint", files=hashes_of(folder)))
    arguments = {
        "search": ["corpus=sample", "search=quick", "search.objective=perplexity"],
        "evaluate": [
            "corpus=sample",
            "evaluation.perplexity.scored_tokens=8",
            "evaluation.subjects=[{name: base, rope: {method: none}}]",
        ],
        "export": [f"export.checkpoint={folder}"],
    }[command]
    given = ["model=custom", f"model.path={folder}", "model.original_len=128", "target_len=256"]
    ended = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *given, f"run.root={runs}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert f"missing: {HEAD}" in ended.stderr and "Traceback" not in ended.stderr
    assert not [path for path in runs.rglob("*.safetensors")]
    assert not [path for path in runs.rglob("factors.json")]
