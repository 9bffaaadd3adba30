"""Factors without a training on the miniature: exported, read by others, generated and evaluated.

The reference is plain transformers on the base model with its rotary table overwritten by hand.
"""

import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope2.export.verification import LOGIT_TOLERANCE
from longrope2.files.artifacts import (
    Manifest,
    hashes_of,
    read_manifest,
    sha256_of_file,
    write_manifest,
)
from longrope2.files.folder_hashes import CACHE_VARIABLE
from longrope2.model.folder import model_identity
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import RopeMethod, closed_form_factors

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parent.parent.parent / "models" / "tiny"
GEOMETRY = rope_geometry(MODEL, 128)
LLAMA3 = closed_form_factors(RopeMethod.llama3, GEOMETRY, 2048)
SCALED = RescaleFactors(
    tuple(16.0 ** (i / 15) for i in range(16)), GEOMETRY, 2048, "longrope2", critical_index=9,
    long_attention_scale=1.28, provenance={"source": "a test", "verdict": "9 of 9\n needles"},
)  # fmt: skip
UNTRAINED = ("export", "export.trained=false", "export.cost_windows=0")
SMALL = (
    "evaluation.lengths=[128,256]", "evaluation.needle.depths=[0,1]",
    "evaluation.needle.samples_per_depth=2", "evaluation.perplexity.num_windows=2",
    "evaluation.retention.num_windows=3", "tracking.wandb=disabled", "corpus=sample",
)  # fmt: skip


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run ``python -m launch.<verb> ...`` in this process; returns exit code, output, errors."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def run(verb, *arguments):
        places = ("model=tiny", "target_len=2048", f"run.root={tmp_path}", "run.name=r")
        monkeypatch.setattr(sys, "argv", [verb, *places, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_module(f"launch.{verb}", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def exports(tmp_path):
    return tmp_path / "r" / "5_exports"


@pytest.fixture
def scaled_file(tmp_path):
    """``rope=from_file`` of factors that change the attention scale beyond 128 tokens."""
    path = tmp_path / "scaled.json"
    path.write_text(SCALED.to_json())
    return ("rope=from_file", f"rope.factors={path}")


def tokens(length):
    return torch.randint(3, 500, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def logits_of(folder, length):
    """Plain transformers, which finds the window by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=tokens(length)).logits


@torch.inference_mode()
def reference_logits(factors, length, window):
    """The base model with lambda_i and the attention scale of a window put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.tensor(factors.window_factors(window))
    rotary.attention_scaling = factors.attention_scale(window)
    return model(input_ids=tokens(length)).logits


@torch.inference_mode()
def our_logits(factors, length, window):
    return load_windowed_model(MODEL, factors).eval().logits(tokens(length), window)


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_both_windows_without_a_training(command, exports):
    """Short prompts are the base model's, long ones the base model's with the closed form."""
    code, out, err = command(*UNTRAINED, "rope=llama3")
    assert code == 0, err
    assert "base model models/tiny: window 128 -> 2048, not trained for it" in out
    folder = exports / "untrained" / "hugging_face"
    assert f"export in {folder}" in out and not (exports / "manifest.json").exists()
    for length in (100, 128, 129, 600):
        window, other = Window.SHORT, Window.LONG
        if length > 128:
            window, other = other, window
        found = logits_of(folder, length)
        assert difference(found, our_logits(LLAMA3, length, window)) <= LOGIT_TOLERANCE
        assert difference(found, reference_logits(LLAMA3, length, window)) <= LOGIT_TOLERANCE
        assert difference(found, reference_logits(LLAMA3, length, other)) > 100 * LOGIT_TOLERANCE
    assert torch.equal(logits_of(folder, 128), logits_of(MODEL, 128))
    card = (folder / "README.md").read_text()
    for part in (
        "window extended from 128 to 2,048 tokens, without training\n",
        "**This model was not trained at 2,048 tokens, nor with the factors below.**",
        "`rope=llama3`: a closed form, which no search or training has fitted to this model.",
        "the pre-trained model's with these factors on either side",
        "That mixes the two RoPEs.",
    ):
        assert part in card
    assert "mixed windows" not in card and "trained model's" not in card.replace("pre-trained", "")


def test_an_attention_scale_of_the_long_window_is_carried_exactly(command, exports, scaled_file):
    gguf_too = ("export.variants=[long_only,short_only]", "export.gguf=true")
    code, out, err = command(*UNTRAINED, *scaled_file, *gguf_too)
    assert code == 0, err
    assert "\nfactors    9 of 9 needles\n" in out
    for name, window, scale in (("long", Window.LONG, 1.28), ("short", Window.SHORT, 1.0)):
        folder = exports / "untrained" / f"hugging_face_{name}_only"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert model.model.rotary_emb.attention_scaling == scale
        for length in (100, 600) if window is Window.LONG else (100, 128):
            found = logits_of(folder, length)
            assert difference(found, our_logits(SCALED, length, window)) <= LOGIT_TOLERANCE
            assert difference(found, reference_logits(SCALED, length, window)) <= LOGIT_TOLERANCE
        fields = gguf.GGUFReader(folder / "model.gguf").fields
        found_scale = fields["llama.rope.scaling.attn_factor"].contents()
        assert found_scale == float(np.float32(scale))
        card = (folder / "README.md").read_text()
        assert "`rope=from_file`: read from the file `scaled.json`." in card
        assert "\n- source: a test\n- verdict: 9 of 9 needles\n" in card
        assert "not trained at 2,048 tokens" in card and f"| attention factor | {scale:g} |" in card
    config = json.loads((exports / "untrained/hugging_face_long_only/config.json").read_text())
    for layout in (config["rope_scaling"], config["rope_parameters"]):
        assert layout["attention_factor"] == layout["long_mscale"] == 1.28
    manifest = read_manifest(exports / "untrained", "exports")
    assert manifest.details["trained"] is False
    assert manifest.details["factors"] == {
        "method": "longrope2",
        "attention_scales": {"short": 1.0, "long": 1.28},
        "provenance": SCALED.provenance,
    }
    assert manifest.inputs["factors"]["sha256"] == sha256_of_file(
        Path(scaled_file[1].removeprefix("rope.factors="))
    )
    model = manifest.inputs["model"]
    assert {key: model[key] for key in model_identity(MODEL)} == model_identity(MODEL)


def test_one_folder_cannot_hold_two_attention_scales(command, exports, scaled_file):
    """A transformers model has one attention_scaling: 1.28 would change the short window too."""
    code, _, err = command(*UNTRAINED, *scaled_file)
    assert code == 2 and "attention scale is 1.0 in the short window and 1.28 in the long" in err
    assert "Set export.variants=[long_only,short_only]" in err
    assert not exports.exists()


def test_a_former_export_is_known_by_model_and_factors(command, exports, scaled_file, tmp_path):
    variant = (*scaled_file, "export.variants=[long_only]")
    assert command(*UNTRAINED, *variant)[0] == 0
    assert "already complete" in command(*UNTRAINED, *variant)[1]
    (tmp_path / "scaled.json").write_text(LLAMA3.to_json())
    code, out, _ = command(*UNTRAINED, *variant)
    assert code == 0 and "verified" in out
    found = RescaleFactors.from_json(
        (exports / "untrained" / "hugging_face_long_only" / "factors.json").read_text()
    )
    assert found == LLAMA3.in_both_windows()
    code, _, err = command(*UNTRAINED, "rope=pi")
    assert code == 2 and "rope.method was from_file, now it is pi" in err
    assert f"remove {exports / 'untrained'} to make it again" in err


def test_a_trained_export_and_an_untrained_one_stand_side_by_side(command, exports, tmp_path):
    final = tmp_path / "r" / "3_checkpoints" / "final"
    shutil.copytree(MODEL, final)
    (final / "factors.json").write_text(SCALED.in_both_windows().to_json())
    write_manifest(final, Manifest("checkpoint", files=hashes_of(final)))
    assert command("export", "export.cost_windows=0")[0] == 0
    assert command(*UNTRAINED, "rope=pi")[0] == 0
    trained, untrained = exports, exports / "untrained"
    assert read_manifest(trained, "exports").details["trained"] is True
    assert read_manifest(untrained, "exports").details["trained"] is False
    assert "not trained" not in (trained / "hugging_face" / "README.md").read_text()
    for verb in (("export", "export.cost_windows=0"), (*UNTRAINED, "rope=pi")):
        assert "already complete" in command(*verb)[1]
    # A manifest from before the key was there is of a trained model.
    manifest = json.loads((trained / "manifest.json").read_text())
    del manifest["config"]["export"]["trained"], manifest["config"]["rope"], manifest["sha256"]
    (trained / "manifest.json").write_text(json.dumps(manifest))
    assert "already complete" in command("export", "export.cost_windows=0")[1]


def test_the_run_s_own_search_is_the_default(command, exports, tmp_path):
    code, _, err = command(*UNTRAINED)
    assert code == 2 and "2_factors/factors.json does not exist; run launch.search first" in err
    folder = tmp_path / "r" / "2_factors"
    folder.mkdir(parents=True)
    (folder / "factors.json").write_text(SCALED.to_json())
    other = {"architecture_sha256": "0", "tokenizer_sha256": "0"}
    write_manifest(folder, Manifest("factors", inputs={"model": other}))
    code, _, err = command(*UNTRAINED)
    assert code == 2 and "factors.json belongs to another model than model.path=" in err
    write_manifest(folder, Manifest("factors", inputs={"model": model_identity(MODEL)}))
    code, _, err = command(*UNTRAINED, "export.variants=[long_only]")
    assert code == 0, err
    card = (exports / "untrained" / "hugging_face_long_only" / "README.md").read_text()
    assert "`rope=searched`: searched for this model, without training it." in card


def test_it_generates_and_is_evaluated_as_the_factors_on_the_base_model(command, exports, tmp_path):
    """Read back by our own commands: the same text, the same losses, and not called trained."""
    assert command(*UNTRAINED, "rope=llama3")[0] == 0
    folder = exports / "untrained" / "hugging_face"
    prompt = tmp_path / "prompt.txt"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("Words of a text without end, and ", add_special_tokens=False).input_ids
    prompt.write_text(tokenizer.decode(ids * 13))
    asked = (f"generate.prompt_file={prompt}", "generate.max_new_tokens=40")
    asked = (*asked, "generate.temperature=1.5", "seed=1")  # the likeliest token ends it at once
    code, _, err = command("generate", *asked)
    assert code == 2 and "3_checkpoints/final does not exist; run launch.train first" in err
    final = tmp_path / "r" / "3_checkpoints" / "final"
    shutil.copytree(MODEL, final)
    (final / "factors.json").write_text(LLAMA3.to_json())
    write_manifest(final, Manifest("checkpoint", files=hashes_of(final)))
    code, found, said = command("generate", *asked, f"generate.checkpoint={folder}")
    assert code == 0 and "more than 128: rescaled RoPE from the start" in said
    again_code, again, said_again = command("generate", *asked)
    assert (code, found) == (again_code, again) and found.strip()
    *lines, summary = said.splitlines()
    *lines_again, summary_again = said_again.splitlines()
    # The last line tells how fast it was.
    without_speed = re.compile(r"[\d.]+ (s|tokens/s)\b")
    assert lines == lines_again
    assert without_speed.sub("", summary) == without_speed.sub("", summary_again)
    assert summary.endswith(" of 2048 tokens, rescaled RoPE at the end]")
    subjects = (
        "evaluation.subjects=[{name: base, rope: {method: none}},{name: form, rope: {method: "
        f"llama3}}}},{{name: read, checkpoint: {folder}}},{{name: final, checkpoint: {final}}}]"
    )
    code, out, err = command("evaluate", subjects, *SMALL)
    assert code == 0, err
    assert "subject    read: llama3\n" in out and "subject    final: llama3, trained" in out
    summary = json.loads((tmp_path / "r" / "4_evaluations" / "evaluations.json").read_text())
    perplexity = {
        (row["subject"], row["length"]): row["perplexity"] for row in summary["perplexity"]
    }
    for length in (128, 256):
        assert perplexity["read", length] == perplexity["form", length]
    assert perplexity["read", 128] == perplexity["base", 128]
    assert perplexity["read", 256] != perplexity["base", 256]
    by_name = {subject["name"]: subject for subject in summary["subjects"]}
    assert by_name["read"]["trained"] is False and by_name["final"]["trained"] is True
    assert by_name["read"]["source"]["checkpoint"] == {
        "path": str(folder),
        "sha256": sha256_of_file(exports / "untrained" / "manifest.json"),
    }


def test_an_export_for_other_lengths_or_of_another_model_is_refused(command, exports, tmp_path):
    assert command(*UNTRAINED, "rope=llama3", "export.variants=[dual,short_only]")[0] == 0
    (tmp_path / "prompt.txt").write_text("text")
    asked = ("generate", f"generate.prompt_file={tmp_path / 'prompt.txt'}", "dry_run=true")
    variants = {name: exports / "untrained" / name for name in ("hugging_face", "elsewhere")}
    variants["short"] = exports / "untrained" / "hugging_face_short_only"
    code, _, err = command(*asked, f"generate.checkpoint={variants['short']}")
    assert code == 2 and "is for target_len=128, but target_len=2048 is set" in err
    shutil.copytree(variants["hugging_face"], variants["elsewhere"])
    code, _, err = command(*asked, f"generate.checkpoint={variants['elsewhere']}")
    assert code == 2 and "holds no finished checkpoint" in err
    other = variants["hugging_face"] / "tokenizer.json"
    other.write_text("{}")
    code, _, err = command(*asked, f"generate.checkpoint={variants['hugging_face']}")
    assert code == 2 and f"{other} is not as it was written" in err
    made = read_manifest(exports / "untrained", "exports")
    files = {**made.files, "hugging_face/tokenizer.json": sha256_of_file(other)}
    write_manifest(exports / "untrained", replace(made, files=files))
    code, _, err = command(*asked, f"generate.checkpoint={variants['hugging_face']}")
    assert code == 2 and "belongs to another model than model.path=" in err
    assert "(other tokenizer)" in err
