"""Subjects, configuration faults and the measuring loop, on small models on disk."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope2.config import ModelConfig, RunConfig
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.errors import ArtifactError, ConfigError, DataError
from longrope2.evaluation import scoring
from longrope2.evaluation.config import (
    EvaluateRoot,
    EvaluationConfig,
    SubjectConfig,
    check,
    evaluated_lengths,
)
from longrope2.evaluation.results import ResultsLog
from longrope2.evaluation.scoring import measure_all, perplexity_measures
from longrope2.evaluation.subjects import SubjectModels, resolve_subjects
from longrope2.files.artifacts import Manifest, hashes_of, product_folder, write_manifest
from longrope2.model.factors_source import RopeConfig
from longrope2.model.folder import model_identity
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ORIGINAL_LEN, TARGET_LEN = 16, 64
GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN)


def save_model(folder, *, seed=0, hidden_size=32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=ORIGINAL_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_checkpoint(folder, factors, **options):
    save_model(folder, **options)
    (folder / "factors.json").write_text(factors.to_json())
    write_manifest(folder, Manifest("checkpoint", files=hashes_of(folder)))
    return folder


def searched_factors(target_len=TARGET_LEN, original_len=ORIGINAL_LEN):
    geometry = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=original_len)
    return RescaleFactors(
        tuple(1 + 0.5 * i for i in range(8)), geometry, target_len, "longrope2", critical_index=3
    )


@pytest.fixture
def base_folder(tmp_path):
    return save_model(tmp_path / "base")


@pytest.fixture
def make_config(tmp_path, base_folder):
    def make(*subjects, **settings):
        return EvaluateRoot(
            run=RunConfig(name="r", root=str(tmp_path / "runs")),
            model=ModelConfig(name="m", path=str(base_folder), original_len=ORIGINAL_LEN),
            target_len=TARGET_LEN,
            evaluation=EvaluationConfig(subjects=list(subjects), **settings),
            corpus=CorpusConfig(name="sample", kind=CorpusKind.sample),
        )

    return make


BASE = SubjectConfig("base", rope=RopeConfig(RopeMethod.none))
PI = SubjectConfig("pi", rope=RopeConfig(RopeMethod.pi))


def test_lengths_double_from_the_original_to_the_target(make_config):
    config = make_config(BASE)
    assert evaluated_lengths(config) == [16, 32, 64]
    config.target_len = 48
    assert evaluated_lengths(config) == [16, 32, 48]
    config.target_len = ORIGINAL_LEN
    assert evaluated_lengths(config) == [16]
    config.evaluation.lengths = [40, 20]
    assert evaluated_lengths(config) == [20, 40]


def test_all_faults_are_reported_together_with_their_keys(make_config):
    config = make_config(
        PI,
        SubjectConfig("pi", rope=RopeConfig(), checkpoint="x"),
        SubjectConfig("a/b"),
        lengths=[0, 16, 128],
    )
    config.evaluation.needle.depths = [0.5, 1.5]
    config.evaluation.needle.samples_per_depth = 0
    config.evaluation.needle.needles_per_haystack = 0
    config.evaluation.batch_tokens = -1
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.faults == (
        "evaluation.reference=base is not among the subjects: pi, pi, a/b",
        "evaluation.subjects[1].name=pi is used twice; give every subject its own name",
        "evaluation.subjects[1] (pi) has both rope and checkpoint; give exactly one of them",
        "evaluation.subjects[2].name='a/b' may hold letters, digits and _ . + - only",
        "evaluation.subjects[2] (a/b) has neither rope nor checkpoint; give exactly one of them",
        "evaluation.needle.samples_per_depth=0 must be at least 1",
        "evaluation.batch_tokens=-1 must be at least 1",
        "evaluation.needle.depths=[0.5, 1.5] must be distinct numbers from 0 to 1, at least one",
        "evaluation.needle.needles_per_haystack=0 must be at least 1 and divide the 0 samples of a "
        "length (evaluation.needle.depths times samples_per_depth)",
        "evaluation.lengths=[0, 16, 128] must be distinct lengths from 2 to target_len=64",
    )


def test_subjects_windows_and_scored_tokens_must_fit(make_config):
    config = make_config()
    config.target_len = 50
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.faults == (
        "evaluation.subjects is empty; list at least one {name, rope} or {name, checkpoint}",
        "target_len=50 must be a multiple of model.original_len=16, and not below it; "
        "use for example 48",
    )
    expected = r"scored_tokens=64 must be at least 2 below the shortest length evaluated, 16"
    with pytest.raises(ConfigError, match=expected):
        check(make_config(BASE))


def test_a_sound_configuration_gives_the_model_folder(make_config, base_folder):
    config = make_config(BASE)
    config.evaluation.perplexity.scored_tokens = 8
    with pytest.raises(DataError, match="holds no tokenizer that can be loaded"):
        check(config)
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "</s>": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.save_pretrained(base_folder)
    assert check(config) == base_folder


def test_subjects_carry_their_weights_and_factors(make_config, base_folder, tmp_path):
    config = make_config(
        BASE,
        PI,
        SubjectConfig("searched", rope=RopeConfig(RopeMethod.searched)),
        SubjectConfig(
            "file", rope=RopeConfig(RopeMethod.from_file, factors=str(tmp_path / "f.json"))
        ),
        SubjectConfig("trained", checkpoint=str(tmp_path / "trained")),
    )
    searched = product_folder(config.run.folder, "factors")
    searched.mkdir(parents=True)
    (searched / "factors.json").write_text(searched_factors().to_json())
    write_manifest(searched, Manifest("factors", inputs={"model": model_identity(base_folder)}))
    (tmp_path / "f.json").write_text(
        closed_form_factors(RopeMethod.ntk, GEOMETRY, TARGET_LEN).to_json()
    )
    save_checkpoint(tmp_path / "trained", searched_factors(), seed=1)
    found = resolve_subjects(config, base_folder)
    assert [(s.name, s.factors.method, s.trained) for s in found] == [
        ("base", "none", False),
        ("pi", "pi", False),
        ("searched", "longrope2", False),
        ("file", "ntk", False),
        ("trained", "longrope2", True),
    ]
    assert (
        len({s.weights_sha256 for s in found[:4]}) == 1
        and found[4].weights_sha256 != found[0].weights_sha256
    )
    assert found[2].factors == found[4].factors == searched_factors()
    assert found[4].folder == tmp_path / "trained"
    assert set(found[2].source) == {"factors"} and set(found[4].source) == {"checkpoint"}


def test_methods_without_a_factor_switch(make_config, base_folder):
    """As plain YaRN is served: its table and attention scale at every length."""
    static = SubjectConfig("yarn_static", rope=RopeConfig(RopeMethod.yarn, both_windows=True))
    _, found = resolve_subjects(make_config(BASE, static), base_folder)
    yarn = closed_form_factors(RopeMethod.yarn, GEOMETRY, TARGET_LEN)
    assert found.factors.short_factors == found.factors.factors == yarn.factors
    assert found.factors.short_attention_scale == yarn.long_attention_scale > 1
    assert found.table_identity(Window.SHORT) == found.table_identity(Window.LONG)


def test_an_attention_scale_of_the_users_own(make_config, base_folder):
    subjects = [
        SubjectConfig(f"llama3 {scale}", rope=RopeConfig(RopeMethod.llama3, attention_scale=scale))
        for scale in (None, 1.28)
    ]
    _, plain, scaled = resolve_subjects(make_config(BASE, *subjects), base_folder)
    assert scaled.factors.factors == plain.factors.factors
    assert (plain.factors.long_attention_scale, scaled.factors.long_attention_scale) == (1.0, 1.28)
    assert scaled.factors.short_attention_scale == 1.0
    assert scaled.table_identity(Window.LONG) != plain.table_identity(Window.LONG)
    assert scaled.table_identity(Window.SHORT) == plain.table_identity(Window.SHORT)


def test_an_attention_scale_out_of_range(make_config, base_folder):
    subject = SubjectConfig("wide", rope=RopeConfig(RopeMethod.llama3, attention_scale=3.0))
    with pytest.raises(ArtifactError, match=r"rope.attention_scale=3.0: must be null .* 0.5 to 2"):
        resolve_one(make_config, base_folder, subject)


def resolve_one(make_config, base_folder, subject):
    return resolve_subjects(make_config(BASE, subject), base_folder)


def test_missing_factors_are_one_clear_error(make_config, base_folder, tmp_path):
    subject = SubjectConfig("searched", rope=RopeConfig(RopeMethod.searched))
    expected = (
        r"^evaluation\.subjects\[1\] \(searched\): .*2_factors/factors\.json does not exist; "
        r"run launch\.search"
    )
    with pytest.raises(ArtifactError, match=expected):
        resolve_one(make_config, base_folder, subject)


def test_factors_searched_on_another_model_are_refused(make_config, base_folder, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=48)
    searched = product_folder(make_config(BASE).run.folder, "factors")
    searched.mkdir(parents=True)
    (searched / "factors.json").write_text(searched_factors().to_json())
    subject = SubjectConfig("searched", rope=RopeConfig(RopeMethod.searched))
    with pytest.raises(
        ArtifactError, match=r"2_factors holds no finished factors: manifest\.json is missing"
    ):
        resolve_one(make_config, base_folder, subject)
    write_manifest(searched, Manifest("factors", inputs={"model": model_identity(other)}))
    expected = (
        r"\(searched\): .*factors\.json belongs to another model than model\.path=.*base "
        r"\(other architecture\)$"
    )
    with pytest.raises(ArtifactError, match=expected):
        resolve_one(make_config, base_folder, subject)


def test_broken_checkpoints_are_refused(make_config, base_folder, tmp_path):
    folder = tmp_path / "trained"
    subject = SubjectConfig("trained", checkpoint=str(folder))
    prefix = r"^evaluation\.subjects\[1\] \(trained\): "

    def refusal():
        with pytest.raises(ArtifactError, match=prefix) as caught:
            resolve_one(make_config, base_folder, subject)
        return str(caught.value)

    assert f"checkpoint={folder} does not exist; run launch.train first" in refusal()
    save_checkpoint(folder, searched_factors())
    (folder / "factors.json").unlink()
    assert "factors.json does not exist; a checkpoint of launch.train has one" in refusal()
    (folder / "factors.json").write_text(searched_factors(target_len=128).to_json())
    assert "is for target_len=128, but target_len=64 is set; set target_len=128" in refusal()
    (folder / "factors.json").write_text(searched_factors(original_len=32).to_json())
    assert (
        "is for model.original_len=32, but model.original_len=16 is set; set model.original_len=32"
        in refusal()
    )
    (folder / "factors.json").write_text("{}")
    assert "not a factors file" in refusal()
    (folder / "manifest.json").unlink()
    assert "holds no finished checkpoint" in refusal()
    shutil.rmtree(folder)
    save_checkpoint(folder, searched_factors(), hidden_size=48)
    (folder / "tokenizer.json").write_text("{ }")
    assert "tokenizer.json is not as it was written (SHA-256): bring it back; or" in refusal()
    write_manifest(folder, Manifest("checkpoint", files=hashes_of(folder)))
    assert "belongs to another model than model.path=" in refusal()
    assert refusal().endswith("(other architecture and tokenizer)")
    save_checkpoint(folder, searched_factors())
    next(folder.glob("*.safetensors")).unlink()
    assert f"{folder / 'model.safetensors'} is missing: bring it back; or remove" in refusal()


def test_a_rerun_measures_only_what_changed(make_config, base_folder, tmp_path, monkeypatch):
    """Short windows are shared by subjects with the same weights; new weights are measured anew."""
    trained = save_checkpoint(tmp_path / "trained", searched_factors(), seed=1)
    config = make_config(BASE, PI, SubjectConfig("trained", checkpoint=str(trained)))
    rng = np.random.default_rng(0)
    texts = [[rng.integers(61, size=length - 1) for _ in range(3)] for length in (16, 64)]
    measures = [
        measure
        for windows in texts
        for measure in perplexity_measures(
            windows, num_scored=8, original_len=ORIGINAL_LEN, batch_tokens=64
        )
    ]
    measured = []
    original = scoring.score_windows

    def counted(model, windows, **options):
        measured.append(len(windows[0]) + 1)
        return original(model, windows, **options)

    monkeypatch.setattr(scoring, "score_windows", counted)
    path = tmp_path / "results.jsonl"

    def measure():
        measured.clear()
        models = SubjectModels(torch.device("cpu"), torch.float32)
        subjects = resolve_subjects(config, base_folder)
        return list(measure_all(subjects, measures, ResultsLog(path), models))

    first = measure()
    assert measured == [16, 64, 64, 16, 64]  # base, pi (long only), trained
    values = {(m.subject, m.length): m.values["nll"] for m in first}
    assert values["base", 16] == values["pi", 16] != values["trained", 16]
    assert len({tuple(values[name, 64]) for name in ("base", "pi", "trained")}) == 3
    assert measure() == first and measured == []
    lines = path.read_text().splitlines(keepends=True)
    assert [(json.loads(line)["subject"], json.loads(line)["length"]) for line in lines] == list(
        values
    )
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert measure() == first and measured == [64, 16, 64]
    save_checkpoint(trained, searched_factors(), seed=2)
    changed = measure()
    assert measured == [16, 64] and changed[:4] == first[:4] and changed[4:] != first[4:]
