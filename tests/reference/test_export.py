"""Exported folders, loaded by plain transformers, against our windowed model in both windows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from longrope2.config import compose, to_plain
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.errors import ArtifactError, DataError, FactorsError
from longrope2.export.hugging_face import merged_config, write_hugging_face_folder
from longrope2.export.run import Export, is_complete, static_cost
from longrope2.export.variants import ExportRoot, ExportVerify
from longrope2.export.verification import LOGIT_TOLERANCE, verify_export
from longrope2.files.artifacts import Manifest, sha256_of_bytes, write_manifest
from longrope2.model.loading import load_windowed_model
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import from_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors

ORIGINAL_LEN, TARGET_LEN, VOCAB_SIZE = 16, 64, 97
GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=50_000.0, original_len=ORIGINAL_LEN)


def factors_with(**changes):
    factors = tuple(4.0 ** (i / 5) if i < 5 else 4.0 + 0.3 * i for i in range(8))
    return RescaleFactors(factors, GEOMETRY, TARGET_LEN, "longrope2", critical_index=5, **changes)


def save_checkpoint(folder, model_class=LlamaForCausalLM, config_class=LlamaConfig):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=ORIGINAL_LEN,
        rope_theta=50_000.0,
        tie_word_embeddings=True,
    )
    model_class(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": ORIGINAL_LEN, "bos_token": "<s>"})
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@torch.inference_mode()
def logits_at(checkpoint, exported, factors, length):
    tokens_BT = torch.randint(
        VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(length)
    )
    ours = load_windowed_model(checkpoint, factors).eval()
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    window = Window.SHORT if length <= ORIGINAL_LEN else Window.LONG
    other = Window.LONG if window is Window.SHORT else Window.SHORT
    return (
        ours.logits(tokens_BT, window),
        ours.logits(tokens_BT, other),
        theirs(input_ids=tokens_BT).logits,
    )


@pytest.mark.parametrize(
    "length", [ORIGINAL_LEN - 1, ORIGINAL_LEN, ORIGINAL_LEN + 1, 2 * ORIGINAL_LEN]
)
@pytest.mark.parametrize(
    "factors",
    [
        factors_with(),
        factors_with(short_attention_scale=1.2, long_attention_scale=1.2),
        factors_with(short_factors=tuple(1 + 0.1 * i for i in range(8))),
    ],
    ids=["longrope2", "attention_scale", "short_factors"],
)
def test_logits_equal_ours_on_both_sides_of_the_switch(checkpoint, tmp_path, factors, length):
    write_hugging_face_folder(checkpoint, factors, tmp_path / "export", torch.float32)
    ours, other_window, theirs = logits_at(checkpoint, tmp_path / "export", factors, length)
    assert (ours - theirs).abs().max() < 1e-4
    assert (other_window - theirs).abs().max() > 1e-2


def test_another_model_class_with_grouped_heads(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "qwen", Qwen2ForCausalLM, Qwen2Config)
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path / "export", torch.float32)
    for length in (ORIGINAL_LEN, ORIGINAL_LEN + 1):
        ours, _, theirs = logits_at(checkpoint, tmp_path / "export", factors_with(), length)
        assert (ours - theirs).abs().max() < 1e-4


def test_verification_accepts_both_number_formats(checkpoint, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        write_hugging_face_folder(checkpoint, factors_with(), folder, dtype)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
            dtype
        }
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
            "torch."
        )
        differences = verify_export(
            checkpoint, factors_with(), folder, dtype, (ORIGINAL_LEN, ORIGINAL_LEN + 1)
        )
        assert differences.keys() == {ORIGINAL_LEN, ORIGINAL_LEN + 1}
        assert all(0 <= difference <= LOGIT_TOLERANCE for difference in differences.values())


@pytest.mark.parametrize(
    ("key", "value", "length"),
    [
        ("attention_factor", 1.01, 16),
        ("long_factor", [1.0] * 8, 17),
        ("short_factor", [2.0] * 8, 16),
    ],
)
def test_verification_finds_a_wrong_config(checkpoint, tmp_path, key, value, length):
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"][key] = config["rope_parameters"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = (
        rf"at {length} tokens plain transformers gives logits that differ .* nothing was exported"
    )
    with pytest.raises(ArtifactError, match=expected):
        verify_export(
            checkpoint, factors_with(), tmp_path, torch.float32, (ORIGINAL_LEN, ORIGINAL_LEN + 1)
        )


def test_code_files_that_do_not_come_along_are_not_named():
    """Hub copies of Phi-3 name theirs; every engine has the class itself."""
    base = {
        "model_type": "phi3",
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "num_attention_heads": 2,
        "hidden_size": 32,
        "rope_theta": 50_000.0,
    }
    assert "auto_map" not in merged_config(base, factors_with(), torch.float32)


def test_config_says_the_same_in_both_layouts(checkpoint, tmp_path):
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert from_hf_config(config).factors == factors_with().factors
    assert config["max_position_embeddings"] == TARGET_LEN
    assert config["original_max_position_embeddings"] == ORIGINAL_LEN
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert (
        config["rope_scaling"]["attention_factor"]
        == config["rope_parameters"]["attention_factor"]
        == 1.0
    )
    base = json.loads((checkpoint / "config.json").read_text())
    changed = {key for key in base.keys() | config.keys() if base.get(key) != config.get(key)}
    assert changed == {
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "torch_dtype",
    }
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer_config == {"model_max_length": TARGET_LEN, "bos_token": "<s>"}


def test_factors_and_card_stand_beside_the_weights(checkpoint, tmp_path):
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path, torch.float32)
    assert RescaleFactors.from_json((tmp_path / "factors.json").read_text()) == factors_with()
    card = (tmp_path / "README.md").read_text()
    for part in (
        "# LlamaForCausalLM, window extended from 16 to 64 tokens",
        "| critical dimension (cosine index) | 5 |",
        "1, 1.32, 1.741,",
        "| attention factor | 1 |",
        "**for the whole batch**",
        "keeps the key/value cache",
        "`--max-model-len` up to 16 (its default): the original RoPE",
        "What that costs was not measured for this model.",
    ):
        assert part in card
    assert "{" not in card


def test_generation_reaches_to_the_end_of_the_window(checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    for given, exported in (
        (
            {"max_length": ORIGINAL_LEN, "eos_token_id": 2},
            {"max_length": TARGET_LEN, "eos_token_id": 2},
        ),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3]}),
    ):
        (base / "generation_config.json").write_text(json.dumps(given))
        write_hugging_face_folder(base, factors_with(), tmp_path / "exported", torch.float32)
        assert (
            json.loads((tmp_path / "exported" / "generation_config.json").read_text()) == exported
        )


def composed(folder, *overrides):
    run = ("model=tiny", f"target_len={TARGET_LEN}", f"run.root={folder}", "run.name=r")
    return compose(ExportRoot, "export", (*run, *overrides))


def test_an_export_with_other_settings_or_without_its_folder_is_not_complete(tmp_path):
    inputs = {"checkpoint": {"path": "x", "sha256": "y"}}

    def exported(*overrides):
        return Export(composed(tmp_path, *overrides), tmp_path, factors_with(), inputs)

    made = exported("export.cost_windows=0")
    made.folder.mkdir(parents=True)
    config = made.folder / "hugging_face" / "config.json"
    files = {"hugging_face/config.json": sha256_of_bytes(b"{}")}
    manifest = Manifest("exports", inputs=inputs, config=to_plain(made.config), files=files)
    write_manifest(made.folder, manifest)
    assert not is_complete(made)
    config.parent.mkdir()
    config.write_text("{}")
    assert is_complete(made)
    assert is_complete(exported("export.cost_windows=0", "export.checkpoint=elsewhere"))
    assert not is_complete(exported())
    assert not is_complete(exported("export.cost_windows=0", "export.dtype=bf16"))


def test_the_cost_is_measured_on_the_texts_there_are(tmp_path, capsys):
    """Fewer than asked for: it says so. None held out: refused, with the way out."""
    texts, model = tmp_path / "texts", Path(__file__).parents[2] / "models" / "tiny"
    texts.mkdir()
    (texts / "a.txt").write_text("some words of a text")
    held_out = CorpusConfig("mine", CorpusKind.folder, folder=str(texts), heldout_fraction=1.0)
    config = composed(tmp_path, "export.cost_windows=2")
    factors = closed_form_factors(RopeMethod.ntk, RopeGeometry(32, 10_000.0, 128), 256)
    cost = static_cost(Export(config, model, factors, {}, held_out))
    assert cost is not None and cost.num_windows == 1
    assert cost.text == "held out of the corpus `mine`"
    said = "cost       measured on 1 texts, all that corpus mine holds out"
    assert f"{said} (export.cost_windows=2 asks for more)\n" in capsys.readouterr().out
    packed = replace(held_out, heldout_fraction=0.0)
    with pytest.raises(
        DataError, match=r"no document fell into .*; export\.cost_windows=0 exports"
    ):
        static_cost(Export(config, model, factors, {}, packed))
    assert static_cost(Export(config, model, factors, {})) is None


def test_two_attention_scales_cannot_be_exported(checkpoint, tmp_path):
    yarn = closed_form_factors(RopeMethod.yarn, GEOMETRY, TARGET_LEN)
    with pytest.raises(FactorsError, match="attention scale is 1.0 in the short window and 1.1386"):
        write_hugging_face_folder(checkpoint, yarn, tmp_path, torch.float32)


def test_sharded_weights_keep_their_index(checkpoint, tmp_path):
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    write_hugging_face_folder(sharded, factors_with(), tmp_path / "export", torch.bfloat16)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(
        parameter.numel() for parameter in model.parameters()
    )
    verify_export(
        checkpoint,
        factors_with(),
        tmp_path / "export",
        torch.bfloat16,
        (ORIGINAL_LEN, ORIGINAL_LEN + 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_quick_way_accepts_what_the_full_one_does(tmp_path, dtype, capsys):
    """Few tokens at the positions on either side of a switch far away; two layers of five."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=512, rope_theta=50_000.0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    factors = replace(factors_with(), geometry=replace(GEOMETRY, original_len=512), target_len=2048)
    write_hugging_face_folder(tmp_path / "base", factors, tmp_path / "export", dtype)
    asked = (tmp_path / "base", factors, tmp_path / "export", dtype, (512, 513))
    full = verify_export(*asked)
    capsys.readouterr()
    quick = verify_export(*asked, verify=ExportVerify.quick)
    assert quick.keys() == full.keys() == {512, 513}
    assert all(0 <= found <= LOGIT_TOLERANCE for found in (*quick.values(), *full.values()))
    assert capsys.readouterr().out.splitlines() == [
        "checking   the weights as they are stored",
        "checking   the checkpoint's logits at 512 and 513 tokens",
        "checking   plain transformers' logits at 512 and 513 tokens",
    ]


@pytest.mark.parametrize(
    ("key", "value", "length"),
    [
        ("attention_factor", 1.01, 16),
        ("long_factor", [1.0] * 8, 17),
        ("short_factor", [2.0] * 8, 16),
    ],
)
def test_the_quick_way_finds_a_wrong_config(checkpoint, tmp_path, key, value, length):
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"][key] = config["rope_parameters"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = (checkpoint, factors_with(), tmp_path, torch.float32, (ORIGINAL_LEN, ORIGINAL_LEN + 1))
    with pytest.raises(ArtifactError, match=rf"at {length} tokens plain transformers gives logits"):
        verify_export(*asked, verify=ExportVerify.quick)


def test_the_quick_way_finds_a_wrong_weight_of_any_layer(tmp_path):
    """Of the last layer, which it does not compute."""
    torch.manual_seed(1)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=4, rope_theta=50_000.0, **small)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    write_hugging_face_folder(tmp_path / "base", factors_with(), tmp_path / "export", torch.float32)
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    asked = (tmp_path / "base", factors_with(), tmp_path / "export", torch.float32, (16, 17))
    with pytest.raises(ArtifactError, match=rf"{name} in model\.safetensors is not the checkp"):
        verify_export(*asked, verify=ExportVerify.quick)


def test_cards_say_how_they_were_checked(checkpoint, tmp_path):
    for verify, said in (
        (ExportVerify.full, "was written it was loaded with transformers"),
        (ExportVerify.quick, "written its weights were compared with those it was made of, and"),
    ):
        folder = tmp_path / verify.value
        write_hugging_face_folder(checkpoint, factors_with(), folder, torch.float32, verify=verify)
        card = (folder / "README.md").read_text()
        assert said in card and "on either side of the end of the original window" in card
