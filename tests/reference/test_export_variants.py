"""Variants of an export: what transformers computes with them, what static engines read in them.

The rules of vLLM and SGLang are written out here as their public sources have them: both take
``short_factor``, ``long_factor``, ``short_mscale`` and ``long_mscale``, neither reads
``attention_factor`` or ``factor``; without the two magnitudes they multiply cosine and sine by
sqrt(1 + ln(max_position / L0) / ln(L0)) in either window.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export import (
    GEOMETRY,
    ORIGINAL_LEN,
    TARGET_LEN,
    VOCAB_SIZE,
    factors_with,
    save_checkpoint,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from longrope2.errors import FactorsError
from longrope2.export.card_engines import llama_cpp_note
from longrope2.export.hugging_face import merged_config, write_hugging_face_folder
from longrope2.export.model_card import StaticCost
from longrope2.export.variants import ExportVariant, variant_factors
from longrope2.export.verification import verify_export
from longrope2.files.folder_hashes import CACHE_VARIABLE
from longrope2.model.exported import CHANGED_KEYS, before_export
from longrope2.model.folder import NO_WINDOW, model_identity, weights_sha256
from longrope2.model.loading import load_windowed_model
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.hf_config import from_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors

LENGTHS = (ORIGINAL_LEN - 1, ORIGINAL_LEN, ORIGINAL_LEN + 1, 2 * ORIGINAL_LEN)
YARN = closed_form_factors(RopeMethod.yarn, GEOMETRY, TARGET_LEN)
ONES = (1.0,) * 8
OLD_PYTHON = "LONGROPE2_TRANSFORMERS_4_PYTHON"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def random_tokens(length):
    return torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def our_logits(checkpoint, factors, length, window):
    """The trained model, told the window."""
    return load_windowed_model(checkpoint, factors).eval().logits(random_tokens(length), window)


def window_read(variant, length):
    """Which RoPE a variant stands for at a length."""
    if variant is ExportVariant.dual:
        return Window.SHORT if length <= ORIGINAL_LEN else Window.LONG
    return Window.LONG if variant is ExportVariant.long_only else Window.SHORT


CASES = [
    (ExportVariant.dual, factors_with()),
    (ExportVariant.long_only, factors_with()),
    (ExportVariant.short_only, factors_with()),
    (ExportVariant.long_only, YARN),
    (ExportVariant.short_only, YARN),
    (ExportVariant.short_only, factors_with(short_factors=tuple(1 + 0.1 * i for i in range(8)))),
    (ExportVariant.long_only, factors_with(short_attention_scale=1.1, long_attention_scale=1.3)),
    (ExportVariant.short_only, factors_with(short_attention_scale=1.1, long_attention_scale=1.3)),
]


@pytest.mark.parametrize(("variant", "factors"), CASES)
@torch.inference_mode()
def test_transformers_computes_the_trained_model_in_the_windows_of_the_variant(
    checkpoint, tmp_path, variant, factors
):
    write_hugging_face_folder(checkpoint, factors, tmp_path, torch.float32, variant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for length in LENGTHS:
        if variant is ExportVariant.short_only and length > ORIGINAL_LEN:
            continue
        window = window_read(variant, length)
        found = model(input_ids=random_tokens(length)).logits
        assert (found - our_logits(checkpoint, factors, length, window)).abs().max() < 1e-4
        other = Window.SHORT if window is Window.LONG else Window.LONG
        assert (found - our_logits(checkpoint, factors, length, other)).abs().max() > 1e-2


@pytest.mark.parametrize(("variant", "factors"), CASES)
def test_a_variant_is_read_back_as_what_it_applies(checkpoint, tmp_path, variant, factors):
    write_hugging_face_folder(checkpoint, factors, tmp_path, torch.float32, variant)
    applied = variant_factors(factors, variant)
    assert RescaleFactors.from_json((tmp_path / "factors.json").read_text()) == applied
    config = json.loads((tmp_path / "config.json").read_text())
    read = from_hf_config(config)
    for window in Window:
        assert read.window_factors(window) == applied.window_factors(window)
        assert read.attention_scale(window) == applied.attention_scale(window)
    assert (read.geometry, read.target_len) == (applied.geometry, applied.target_len)
    length = json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"]
    assert (
        length
        == config["max_position_embeddings"]
        == (ORIGINAL_LEN if variant is ExportVariant.short_only else TARGET_LEN)
    )


def engine_rope(rope, max_position, reads_long):
    """Factors and magnitude that vLLM's and SGLang's longrope module takes from its keys."""
    if rope["rope_type"] == "default":
        return ONES, 1.0
    assert rope["rope_type"] == "longrope"
    original_len = rope["original_max_position_embeddings"]
    scale = max_position / original_len
    default = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original_len))
    name = "long" if reads_long(original_len) else "short"
    return tuple(rope[f"{name}_factor"]), rope.get(f"{name}_mscale", default)


def vllm_reads(config, max_model_len):
    """One choice at load, by ``--max-model-len``."""
    return engine_rope(
        config["rope_parameters"],
        config["max_position_embeddings"],
        lambda original_len: max_model_len > original_len,
    )


def sglang_reads(config, longest_in_batch):
    """A choice per running batch: one position beyond L0 moves all."""
    rope = config.get("rope_scaling") or {"rope_type": "default"}
    return engine_rope(
        rope,
        config["max_position_embeddings"],
        lambda original_len: longest_in_batch - 1 > original_len,
    )


@pytest.mark.parametrize("reads", [vllm_reads, sglang_reads])
@pytest.mark.parametrize(
    ("variant", "factors"),
    [
        *CASES,
        (ExportVariant.dual, factors_with(short_attention_scale=1.2, long_attention_scale=1.2)),
    ],
)
def test_static_engines_get_the_factors_and_magnitudes_stated(
    checkpoint, tmp_path, variant, factors, reads
):
    write_hugging_face_folder(checkpoint, factors, tmp_path, torch.float32, variant)
    config = json.loads((tmp_path / "config.json").read_text())
    short = factors.window_factors(Window.SHORT), factors.short_attention_scale
    long = factors.factors, factors.long_attention_scale
    expected = {
        ExportVariant.dual: (short, long),
        ExportVariant.long_only: (long, long),
        ExportVariant.short_only: (short, short),
    }[variant]
    assert (reads(config, ORIGINAL_LEN), reads(config, TARGET_LEN)) == expected


def test_two_attention_scales_are_refused_with_a_way_out(checkpoint, tmp_path):
    way_out = r"Set export\.variants=\[long_only,short_only\]"
    expected = rf"attention scale is 1\.0 .* 1\.1386.* \(yarn\); .* {way_out}"
    with pytest.raises(FactorsError, match=expected):
        write_hugging_face_folder(checkpoint, YARN, tmp_path / "export", torch.float32)
    assert not (tmp_path / "export").exists()


def sliding_checkpoint(folder, model_class, config_class, **options):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        max_position_embeddings=ORIGINAL_LEN,
        rope_theta=50_000.0,
        sliding_window=NO_WINDOW,
        pad_token_id=0,
        **options,
    )
    model_class(config).save_pretrained(folder)
    return folder


SLIDING = {
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
}


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_that_training_did_not_have_is_not_exported(tmp_path, name):
    model_class, config_class, options = SLIDING[name]
    checkpoint = sliding_checkpoint(tmp_path / name, model_class, config_class, **options)
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path / "export", torch.float32)
    differences = verify_export(
        checkpoint, factors_with(), tmp_path / "export", torch.float32, LENGTHS
    )
    assert differences.keys() == set(LENGTHS)
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        "asks for a sliding window. This model was trained with full\n"
        f"attention, so the folder's config.json says {TARGET_LEN}, the whole extended window"
        in card
    )
    assert ("drops the key/value cache" in card) == (name == "phi3")


def test_a_sliding_window_that_config_json_leaves_to_the_class_is_not_exported_either(tmp_path):
    """MistralConfig's default is 4,096."""
    checkpoint = sliding_checkpoint(tmp_path / "mistral", MistralForCausalLM, MistralConfig)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["sliding_window"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path / "export", torch.float32)
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["sliding_window"] == TARGET_LEN  # full attention as far as it reaches


def test_cards_say_what_to_set_and_what_it_costs(checkpoint, tmp_path):
    cost = StaticCost(20.0, 21.5, 8, 15, "some text")
    expected = {
        ExportVariant.dual: (
            "An engine set to the long window reads",
            "| SGLang | no: one long request moves the whole running batch",
            "| vLLM | one window, chosen at load | `--max-model-len` up to 16 (its default)",
            "**No context is as small as 16 tokens: `model.gguf` is always read with the rescaled",
        ),
        ExportVariant.long_only: (
            "This variant reads short texts",
            "| vLLM | yes | `--max-model-len 64` (its default is 16) | tested: 0.32.0 on a CPU |",
            "| SGLang | yes, but for one position: below | `--context-length 64` | by its",
            "rotates the token at position 16 as that at position 0",
            "without `-c` it is the whole window, 64. This file holds one RoPE",
        ),
        ExportVariant.short_only: (
            "Nothing inside 16 tokens",
            "| transformers 4.57 and later | yes | texts of at most L0 tokens; it goes on beyond",
            "Its server cuts it to 16 and refuses longer texts (tested)",
        ),
    }
    for variant, parts in expected.items():
        write_hugging_face_folder(
            checkpoint, factors_with(), tmp_path / variant.value, torch.float32, variant, cost
        )
        card = (tmp_path / variant.value / "README.md").read_text()
        assert all(part in card for part in parts) and "{" not in card
        measured = "perplexity 21.5 instead of\n20 with the original RoPE (+7.5 %)" in card
        assert measured == (variant is not ExportVariant.short_only)


def test_variants_share_their_weight_files(checkpoint, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_hugging_face_folder(checkpoint, factors_with(), first, torch.bfloat16)
    write_hugging_face_folder(
        checkpoint,
        factors_with(),
        second,
        torch.bfloat16,
        ExportVariant.long_only,
        weights_from=first,
    )
    assert (first / "model.safetensors").samefile(second / "model.safetensors")
    verify_export(
        checkpoint,
        variant_factors(factors_with(), ExportVariant.long_only),
        second,
        torch.bfloat16,
        LENGTHS,
    )


LOGITS_SCRIPT = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4.5"), transformers.__version__
folders, lengths, vocab_size = json.loads(sys.argv[1])
logits = {}
with torch.inference_mode():
    for folder in folders:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        except ValueError as error:
            logits[folder] = str(error)
            continue
        for length in lengths:
            generator = torch.Generator().manual_seed(length)
            tokens = torch.randint(vocab_size, (2, length), generator=generator)
            logits[f"{folder}:{length}"] = model(input_ids=tokens).logits
torch.save(logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    OLD_PYTHON not in os.environ, reason=f"{OLD_PYTHON} names no Python that has transformers 4.5x"
)
def test_transformers_4_computes_the_same(checkpoint, tmp_path):
    """All variants and a sliding-window model, in another environment's transformers."""
    cases = {f"llama{n}": (checkpoint, *case) for n, case in enumerate(CASES)}
    for name, (model_class, config_class, options) in SLIDING.items():
        source = sliding_checkpoint(tmp_path / name, model_class, config_class, **options)
        cases |= {
            f"{name}_{variant.value}": (source, variant, factors_with())
            for variant in ExportVariant
        }
    for name, (source, variant, factors) in cases.items():
        write_hugging_face_folder(source, factors, tmp_path / name, torch.float32, variant)
    request = json.dumps([[str(tmp_path / name) for name in cases], LENGTHS, VOCAB_SIZE])
    python, result = Path(os.environ[OLD_PYTHON]), tmp_path / "logits.pt"
    subprocess.run([python, "-c", LOGITS_SCRIPT, request, result], check=True, timeout=600)
    found = torch.load(result)
    refused = {Path(folder).name for folder, message in found.items() if isinstance(message, str)}
    assert refused == {"phi3_dual", "phi3_long_only"}  # as their cards say
    for name in cases.keys() - refused:
        source, variant, factors = cases[name]
        for length in LENGTHS:
            if variant is not ExportVariant.short_only or length <= ORIGINAL_LEN:
                expected = our_logits(source, factors, length, window_read(variant, length))
                assert (found[f"{tmp_path / name}:{length}"] - expected).abs().max() < 1e-4, (
                    name,
                    length,
                )
    assert "transformers before 5 | no:" in (tmp_path / "phi3_dual" / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_an_exported_folder_is_read_as_the_model_before_its_export(tmp_path, name, monkeypatch):
    """Sliding window, RoPE and names of code files are put back; architecture and weights equal."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model_class, config_class, options = SLIDING.get(name, (LlamaForCausalLM, LlamaConfig, {}))
    base = sliding_checkpoint(tmp_path / name, model_class, config_class, **options)
    config = json.loads((base / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (base / "config.json").write_text(json.dumps({**config, **code}))
    (base / "tokenizer.json").write_text("{}")
    exported = tmp_path / "export"
    write_hugging_face_folder(base, factors_with(), exported, torch.float32)
    opened = before_export(exported, base)
    assert model_identity(opened) == model_identity(base) and opened != exported
    assert weights_sha256(opened) == weights_sha256(exported)
    found = our_logits(opened, factors_with(), TARGET_LEN, Window.LONG)
    assert torch.equal(found, our_logits(base, factors_with(), TARGET_LEN, Window.LONG))


def test_what_an_export_changes_in_a_config_is_known_where_it_is_put_back():
    base = {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 2, "head_dim": None}
    base |= {"auto_map": {}, "sliding_window": 16, "rope_theta": 50_000.0}
    for variant in ExportVariant:
        exported = merged_config(base, factors_with(), torch.float32, variant)
        changed = {key for key in base | exported if base.get(key) != exported.get(key)}
        assert changed - {"dtype", "torch_dtype"} <= set(CHANGED_KEYS)


def test_weights_that_a_folder_holds_once_more_are_not_exported(checkpoint, tmp_path):
    """Mistral's hub folders: shards with an index, and all of it again in one file."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(base, max_shard_size="60KB")
    shards = {path.name for path in base.glob("*.safetensors")}
    save_file({"other.weight": torch.zeros(2)}, base / "consolidated.safetensors")
    write_hugging_face_folder(base, factors_with(), tmp_path / "export", torch.float32)
    assert {path.name for path in (tmp_path / "export").glob("*.safetensors")} == shards
    assert len(shards) > 1
    lengths = (ORIGINAL_LEN, ORIGINAL_LEN + 1)
    verify_export(base, factors_with(), tmp_path / "export", torch.float32, lengths)


@pytest.mark.parametrize(
    ("original_len", "parts"),
    [
        (128, ("**No context is as small as 128 tokens", "Take the `short_only` variant's")),
        (2000, ("Up to 1,792: the original RoPE; above", "texts of 1,793 to 2,000 tokens need a")),
        (8192, ("Up to 8,192: the original RoPE; above: the rescaled one, for short texts too; ",)),
    ],
)
def test_the_context_by_which_llama_cpp_chooses(original_len, parts):
    note = llama_cpp_note(ExportVariant.dual, original_len, 131_072)
    assert all(part in note for part in parts)
    assert ("is no multiple of 256" in note) == (original_len == 2000)
    assert "without `-c` it is the whole window, 131,072" in note


def test_cards_of_classes_that_gguf_does_not_take(tmp_path):
    model_class, config_class, options = SLIDING["qwen2"]
    checkpoint = sliding_checkpoint(tmp_path / "qwen2", model_class, config_class, **options)
    write_hugging_face_folder(checkpoint, factors_with(), tmp_path / "export", torch.float32)
    card = (tmp_path / "export" / "README.md").read_text()
    only = "`export.gguf=true` writes llama and mistral classes only | not tried |"
    assert f"| llama.cpp | not known | {only}" in card and "`-np`" not in card
