"""A model given its weights one by one is the model transformers loads or initialises."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from longrope2.errors import ArtifactError
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.methods import RopeMethod, closed_form_factors

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "fused": Phi3Config(**SIZES, pad_token_id=0),
}
CLASSES = {"tied": LlamaForCausalLM, "untied": LlamaForCausalLM, "fused": Phi3ForCausalLM}


def saved(name: str, folder: Path, max_shard_size: str = "20KB") -> PreTrainedModel:
    torch.manual_seed(1)
    model = CLASSES[name](MODELS[name])
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def factors_of(folder: Path) -> RescaleFactors:
    return closed_form_factors(RopeMethod.ntk, rope_geometry(folder, 64), 256)


class KeepsNothing:
    """Stands in for ZeRO-3: notes the values, then releases them; never two held at once."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.alive: list[nn.Parameter] = []

    def take(self, parameter: nn.Parameter) -> None:
        assert not parameter.is_meta and all(p.numel() == 0 for p in self.alive)
        self.values.append(parameter.detach().clone())
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        self.alive.append(parameter)


def by_value(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def load(folder: Path, **keywords: object) -> WindowedModel:
    return load_windowed_model(folder, factors_of(folder), **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(MODELS))
def test_read_one_by_one(tmp_path: Path, name: str) -> None:
    expected = by_value(saved(name, tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = load(tmp_path, take=lambda parameter: None)
    assert by_value(found.hf).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in by_value(found.hf).items())
    tied = found.hf.lm_head.weight is found.hf.model.embed_tokens.weight
    assert tied == (name == "tied")
    tokens = torch.arange(20)[None]
    assert torch.equal(found.hf(tokens).logits, load(tmp_path).hf(tokens).logits)


def test_never_two_parameters_at_once(tmp_path: Path) -> None:
    expected = saved("untied", tmp_path)
    keeper = KeepsNothing()
    load(tmp_path, take=keeper.take, dtype=torch.bfloat16)
    assert len(keeper.values) == len(list(expected.parameters()))
    total = sum(value.double().sum() for value in keeper.values)
    assert total == sum(p.detach().bfloat16().double().sum() for p in expected.parameters())


def test_a_rank_that_does_not_read(tmp_path: Path) -> None:
    saved("untied", tmp_path)
    shapes = [p.shape for p in load(tmp_path, take=lambda parameter: None, read=False).parameters()]
    assert shapes == [p.shape for p in load(tmp_path).parameters()]


@pytest.mark.parametrize("name", list(MODELS))
def test_random_weights_are_those_of_the_class(tmp_path: Path, name: str) -> None:
    saved(name, tmp_path)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    expected.to_empty(device="cpu")
    torch.manual_seed(5)
    expected.initialize_weights()
    expected.tie_weights()
    torch.manual_seed(5)
    found = load(tmp_path, from_scratch=True)
    for key, value in by_value(found.hf).items():
        assert torch.equal(value, by_value(expected)[key]), key
    torch.manual_seed(5)
    keeper = KeepsNothing()
    load(tmp_path, from_scratch=True, take=keeper.take)
    assert sum(v.double().sum() for v in keeper.values) == pytest.approx(
        sum(p.double().sum().item() for p in found.parameters())
    )


def test_tables_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    saved("untied", tmp_path, "1GB")
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path, take=lambda parameter: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.norm.weight"),
            r"missing: model\.norm\.weight; unknown: none.*would be random",
        ),
        (lambda s: s.update(more=torch.ones(2)), "missing: none; unknown: more"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has shape \[3\], not \[32\]",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: object, message: str) -> None:
    saved("untied", tmp_path, "1GB")
    state = load_file(tmp_path / "model.safetensors")
    change(state)  # type: ignore[operator]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path, take=lambda parameter: None)


def test_damaged_files(tmp_path: Path) -> None:
    saved("untied", tmp_path, "1GB")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read as safetensors"):
        load(tmp_path, take=lambda parameter: None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"holds no \*\.safetensors weights"):
        load(tmp_path, take=lambda parameter: None)
    names = [name for name, _ in LlamaForCausalLM(MODELS["untied"]).named_parameters()]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "gone.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ArtifactError, match=r"index\.json names gone\.safetensors, which is not there"
    ):
        load(tmp_path, take=lambda parameter: None)


def with_table(monkeypatch: pytest.MonkeyPatch, *, persistent: bool) -> None:
    """Llama's class with a tensor that is no parameter and that its initialisation leaves unset."""
    build = LlamaForCausalLM.__init__

    def with_buffer(self: LlamaForCausalLM, config: LlamaConfig) -> None:
        build(self, config)
        self.register_buffer("table", torch.full((2,), 3.0), persistent=persistent)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)


WAYS = {"whole": {}, "in shares": {"take": lambda parameter: None}}


@pytest.mark.parametrize("way", [*WAYS, "from scratch"])
def test_a_tensor_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The same on every path: no stage of ZeRO makes it right."""
    saved("untied", tmp_path)
    with_table(monkeypatch, persistent=False)
    with pytest.raises(
        ArtifactError,
        match=r"keeps table, which is no parameter.*whatever lies in memory; use a version of tra",
    ) as caught:
        load(tmp_path, **WAYS.get(way, {"from_scratch": True}))
    assert "zero_stage" not in str(caught.value)


def test_a_saved_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs into the weights: missing there it is refused, and never left as it lies."""
    with_table(monkeypatch, persistent=True)
    saved("untied", tmp_path, "1GB")
    for way in WAYS.values():
        assert load(tmp_path, **way).hf.table.tolist() == [3.0, 3.0]
    with pytest.raises(ArtifactError, match="start from weights that hold it, or use a version"):
        load(tmp_path, from_scratch=True)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"table": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    for way in WAYS.values():
        with pytest.raises(ArtifactError, match=r"table has shape \[3\], not \[2\]"):
            load(tmp_path, **way)
    del state["table"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for way in WAYS.values():
        with pytest.raises(ArtifactError, match="missing: table; unknown: none"):
            load(tmp_path, **way)


def test_a_buffer_that_is_not_saved_is_unknown_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers ignores it, shares may not read it."""
    with_table(monkeypatch, persistent=False)
    saved("untied", tmp_path, "1GB")
    state = load_file(tmp_path / "model.safetensors") | {"table": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for way in WAYS.values():
        with pytest.raises(ArtifactError, match="missing: none; unknown: table"):
            load(tmp_path, **way)
