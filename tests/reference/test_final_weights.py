"""``final/`` in shards, as plain transformers reads it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference.tiny_families import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longrope2.files.artifacts import Manifest, read_manifest, sha256_of_file
from longrope2.model.loading import find_weights, load_windowed_model
from longrope2.model.windowed import WindowedModel
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.training.final import save_final


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_load_in_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        dtype="float32",
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    base = tmp_path / "base"
    model.save_pretrained(base)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"of an attempt that was killed")
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(16, 10_000.0, 32), 64)
    engine = SimpleNamespace(module=SimpleNamespace(hf=model))
    save_final(
        engine, tmp_path, base, factors, Manifest("checkpoint"), dtype, max_shard_bytes=12_000
    )
    final = tmp_path / "final"
    shards = sorted(final.glob("*.safetensors"))
    assert len(shards) > 2 and [s.name for s in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    held = [load_file(shard) for shard in shards]
    assert all(sum(t.nbytes for t in tensors.values()) <= 12_000 for tensors in held)
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for tensors in held for t in tensors.values()
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(
        final, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, expected in model.named_parameters():
        found = loaded.get_parameter(name)
        assert found.dtype is dtype and torch.equal(found, expected.to(dtype)), name
    manifest = read_manifest(final, "checkpoint")
    assert manifest.files == {
        p.name: sha256_of_file(p) for p in final.iterdir() if p.name != "manifest.json"
    }


def test_buffers_of_the_class_are_saved_too(tmp_path: Path) -> None:
    """DeepSeek-V3 corrects its router with a buffer: left out, it would come back as zeros."""
    base, name = make_model("deepseek_v3", tmp_path / "base"), "e_score_correction_bias"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    buffers = {key: value for key, value in model.named_buffers() if key.endswith(name)}
    assert buffers
    for value in buffers.values():
        value.copy_(torch.linspace(-1, 1, value.numel()))
    dim, shards = model.model.rotary_emb.inv_freq.numel() * 2, 100_000
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(dim, 10_000.0, 64), 128)
    engine: Any = SimpleNamespace(module=WindowedModel(model, factors))
    save_final(
        engine, tmp_path, base, factors, Manifest("checkpoint"), torch.float32,
        max_shard_bytes=shards,
    )  # fmt: skip
    found = dict(find_weights(tmp_path / "final").by_file())
    assert len(found) > 1
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32),
        load_windowed_model(tmp_path / "final", factors).hf,
        load_windowed_model(tmp_path / "final", factors, take=lambda parameter: None).hf,
    ):
        for key, value in buffers.items():
            assert torch.equal(loaded.get_buffer(key), value), key
        for key, value in model.named_parameters():
            assert torch.equal(loaded.get_parameter(key), value), key
