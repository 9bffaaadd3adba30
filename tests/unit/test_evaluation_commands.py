"""The commands evaluate, export, generate and report, as ``python -m`` runs them.

The model is the miniature's architecture with random weights and its own tokenizer: what is tested
is not its quality.
"""

import io
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longrope2.evaluation import subjects
from longrope2.files.artifacts import (
    Manifest,
    hashes_of,
    product_folder,
    read_manifest,
    sha256_of_file,
    write_manifest,
)
from longrope2.files.lease import only_writer
from longrope2.model.loading import rope_geometry
from longrope2.rope.hf_config import from_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.needle_set import NeedleSet

MINIATURE = Path(__file__).parent.parent.parent / "models" / "tiny"
SUBJECTS = (
    "evaluation.subjects=[{name: base, rope: {method: none}}, {name: ntk, rope: {method: ntk}}]"
)
SMALL = (
    "evaluation.lengths=[128,256]", "evaluation.needle.depths=[0,1]",
    "evaluation.needle.samples_per_depth=2", "evaluation.perplexity.num_windows=2",
    "evaluation.retention.num_windows=3", "tracking.wandb=disabled", "corpus=sample",
)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MINIATURE))
    save_file(
        {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"},
        folder / "model.safetensors",
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINIATURE / name, folder)
    return folder


@pytest.fixture
def command(tmp_path, model_folder, monkeypatch, capsys):
    """Run ``python -m launch.<verb> ...`` in this process; returns exit code, output, errors."""

    def run(verb, *arguments):
        model = ("model=tiny", f"model.path={model_folder}", "model.name=tiny", "target_len=2048")
        places = (*model, f"run.root={tmp_path}", "run.name=r")
        given = arguments if verb == "report" else (*places, *arguments)
        monkeypatch.setattr(sys, "argv", [verb, *given])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_module(f"launch.{verb}", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("verb", ["export", "generate"])
def test_model_and_target_have_no_default(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [verb, "run.name=r"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"launch.{verb}", run_name="__main__")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "model is not chosen; give model=NAME, one of " in err
    assert "target_len is not set; give it as target_len=VALUE" in err


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "r"


@pytest.fixture
def make_checkpoint(model_folder):
    def make(folder, method=RopeMethod.ntk, target_len=2048, **config):
        shutil.copytree(model_folder, folder)
        factors = closed_form_factors(method, rope_geometry(model_folder, 128), target_len)
        (folder / "factors.json").write_text(factors.to_json())
        write_manifest(folder, Manifest("checkpoint", config=config, files=hashes_of(folder)))
        return folder

    return make


@pytest.fixture
def checkpoint(run_folder, make_checkpoint):
    return make_checkpoint(run_folder / "3_checkpoints" / "final")


def tree(folder):
    """Every file below a folder with its hash."""
    return {
        str(p.relative_to(folder)): sha256_of_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_evaluate_writes_its_product_and_measures_nothing_twice(command, run_folder, monkeypatch):
    code, out, _ = command("evaluate", SUBJECTS, *SMALL, "dry_run=true")
    assert code == 0 and "lengths    128, 256" in out and "subject    ntk: ntk" in out
    assert not run_folder.exists()
    code, out, err = command("evaluate", SUBJECTS, *SMALL)
    assert code == 0, err
    assert "Text: held out of corpus sample; the run has no segments." in " ".join(out.split())
    folder = product_folder(run_folder, "evaluations")
    text = {"corpus": "sample", "own": None, "is_other": False}
    assert json.loads((folder / "evaluations.json").read_text())["text"] == text
    details = read_manifest(folder, "evaluations").details
    assert details["text"] == text and len(details["text_hashes"]) > 10
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    expected = [
        (s, suite, n)
        for s in ("base", "ntk")
        for suite in ("needle", "perplexity")
        for n in (128, 256)
    ]
    expected += [("base", "retention", 128), ("ntk", "retention", 128)]
    assert sorted((line["subject"], line["suite"], line["length"]) for line in lines) == sorted(
        expected
    )
    summary = json.loads((folder / "evaluations.json").read_text())
    assert [row["num_samples"] for row in summary["needle"]] == [4] * 4
    assert [row["ratio"] for row in summary["retention"]] == [1.0, 1.0]
    for row in summary["perplexity"]:
        assert f"{row['perplexity']:.4g}" in out or row["length"] == 128
    manifest = read_manifest(folder, "evaluations")
    assert manifest.seeds == {"seed": 0, "needle": 7001} and set(manifest.inputs["subjects"]) == {
        "base",
        "ntk",
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = {f"eval/needle_accuracy/{s}/{n}" for s in ("base", "ntk") for n in (128, 256)}
    assert accuracies <= {key for record in metrics for key in record}
    needles = NeedleSet.load(folder / "needles" / "256.arrow")
    assert needles.length == 256 and needles.samples[0].record["wording"] == "short"
    before = {name: value for name, value in tree(folder).items() if name != "metrics.jsonl"}
    monkeypatch.setattr(subjects, "load_windowed_model", None)  # a second measurement would call it
    assert command("evaluate", SUBJECTS, *SMALL)[0] == 0
    assert {
        name: value for name, value in tree(folder).items() if name != "metrics.jsonl"
    } == before


def test_needles_that_share_a_haystack_are_measured_haystack_by_haystack(command, run_folder):
    """Beyond batch_tokens a line is one haystack or window; a cut run measures the rest alone."""
    one = ("evaluation.subjects=[{name: base, rope: {method: none}}]", *SMALL)
    one = (*one, "evaluation.needle.needles_per_haystack=2", "evaluation.needle.haystack=noise")
    one = (*one, "evaluation.batch_tokens=128")
    out = command("evaluate", *one, "dry_run=true")[1]
    assert "4 samples per length at depths 0.0, 1.0, short wording, in noise, 2 a haystack" in out
    assert command("evaluate", *one)[0] == 0
    path = product_folder(run_folder, "evaluations") / "results.jsonl"
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    found = [(line["suite"], line["length"], len(line["values"]["nll"])) for line in lines]
    assert found == [
        ("needle", 128, 4), ("needle", 256, 2), ("needle", 256, 2),
        ("perplexity", 128, 2), ("perplexity", 256, 1), ("perplexity", 256, 1),
        ("retention", 128, found[-1][2]),
    ]  # fmt: skip
    summary = (path.parent / "evaluations.json").read_text()
    row = json.loads(summary)["needle"][1]
    assert (row["length"], row["num_samples"]) == (256, 4)
    metrics = [json.loads(x) for x in (path.parent / "metrics.jsonl").read_text().splitlines()]
    accuracies = [m[k] for m in metrics for k in m if k == "eval/needle_accuracy/base/256"]
    assert accuracies == [row["accuracy"]]
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert command("evaluate", *one)[0] == 0
    assert path.read_text() == whole
    assert (path.parent / "evaluations.json").read_text() == summary


def test_needles_are_asked_for_in_the_wording_that_is_set(command, run_folder):
    """By default a window of 128 tokens gets the short one."""
    one = ("evaluation.subjects=[{name: base, rope: {method: none}}]", *SMALL)
    assert "depths 0.0, 1.0, short wording" in command("evaluate", *one, "dry_run=true")[1]
    one = (*one, "evaluation.lengths=[256]", "evaluation.needle.wording=paper")
    assert "depths 0.0, 1.0, paper wording" in command("evaluate", *one, "dry_run=true")[1]
    code, _, err = command("evaluate", *one)
    assert code == 0, err
    folder = product_folder(run_folder, "evaluations")
    (sample, *_) = NeedleSet.load(folder / "needles" / "256.arrow").samples
    assert str(sample.record["question"]).startswith("\nWhat is the special magic number for ")
    code, _, err = command("evaluate", *one[:-1], "evaluation.needle.wording=long")
    assert code == 2 and "auto, paper, short" in err


def test_needles_of_the_search_are_not_evaluated_on(command, run_folder):
    write_manifest(product_folder(run_folder, "factors"), Manifest("factors", seeds={"seed": 7001}))
    code, out, err = command("evaluate", SUBJECTS, *SMALL)
    assert (code, out) == (2, "")
    assert "evaluation.needle.seed=7001 is the seed of the needles that the factors in" in err
    assert not product_folder(run_folder, "evaluations").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluation=training_free",), r"rope.method=searched needs a factors file, but "),
        (
            ("evaluation=comparison",),
            "2_factors/factors.json does not exist; run launch.search first",
        ),
        ((SUBJECTS, "evaluation.needles=3"), "unknown key evaluation.needles"),
        (
            (SUBJECTS, "target_len=2000"),
            "target_len=2000 must be a multiple of model.original_len=128",
        ),
        (
            (
                SUBJECTS,
                "corpus=sample",
                "evaluation.lengths=[20,128]",
                "evaluation.perplexity.scored_tokens=8",
            ),
            "length=20 tokens is too short",
        ),
    ],
)
def test_bad_input_to_evaluate_is_one_message_and_writes_nothing(
    command, run_folder, arguments, message
):
    code, _, err = command("evaluate", *arguments)
    assert code == 2
    assert err.count("error: ") == 1 and message in err and "Traceback" not in err
    assert not run_folder.exists()


def test_factors_searched_on_another_model_stop_the_evaluation(command, run_folder, model_folder):
    folder = product_folder(run_folder, "factors")
    folder.mkdir(parents=True)
    factors = closed_form_factors(RopeMethod.pi, rope_geometry(model_folder, 128), 2048)
    (folder / "factors.json").write_text(factors.to_json())
    other = {"architecture_sha256": "0", "tokenizer_sha256": "0"}
    write_manifest(folder, Manifest("factors", inputs={"model": other}, seeds={"seed": 0}))
    code, _, err = command("evaluate", "evaluation=training_free", *SMALL)
    assert code == 2 and "factors.json belongs to another model than model.path=" in err
    assert "evaluation.subjects[5] (longrope2-searched)" in err
    assert not product_folder(run_folder, "evaluations").exists()


def test_export_is_verified_published_and_not_repeated(command, run_folder, checkpoint):
    assert command("export", "dry_run=true")[0] == 0
    folder = product_folder(run_folder, "exports")
    assert not folder.exists()
    code, out, err = command("export", "corpus=sample")
    assert code == 0, err
    assert "cost       of a static choice: on 8 texts held out of corpus sample" in out
    assert "verified   at 128 tokens" in out and "verified   at 129 tokens" in out
    manifest = read_manifest(folder, "exports")
    assert manifest.inputs["checkpoint"]["sha256"] == sha256_of_file(checkpoint / "manifest.json")
    assert manifest.details["dtype"] == "fp32"
    assert set(manifest.details["largest_relative_logit_difference"]["hugging_face"]) == {
        "128",
        "129",
    }
    cost = manifest.details["static_cost"]
    assert (
        cost["num_windows"] == 8
        and cost["max_tokens"] < 128
        and 1 < cost["short_perplexity"] < cost["long_perplexity"]
    )
    assert (
        f"perplexity {cost['long_perplexity']:.4g} instead of"
        in (folder / "hugging_face" / "README.md").read_text()
    )
    assert {name: sha256_of_file(folder / name) for name in manifest.files} == manifest.files
    config = json.loads((folder / "hugging_face" / "config.json").read_text())
    assert from_hf_config(config).factors[-1] > 100
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "hugging_face",
        "manifest.json",
    ]
    before = tree(folder)
    code, out, _ = command("export", "corpus=sample")
    assert (
        code == 0
        and f"already complete: {folder / 'hugging_face'}" in out
        and tree(folder) == before
    )
    # What is not as it was written is made again; a file beside is nobody's.
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"")):
        damage(folder / "hugging_face" / "model.safetensors")
        code, out, _ = command("export", "corpus=sample")
        assert code == 0 and "hugging_face/model.safetensors is " in out
        assert ": exported again" in out and "verified" in out
        found = tree(folder)
        assert {name: found[name] for name in manifest.files} == manifest.files
    # Without a corpus it is the same export; and one that replaces it keeps a measured cost.
    assert f"already complete: {folder / 'hugging_face'}" in command("export")[1]
    code, out, _ = command("export", "export.dtype=bf16")
    assert code == 0 and "verified" in out
    kept = "on 8 texts held out of corpus sample, as in the export that stands there; corpus=NAME"
    assert f"cost       of a static choice: {kept} names another" in out
    details = read_manifest(folder, "exports").details
    assert details["dtype"] == "bf16" and details["static_cost"] == cost
    assert (
        f"already complete: {folder / 'hugging_face'}" in command("export", "export.dtype=bf16")[1]
    )
    assert command("export", "export.cost_windows=0")[0] == 0
    assert read_manifest(folder, "exports").details["static_cost"] is None


def test_an_export_whose_measured_text_is_gone_is_not_replaced_by_one_without_a_cost(
    command, run_folder, checkpoint, tmp_path
):
    folder, gone = product_folder(run_folder, "exports"), tmp_path / "gone"
    corpus = {"name": "folder", "kind": "folder", "folder": str(gone)}
    write_manifest(
        folder, Manifest("exports", config={"corpus": corpus}, details={"static_cost": {}})
    )
    code, _, err = command("export")
    assert code == 2
    assert f"{folder} has a cost measured on the corpus that it was given: corpus.folder" in err
    assert f"={gone} is not a folder; give corpus=NAME, or export.cost_windows=0 for an " in err
    assert command("export", "export.cost_windows=0", "dry_run=true")[0] == 0


def test_export_writes_the_variants_asked_for_and_no_others(
    command, run_folder, tmp_path, make_checkpoint
):
    """YaRN, whose two attention scales only the variants with one window can say."""
    yarn = f"export.checkpoint={make_checkpoint(tmp_path / 'yarn', RopeMethod.yarn)}"
    folder = product_folder(run_folder, "exports")
    both = "export.variants=[long_only,short_only]"
    code, out, err = command("export", yarn, both, "export.cost_windows=0")
    assert code == 0, err
    assert "verified   at 129 tokens: hugging_face_long_only" in out
    assert (
        "verified   at 128 tokens: hugging_face_short_only" in out
        and "129 tokens: hugging_face_short" not in out
    )
    manifest = read_manifest(folder, "exports")
    assert {name: sha256_of_file(folder / name) for name in manifest.files} == manifest.files
    assert manifest.details["static_cost"] is None
    assert (
        "was not measured for this model"
        in (folder / "hugging_face_long_only" / "README.md").read_text()
    )
    assert "already complete" in command("export", yarn, both, "export.cost_windows=0")[1]
    gguf = ("export.variants=[long_only]", "export.cost_windows=0", "export.gguf=true")
    code, _, err = command("export", yarn, *gguf, "export.gguf_pretokenizer=smollm")
    assert code == 2 and "gguf_pretokenizer=smollm is for byte-level BPE tokenizers" in err
    code, out, err = command("export", yarn, *gguf)
    assert code == 0, err
    assert "hugging_face_short_only, which export.variants no longer names" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "hugging_face_long_only",
        "manifest.json",
    ]
    assert "hugging_face_long_only/model.gguf" in read_manifest(folder, "exports").files


def test_export_refuses_bad_settings_together(command):
    code, _, err = command("export", "export.variants=[dual,dual]", "export.cost_windows=-1")
    assert code == 2 and "3 fault(s)" in err and "export.cost_windows=-1 must be 0 or more" in err
    assert (
        "export.variants=['dual', 'dual'] must name one or more of dual, long_only, short_only, "
        "each once" in err
    )


def test_an_export_that_does_not_verify_leaves_nothing(
    command, run_folder, checkpoint, monkeypatch
):
    from longrope2.export import hugging_face

    def wrong(*arguments):
        config = original(*arguments)
        config["rope_scaling"]["attention_factor"] = config["rope_parameters"][
            "attention_factor"
        ] = 1.1
        return config

    original = hugging_face.merged_config
    monkeypatch.setattr(hugging_face, "merged_config", wrong)
    code, _, err = command("export")
    assert code == 2 and "at 128 tokens plain transformers gives logits that differ" in err
    assert sorted(p.name for p in product_folder(run_folder, "exports").iterdir()) == [
        "config.yaml"
    ]


def test_what_cannot_be_exported_is_refused(command, run_folder, tmp_path, make_checkpoint):
    code, _, err = command("export")
    assert code == 2 and "3_checkpoints/final does not exist; run launch.train first" in err
    yarn = make_checkpoint(tmp_path / "yarn", RopeMethod.yarn)
    code, _, err = command("export", f"export.checkpoint={yarn}")
    assert (
        code == 2
        and "a Hugging Face longrope config holds a single attention_factor for both" in err
    )
    longer = make_checkpoint(tmp_path / "longer", target_len=4096)
    code, _, err = command("export", f"export.checkpoint={longer}")
    assert (
        code == 2
        and "is for target_len=4096, but target_len=2048 is set; set target_len=4096" in err
    )
    other = make_checkpoint(tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    made = read_manifest(other, "checkpoint")
    write_manifest(other, replace(made, files=hashes_of(other)))
    code, _, err = command("export", f"export.checkpoint={other}")
    assert (
        code == 2
        and f"export.checkpoint={other} belongs to another model" in err
        and "(other tokenizer)" in err
    )
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("verb", "arguments", "product"),
    [
        ("evaluate", (SUBJECTS, *SMALL), "4_evaluations"),
        ("evaluate", (SUBJECTS, *SMALL, "evaluation.shard=2/4"), "4_evaluations.2_of_4"),
        ("export", (), "5_exports"),
    ],
)
def test_a_product_that_is_being_written(command, run_folder, checkpoint, verb, arguments, product):
    """A shard has a lease of its own: the others may run at the same time."""
    with only_writer(run_folder, product):
        code, _, errors = command(verb, *arguments)
    assert code == 2 and f"{run_folder / product} is being written by" in errors
    assert not (run_folder / "4_evaluations").exists()
    assert not (run_folder / "5_exports").exists()


@pytest.fixture
def prompt(tmp_path):
    def write(text):
        path = tmp_path / "prompt.txt"
        path.write_text(text, encoding="utf-8")
        return f"generate.prompt_file={path}"

    return write


def test_generate_streams_text_and_says_once_where_it_switched(command, checkpoint, prompt):
    """Sampled almost uniformly, so that no end-of-text token ends the text before token 128."""
    text = prompt("def read(path):\n" * 12)
    options = ("generate.max_new_tokens=70", "generate.temperature=50", "seed=1")
    code, out, err = command("generate", text, *options)
    assert code == 0 and len(out) > 70
    assert (
        err.count("switched to the rescaled RoPE at 129 tokens: the whole text was read again") == 1
    )
    assert "from the start" not in err
    assert command("generate", text, *options)[1] == out


def test_generate_says_that_a_long_prompt_is_long_from_the_start(command, checkpoint, prompt):
    code, _, err = command(
        "generate", prompt("def read(path):\n" * 40), "generate.max_new_tokens=4"
    )
    assert code == 0
    assert "tokens, more than 128: rescaled RoPE from the start" in err and "switched" not in err


def test_generate_refuses_what_it_cannot_use(command, tmp_path, prompt):
    good = prompt("text")
    code, _, err = command("generate", good)
    assert code == 2 and "3_checkpoints/final does not exist; run launch.train first" in err
    faulty = ("generate.max_new_tokens=0", "generate.temperature=-1", "generate.prefill_chunk=0")
    code, _, err = command("generate", good, *faulty)
    assert (
        code == 2
        and "4 fault(s)" in err
        and "generate.prefill_chunk=0 must be at least 1, or null" in err
    )
    assert "generate.max_new_tokens=0 must be at least 1" in err
    assert "generate.temperature=-1.0 must be 0 or more" in err
    code, _, err = command("generate", "generate.prompt_file=/nowhere.txt")
    assert code == 2 and "generate.prompt_file=/nowhere.txt cannot be read: No such file" in err
    code, _, err = command("generate", prompt(""))
    assert code == 2 and "is empty; write the text to continue into it" in err
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    code, _, err = command("generate", f"generate.prompt_file={tmp_path / 'latin1.txt'}")
    assert code == 2 and "is not UTF-8 text" in err
    code, _, err = command("generate")
    assert (
        code == 2
        and "generate.prompt_file is not set; give it as generate.prompt_file=VALUE" in err
    )


def test_generate_reads_standard_input_like_a_file(command, checkpoint, prompt, monkeypatch):
    text = "def read(path):\n" * 12
    options = ("generate.max_new_tokens=20", "generate.prefill_chunk=7")

    def generated(prompt_file: str) -> tuple[int, str, str]:
        code, out, err = command("generate", prompt_file, *options)
        return code, out, re.sub(r"\d+\.\d+ (s|tokens/s)\b", r"TIME \1", err)

    from_file = generated(prompt(text))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert generated("generate.prompt_file=-") == from_file and "TIME tokens/s" in from_file[2]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xe9")))
    code, _, err = command("generate", "generate.prompt_file=-")
    assert code == 2 and "generate.prompt_file=- (standard input) is not UTF-8 text" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    code, _, err = command("generate", "generate.prompt_file=-")
    assert code == 2 and "generate.prompt_file=- (standard input) is empty" in err


def test_generate_names_the_inexact_policy(command, checkpoint, prompt):
    options = (
        "generate.max_new_tokens=70",
        "generate.temperature=50",
        "generate.kv_policy=rerotate",
        "seed=1",
    )
    code, _, err = command("generate", prompt("def read(path):\n" * 12), *options)
    assert code == 0 and "at 129 tokens: the cached keys were turned, which is not exact" in err


def test_generate_refuses_a_prompt_beyond_the_target(command, checkpoint, prompt):
    code, _, err = command("generate", prompt("def read(path):\n" * 700))
    assert code == 2 and "exceed the extended window of 2048 tokens; shorten the prompt" in err


def test_report_takes_the_run_folder(command, run_folder, checkpoint):
    code, out, _ = command("report", str(run_folder))
    assert (code, out) == (0, f"report: {run_folder / 'report.html'}\n")
    code, _, err = command("report", str(run_folder / "nothing"))
    assert code == 2 and "nothing does not exist" in err


@pytest.mark.parametrize("stage", ["evaluate", "generate"])
def test_a_checkpoint_trained_with_other_document_starts_stops(
    command, make_checkpoint, tmp_path, stage
):
    made = make_checkpoint(tmp_path / "other", model={"document_start": "none"})
    (tmp_path / "prompt.txt").write_text("import os")
    given = ["generate.prompt_file=" + str(tmp_path / "prompt.txt"), f"generate.checkpoint={made}"]
    words = [f"checkpoint={made}", "corpus=sample"] if stage == "evaluate" else given
    code, _, error = command(stage, *words)
    assert code == 2
    assert "was made with model.document_start=none, but model.document_start=auto" in error
