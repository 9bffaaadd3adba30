"""GGUF files of exports, read back by gguf itself and by the reader of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from byte_level_tokenizer import save_llama3_style
from transformers import AutoModelForCausalLM

from longrope2.errors import ArtifactError
from longrope2.export.gguf_file import write_gguf
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.variants import ExportVariant, variant_factors
from longrope2.model.loading import rope_geometry
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import RopeMethod, closed_form_factors

MODEL = Path("models/tiny")
# Newer versions keep GGUF weights quantized unless told; older ones have no such setting.
DEQUANTIZED = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)}
    if hasattr(transformers, "GgufConfig")
    else {}
)
FACTORS = closed_form_factors(RopeMethod.ntk, rope_geometry(MODEL, 128), 2048)


def exported(folder, variant=ExportVariant.dual, dtype=torch.float32):
    write_hugging_face_folder(MODEL, FACTORS, folder, dtype, variant)
    return folder


@pytest.mark.parametrize("variant", [ExportVariant.dual, ExportVariant.long_only])
def test_factor_tensors_and_lengths_read_back(tmp_path, variant):
    import gguf

    applied = variant_factors(FACTORS, variant)
    folder = exported(tmp_path / "export", variant)
    write_gguf(folder, applied, tmp_path / "model.gguf", name="a name")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for window, name in ((Window.SHORT, "short"), (Window.LONG, "long")):
        expected = np.array(applied.window_factors(window), dtype=np.float32)
        assert np.array_equal(tensors[f"rope_factors_{name}.weight"], expected)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.scaling.type"] == "longrope"
    assert fields["llama.rope.scaling.original_context_length"] == 128
    assert fields["llama.context_length"] == 2048
    assert fields["llama.rope.scaling.attn_factor"] == 1.0
    assert "llama.rope.scaling.factor" not in fields
    assert fields["general.name"] == "a name"
    assert fields["tokenizer.ggml.model"] == "llama"
    pieces = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    vocab = (
        pieces
        if isinstance(pieces, dict)
        else {piece: number for number, (piece, _) in enumerate(pieces)}
    )
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(vocab) and all(
        tokens[number] == piece for piece, number in vocab.items()
    )
    assert (
        fields["tokenizer.ggml.bos_token_id"]
        == json.loads((MODEL / "config.json").read_text())["bos_token_id"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_weights_read_by_transformers_are_the_models(tmp_path, dtype):
    """Its reader undoes the order of rows and knows no longrope: the original RoPE, short."""
    folder = exported(tmp_path / "export", dtype=dtype)
    write_gguf(folder, FACTORS, tmp_path / "model.gguf", name="tiny")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, **DEQUANTIZED
    ).eval()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    wanted = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    tokens = torch.arange(3, 103)[None]
    assert (found.model.embed_tokens(tokens) - expected.model.embed_tokens(tokens)).abs().max() == 0


def test_ids_that_are_no_tokens_do_not_move_the_others(tmp_path):
    """A byte-level BPE whose vocabulary leaves two ids out, in front of its control tokens."""
    import gguf

    folder = save_llama3_style(exported(tmp_path / "export"))
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    size = len(fields["model"]["vocab"])
    for added in fields["added_tokens"]:
        added["id"] += 2
        fields["model"]["vocab"][added["content"]] = added["id"]
    template = fields["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]
    template["ids"] = [template["ids"][0] + 2]
    path.write_text(json.dumps(fields), encoding="utf-8")
    write_gguf(folder, FACTORS, tmp_path / "model.gguf", name="tiny")
    found = {
        name: field.contents()
        for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
    }
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    gaps = [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert tokens[size : size + 4] == [*gaps, "<|begin_of_text|>", "<|end_of_text|>"]
    control, unused = (int(gguf.TokenType[name]) for name in ("CONTROL", "UNUSED"))
    assert kinds[size : size + 4] == [unused, unused, control, control]
    assert len(tokens) == len(kinds) == 2048 and kinds[-1] == unused
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(found["tokenizer.ggml.merges"]) == len(fields["model"]["merges"])
    assert found["tokenizer.ggml.bos_token_id"] == size + 2


def test_what_cannot_become_gguf_is_refused(tmp_path):
    folder = exported(tmp_path / "export")
    with pytest.raises(
        ArtifactError, match=r"by the rules of Phi-3, .* set model\.name to another"
    ):
        write_gguf(folder, FACTORS, tmp_path / "model.gguf", name="my_phi3_llama")
    two_scales = RescaleFactors(**{**vars(FACTORS), "long_attention_scale": 1.1})
    with pytest.raises(ArtifactError, match="one attention factor for both windows"):
        write_gguf(folder, two_scales, tmp_path / "model.gguf", name="tiny")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"attention_bias": True}, "biases and partly rotated heads are not supported"),
        ({"model_type": "qwen2"}, "qwen2 models are not supported, llama, mistral are"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ArtifactError, match=message):
            write_gguf(folder, FACTORS, tmp_path / "model.gguf", name="tiny")
