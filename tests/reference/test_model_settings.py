"""Settings on top of a model's config.json, and what is refused before anything is computed."""

import contextlib
import io
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_families import MINIATURE, ORIGINAL_LEN, TOKENIZER_FILES, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from launch.doctor.machine import find_all, machine_command, print_findings
from launch.doctor.rope import DoctorRoot
from launch.plan import PlanRoot, plan_run
from launch.search import main as search_main
from longrope2.config import ModelConfig, SlidingWindow, compose
from longrope2.errors import ArtifactError
from longrope2.export.hugging_face import check_exportable, write_hugging_face_folder
from longrope2.export.verification import verify_export
from longrope2.model import folder as model_folder
from longrope2.model import loading, parity
from longrope2.model.factors_source import read_factors
from longrope2.model.folder import NO_WINDOW, given_folder, model_identity, weights_sha256
from longrope2.model.given import active_window, published_rotary
from longrope2.model.loading import check_model, load_windowed_model, rope_geometry
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

TARGET_LEN = 512
DROP = {"sliding_window": SlidingWindow.drop}
WINDOWED = {
    "mistral (sliding window)": 32,
    "phi3 (sliding window)": 47,
    "qwen2 (sliding window)": 32,
    "exaone4 (windowed layers have the RoPE)": 32,
    "cohere2": 32,
    "gemma2": 32,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def given(path: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(**{"name": "m", "path": str(path), "original_len": ORIGINAL_LEN, **settings})


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**read(folder), **changes}))
    return folder


def factors_of(folder: Path, target_len: int = TARGET_LEN) -> RescaleFactors:
    return closed_form_factors(RopeMethod.ntk, rope_geometry(folder, ORIGINAL_LEN), target_len)


def test_without_settings_the_folder_itself_is_used(tmp_path: Path, cache: Path) -> None:
    model = make_model("llama", tmp_path / "m")
    assert given_folder(given(model), TARGET_LEN) == model
    assert not cache.exists()


def test_a_view_has_the_merged_config_and_all_other_files(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "m")
    before, untouched = model_identity(model), (model / "config.json").read_bytes()
    settings = given(model, config={"rms_norm_eps": 0.5, "extra": None})
    view = given_folder(settings, TARGET_LEN)
    assert view != model and read(view) == {**read(model), "rms_norm_eps": 0.5, "extra": None}
    assert {p.name for p in view.iterdir()} == {p.name for p in model.iterdir()}
    assert weights_sha256(view) == weights_sha256(model)
    assert model_identity(view) != before  # what was made with the settings is another model
    assert (model / "config.json").read_bytes() == untouched
    assert given_folder(settings, 2 * TARGET_LEN) == view
    loaded = load_windowed_model(view, factors_of(view))
    assert loaded.hf.config.rms_norm_eps == 0.5
    (model / "chat_template.jinja").write_text("x")  # a file that comes later is in a view too
    assert (given_folder(settings, TARGET_LEN) / "chat_template.jinja").exists()


def test_processes_that_make_a_view_together_find_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(make_model("llama", tmp_path / "m"), config={"rms_norm_eps": 0.5})
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp") and not target.exists():  # another one is faster
            twin = path.with_suffix(".twin")
            shutil.copytree(path, twin, symlinks=True)
            with contextlib.suppress(OSError):  # a third one was faster still
                rename(twin, target)
            shutil.rmtree(twin, ignore_errors=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda _: given_folder(settings, TARGET_LEN), range(8)))
    assert len(set(views)) == 1 and list((cache / "views").iterdir()) == [views[0]]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path / "file"))
    settings = given(make_model("llama", tmp_path / "m"), config={"rms_norm_eps": 0.5})
    with pytest.raises(ArtifactError, match="cannot be written .*; set LONGROPE2_CACHE to"):
        given_folder(settings, TARGET_LEN)


def test_settings_of_the_command_line(tmp_path: Path) -> None:
    model = make_model("granite (dropout)", tmp_path / "m")
    words = ["model=custom", f"model.path={model}", "model.original_len=128", "model.dropout=0"]
    words += ["model.sliding_window=drop", "model.config={rms_norm_eps: 0.5, more: null}"]
    config = compose(DoctorRoot, "doctor", words).model
    assert (config.name, config.sliding_window) == ("custom", SlidingWindow.drop)
    assert config.config == {"rms_norm_eps": 0.5, "more": None}
    merged = read(given_folder(config, TARGET_LEN))
    assert (merged["rms_norm_eps"], merged["attention_dropout"]) == (0.5, 0.0)


@pytest.mark.parametrize("name", list(WINDOWED))
def test_a_window_below_the_target_is_refused(tmp_path: Path, name: str) -> None:
    model, window = make_model(name, tmp_path / "m"), WINDOWED[name]
    message = f"sliding_window={window} is below target_len=512.*model.sliding_window=drop"
    with pytest.raises(ArtifactError, match=message):
        given_folder(given(model), TARGET_LEN)
    assert given_folder(given(model, original_len=8), window) == model  # it holds the target


def test_a_window_that_only_the_class_knows(tmp_path: Path) -> None:
    model = make_model("mistral", tmp_path / "m")
    config = read(model)
    del config["sliding_window"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="sliding_window=4096 is below target_len=8192"):
        given_folder(given(model), 8192)


def test_what_is_no_active_window(tmp_path: Path) -> None:
    model = make_model("qwen2 (sliding window)", tmp_path / "m")
    edit(model, use_sliding_window=False, layer_types=["full_attention"] * 2)
    assert given_folder(given(model), TARGET_LEN) == model
    edit(model, use_sliding_window=True)  # no layer has it
    assert given_folder(given(model, **DROP), TARGET_LEN) == model


@pytest.mark.parametrize("name", list(WINDOWED))
def test_a_dropped_window_is_full_attention_everywhere(tmp_path: Path, name: str) -> None:
    model = make_model(name, tmp_path / "m")
    view = given_folder(given(model, **DROP), TARGET_LEN)
    merged = AutoConfig.from_pretrained(view)
    assert active_window(merged) == NO_WINDOW
    assert getattr(merged, "layer_types", None) == getattr(
        AutoConfig.from_pretrained(model), "layer_types", None
    )
    assert max(vars(check_model(view, ORIGINAL_LEN)).values()) < 1e-5
    factors = factors_of(view)
    load_windowed_model(view, factors)  # compares itself with transformers and the merged config
    exported = tmp_path / "export"
    write_hugging_face_folder(view, factors, exported, torch.float32)
    assert read(exported)["sliding_window"] == TARGET_LEN
    lengths = [ORIGINAL_LEN, ORIGINAL_LEN + 1, TARGET_LEN]
    assert max(verify_export(view, factors, exported, torch.float32, lengths).values()) < 1e-4
    card = (exported / "README.md").read_text()
    assert "asks for a sliding window. This model was trained with full" in card


def test_a_window_that_was_not_dropped_does_not_load(tmp_path: Path) -> None:
    model = make_model("mistral (sliding window)", tmp_path / "m")
    with pytest.raises(ArtifactError, match="sliding_window=32.*model.sliding_window=drop"):
        load_windowed_model(model, factors_of(model))


def test_dropout(tmp_path: Path) -> None:
    model = make_model("granite (dropout)", tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"attention_dropout=0\.1.*give model\.dropout=0"):
        rope_geometry(given_folder(given(model), TARGET_LEN), ORIGINAL_LEN)
    view = given_folder(given(model, dropout=0.0), TARGET_LEN)
    assert read(view)["attention_dropout"] == 0
    assert max(vars(check_model(view, ORIGINAL_LEN)).values()) < 1e-5
    with pytest.raises(ArtifactError, match=r"model\.dropout=0\.2: training draws no dropout"):
        given_folder(given(model, dropout=0.2), TARGET_LEN)


def test_a_window_above_what_the_config_says_is_questioned(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "m")
    with pytest.raises(ArtifactError) as refused:
        given_folder(given(model, original_len=256), TARGET_LEN)
    assert "model.original_len=256 is above max_position_embeddings=128" in str(refused.value)
    assert "'model.config={max_position_embeddings: 256}'" in str(refused.value)
    stated = given(model, original_len=256, config={"max_position_embeddings": 256})
    assert read(given_folder(stated, TARGET_LEN))["max_position_embeddings"] == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "yarn"}, 'rope_scaling="yarn" must be an object'),
        ({"rope_scaling": ["linear", 4.0]}, r'rope_scaling=\["linear", 4.0\] must be an object'),
        ({"rope_scaling": False}, "rope_scaling=false must be an object"),
        ({"text_config": {"hidden_size": 8}}, "text_config: llama wraps a language model into"),
    ],
)
def test_configs_that_no_rope_is_read_from(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = edit(make_model("llama", tmp_path / "m"), **change)
    geometry = RopeGeometry(16, 1e4, ORIGINAL_LEN)
    for ask in (
        lambda: rope_geometry(model, ORIGINAL_LEN),
        lambda: read_factors(str(model), geometry, TARGET_LEN, "rope.factors"),
        lambda: given_folder(given(model), TARGET_LEN),
    ):
        with pytest.raises(ArtifactError, match=message) as refused:
            ask()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_quantized_weights(tmp_path: Path, method: str) -> None:
    quantization = {"quant_method": method, "bits": 4}
    model = edit(make_model("llama", tmp_path / "m"), quantization_config=quantization)
    message = rf"quantization_config \({method}\): quantized weights cannot be trained"
    with pytest.raises(ArtifactError, match=message) as refused:
        rope_geometry(model, ORIGINAL_LEN)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "rotary"),
    [
        (  # as DeepSeek publishes it: no head_dim, 7168 / 128 = 56
            {
                "model_type": "deepseek_v3",
                "hidden_size": 7168,
                "num_attention_heads": 128,
                "qk_rope_head_dim": 64,
                "rope_theta": 10000,
            },
            (64, 1e4),
        ),
        (
            {
                "model_type": "gpt_neox",
                "hidden_size": 64,
                "num_attention_heads": 4,
                "rotary_pct": 0.25,
                "rotary_emb_base": 50000,
            },
            (4, 5e4),
        ),
    ],
)
def test_published_factors_follow_the_class(
    tmp_path: Path, config: dict[str, Any], rotary: tuple[int, float]
) -> None:
    scaling = {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    }
    published = {**config, "rope_scaling": scaling, "max_position_embeddings": 163840}
    assert published_rotary(published) == pytest.approx(rotary)
    (tmp_path / "config.json").write_text(json.dumps(published))
    geometry = RopeGeometry(*rotary, 4096)
    factors = read_factors(str(tmp_path), geometry, 163840, "rope.factors")
    assert factors.geometry == geometry and len(factors.factors) == rotary[0] // 2


def test_a_class_that_transformers_does_not_have() -> None:
    assert published_rotary({"hidden_size": 64, "num_attention_heads": 4}) is None
    assert published_rotary({"model_type": "of_tomorrow", "rope_theta": 1e4}) is None


# What is asked before the work.


def commands(model: Path, root: Path, *more: str) -> list[str]:
    return [
        "model=custom", f"model.path={model}", "model.original_len=128", f"target_len={TARGET_LEN}",
        f"run.root={root}", *more,
    ]  # fmt: skip


def test_the_cut_is_compared_once_for_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = make_model("llama", tmp_path / "m"), list[Any]()
    monkeypatch.setattr(
        loading, "check_cut", lambda *given: asked.append(given) or parity.check_cut(*given)
    )
    first = check_model(model, ORIGINAL_LEN)
    assert check_model(model, ORIGINAL_LEN) is first and len(asked) == 1
    edit(model, rms_norm_eps=0.5)
    check_model(model, ORIGINAL_LEN)
    assert len(asked) == 2


def test_search_refuses_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = make_model("gpt_oss (sinks)", tmp_path / "m"), tmp_path / "runs"
    words = commands(model, runs, "corpus=sample", "search=quick", "model.sliding_window=drop")
    monkeypatch.setattr(sys, "argv", ["launch.search", *words])
    with pytest.raises(Exception, match="attention sinks in its softmax"):
        search_main()
    assert not runs.exists()


def test_an_export_is_checked_before_the_work(tmp_path: Path) -> None:
    model = make_model("mixtral", tmp_path / "m")
    config = read(model)
    del config["head_dim"]
    for changed in (config, {**config, "head_dim": None}):
        (model / "config.json").write_text(json.dumps(changed))
        check_exportable(model, ORIGINAL_LEN, TARGET_LEN)
        exported = tmp_path / "export"
        shutil.rmtree(exported, ignore_errors=True)
        write_hugging_face_folder(model, factors_of(model), exported, torch.float32)
        assert read(exported)["head_dim"] == 16
    verify_export(model, factors_of(model), exported, torch.float32, [ORIGINAL_LEN])


def test_a_config_that_an_export_could_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = make_model("mixtral", tmp_path / "m"), AutoConfig.for_model

    def no_scaling(**config: Any) -> Any:
        if config.get("rope_scaling"):
            raise ValueError("this class has\nno longrope")
        return own(**config)

    monkeypatch.setattr(AutoConfig, "for_model", staticmethod(no_scaling))
    message = "an export of it would be refused by transformers: this class has no longrope"
    with pytest.raises(ArtifactError, match=message):
        check_exportable(model, ORIGINAL_LEN, 4 * TARGET_LEN)


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("granite", {"logits_scaling": 4.0}, r"times 0\.25 \(logits_scaling\)"),
        ("llama", {"rope_theta": 5e4}, r"rotary frequency .* \(rope_parameters\)"),
        ("llama", {"rms_norm_eps": 0.5}, "its layers compute something else"),
    ],
)
def test_a_difference_names_its_cause(
    tmp_path: Path, name: str, change: dict[str, Any], cause: str
) -> None:
    model, exported = make_model(name, tmp_path / "m"), tmp_path / "export"
    factors = factors_of(model)
    write_hugging_face_folder(model, factors, exported, torch.float32)
    verify_export(model, factors, exported, torch.float32, [ORIGINAL_LEN])
    if "rope_theta" in change:
        for layout in ("rope_scaling", "rope_parameters"):
            change = {**change, layout: {**read(exported)[layout], "rope_theta": 5e4}}
    edit(exported, **change)
    with pytest.raises(ArtifactError, match=cause) as refused:
        verify_export(model, factors, exported, torch.float32, [ORIGINAL_LEN])
    assert "transformers version" not in str(refused.value)


def test_weights_of_another_number_format_are_named(tmp_path: Path) -> None:
    model, exported = make_model("llama", tmp_path / "m"), tmp_path / "export"
    factors = factors_of(model)
    write_hugging_face_folder(model, factors, exported, torch.bfloat16)
    with pytest.raises(ArtifactError, match=r"its weights are torch\.bfloat16, not torch\.float32"):
        verify_export(model, factors, exported, torch.float32, [ORIGINAL_LEN])


# The paper's own model, from the config that is published. The window of 2,048 is the user's to
# say, as config.json says 4,096; the shipped preset says it of the model in its own sizes alone.
PHI3 = ["model=custom", "model.original_len=2048", "target_len=4096"]


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    """Two layers of the public Phi3-mini-4k, random, with the miniature's vocabulary."""
    public = json.loads((MINIATURE.parent / "phi3_mini" / "config.json").read_text())
    size = {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": None}  # fmt: skip
    config = {**public, "sliding_window": 2047, **size}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(tmp_path / "phi3")
    (tmp_path / "phi3" / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(MINIATURE / name, tmp_path / "phi3" / name)
    return tmp_path / "phi3"


def test_the_public_phi3_mini_untouched(phi3: Path, tmp_path: Path) -> None:
    before = (phi3 / "config.json").read_bytes()
    words = [*PHI3, f"model.path={phi3}", "model.sliding_window=drop"]
    config = compose(PlanRoot, "plan", [*words, "training.tokens=1000000000"])
    assert plan_run(config).shape.num_layers == 2
    findings = {f.what: f for f in find_all(compose(DoctorRoot, "doctor", words))}
    assert findings["supported"].found.startswith("yes: phi3")
    assert "sliding window dropped" in findings["attention"].found
    assert findings["geometry"].found == "96 rotated channels (halves), base 10000"
    view = given_folder(config.model, 4096)
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(view, 2048), 4096)
    check_exportable(view, 2048, 4096)
    whole = load_windowed_model(view, factors)
    shares = load_windowed_model(view, factors, take=lambda parameter: None)
    tokens_BT = torch.arange(24)[None]
    logits = [model.logits(tokens_BT, Window.LONG) for model in (whole, shares)]
    torch.testing.assert_close(*logits)
    exported = tmp_path / "export"
    write_hugging_face_folder(view, factors, exported, torch.float32)
    assert read(exported)["sliding_window"] == 4096
    assert max(verify_export(view, factors, exported, torch.float32, [2048, 2049]).values()) < 1e-4
    assert (phi3 / "config.json").read_bytes() == before


def test_the_public_phi3_mini_with_its_window(phi3: Path) -> None:
    words = [*PHI3, f"model.path={phi3}"]
    kept = compose(DoctorRoot, "doctor", [*words, "model.sliding_window=keep"])
    supported = next(f for f in find_all(kept) if f.what == "supported")
    assert "sliding_window=2047 is below target_len=4096" in supported.found


# Any model in one line.


def test_doctor_says_what_a_model_is(tmp_path: Path) -> None:
    model = make_model("granite", tmp_path / "m")
    findings = find_all(compose(DoctorRoot, "doctor", commands(model, tmp_path)[:3]))
    out = io.StringIO()
    print_findings(findings, Console(file=out, width=80))
    text = out.getvalue()
    for words in (
        "supported            yes: granite",
        "window 128 -> 2,048; an export loads in transformers",
        "geometry             16 rotated channels (halves), base 10000",
        "critical dimensions  cosine index ",
        "attention            4 heads, 2 of keys and values; full",
        "logits               times 0.125 (logits_scaling)",
        "tokenizer rule       <s> (1) starts a document, </s> (2) ends it",
        "parity               logits ",
        "cost                 1 B tokens on 64 A100: ",
    ):
        assert f"\n{words}" in text or words in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lfm2", "layer_types has conv"),
        ("gemma2 (attention cap)", "attn_logit_softcapping=0.5"),
        ("llama (extended already)", "already has RoPE scaling 'linear'"),
    ],
)
def test_doctor_refuses_a_model(tmp_path: Path, name: str, reason: str) -> None:
    """In one line, as every command ends; ``run_command`` makes it exit code 2."""
    model = make_model(name, tmp_path / "m")
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        words = [*commands(model, tmp_path)[:3], "model.sliding_window=drop"]
        machine_command(compose(DoctorRoot, "doctor", words))


def test_one_function_resolves_a_models_folder() -> None:
    """A stage that asks ``resolve_model_folder`` would not see the user's settings."""
    root = Path(model_folder.__file__).parents[2]
    tops = ("longrope2", "data_prep", "launch")
    users = [
        path.relative_to(root).as_posix()
        for top in tops
        for path in (root / top).rglob("*.py")
        if "resolve_model_folder(" in path.read_text()
    ]
    assert users == ["longrope2/model/folder.py"]
