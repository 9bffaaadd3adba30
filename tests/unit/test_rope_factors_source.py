"""Where a run's factors come from: files, configs, a search; and every error text."""

import json
from pathlib import Path
from typing import Any

import pytest

from longrope2.config import compose
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import product_folder
from longrope2.model.factors_source import RopeConfig, factors_path, read_factors, resolve_factors
from longrope2.model.folder import find_config_file
from longrope2.model.loading import rope_geometry
from longrope2.model.shape import read_model_config
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import (
    RopeMethod,
    closed_form_factors,
    critical_index_factors,
    first_out_of_bound,
    ntk_part,
)
from longrope2.training.config import TrainRoot

GEOMETRY = RopeGeometry(8, 1e4, 32)
SEARCHED = RescaleFactors((1.0, 2.0, 4.0, 5.0), GEOMETRY, 128, "longrope2", critical_index=2)
YARN = {
    "head_dim": 8,
    "rope_theta": 1e4,
    "max_position_embeddings": 32,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def resolve(
    method: RopeMethod, given: Path | str | None = None, run: Path = Path("no_such_run")
) -> RescaleFactors:
    return resolve_factors(
        RopeConfig(method, None if given is None else str(given)), GEOMETRY, 128, run
    )


def write(path: Path, content: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("method", [RopeMethod.yarn_rcd, RopeMethod.ntk_rcd])
def test_real_critical_index_from_the_run_or_a_file(tmp_path: Path, method: RopeMethod) -> None:
    own = write(product_folder(tmp_path, "factors") / "factors.json", SEARCHED.to_json())
    expected = critical_index_factors(method, GEOMETRY, 128, 2)
    assert resolve(method, run=tmp_path) == expected
    assert resolve(method, own) == expected
    assert factors_path(RopeConfig(method), tmp_path) == own


def test_csv_and_json_files(tmp_path: Path) -> None:
    csv = resolve(RopeMethod.from_file, write(tmp_path / "found.csv", "1\n2\n4\n5\n"))
    assert (csv.factors, csv.target_len, csv.provenance) == (
        SEARCHED.factors,
        128,
        {"source": "found.csv"},
    )
    assert (
        resolve(RopeMethod.from_file, write(tmp_path / "own.json", SEARCHED.to_json())) == SEARCHED
    )


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("llama3_8b_128k_longrope2.json", RopeGeometry(128, 5e5, 8192)),
        ("phi4_mini_128k_longrope2.json", RopeGeometry(96, 1e4, 4096)),
    ],
)
def test_published_arrays(name: str, geometry: RopeGeometry) -> None:
    rope = RopeConfig(RopeMethod.from_file, str(FIXTURES / name))
    factors = resolve_factors(rope, geometry, 131072, Path("no_such_run"))
    assert list(factors.factors) == json.loads((FIXTURES / name).read_text())["factors"]


def test_published_config_as_folder_or_file(tmp_path: Path) -> None:
    file = write(tmp_path / "model" / "config.json", YARN)
    from_folder = resolve(RopeMethod.from_hf, tmp_path / "model")
    assert (
        from_folder
        == resolve(RopeMethod.from_hf, file)
        == resolve(RopeMethod.from_hf, write(tmp_path / "c", YARN))
    )
    assert from_folder.factors == pytest.approx(
        closed_form_factors(RopeMethod.yarn, GEOMETRY, 128).factors, rel=1e-12
    )
    assert factors_path(RopeConfig(RopeMethod.from_hf, str(tmp_path / "model")), tmp_path) == file


def test_published_config_for_more_than_the_target_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", {**YARN, "max_position_embeddings": 512})
    assert resolve(RopeMethod.from_hf, file).target_len == 128


def test_dynamic_reaches_any_length(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    file = write(tmp_path / "config.json", {**YARN, "rope_scaling": scaling})
    assert resolve(RopeMethod.from_hf, file).factors[3] == pytest.approx(7.0)


def test_read_factors_knows_files_from_models(tmp_path: Path) -> None:
    json_file = write(tmp_path / "a.json", SEARCHED.to_json())
    csv_file = write(tmp_path / "b.csv", "1,2,4,5")
    write(tmp_path / "m" / "config.json", YARN)
    read = [
        read_factors(str(given), GEOMETRY, 128, "key")
        for given in (json_file, csv_file, tmp_path / "m")
    ]
    assert [factors.method for factors in read] == ["longrope2", "from_file", "from_hf"]


@pytest.mark.parametrize("method", ["yarn_rcd", "ntk_rcd", "from_hf", "from_file"])
def test_methods_are_configuration_choices(method: str) -> None:
    config = compose(
        TrainRoot, "train", [f"rope={method}", "rope.factors=x", "experiment=tiny_extend"]
    )
    assert config.rope == RopeConfig(RopeMethod(method), "x")


NO_INDEX = closed_form_factors(RopeMethod.ntk, GEOMETRY, 128).to_json()


@pytest.mark.parametrize(
    ("method", "content", "text"),
    [
        (
            RopeMethod.yarn_rcd,
            NO_INDEX,
            r"f.json \(rope.factors\) has no critical_index, which rope.method=yarn_rcd needs",
        ),
        (RopeMethod.from_file, "{", r"f.json \(rope.factors\): not a factors file: "),
        (
            RopeMethod.from_file,
            SEARCHED.to_json().replace("10000.0", "500.0"),
            r"\(rope.factors\) is for RopeGeometry\(",
        ),
        (
            RopeMethod.from_file,
            SEARCHED.to_json().replace("128", "64"),
            r"is for target_len=64, not 128",
        ),
        (RopeMethod.from_hf, "[]", "f.json is not a Hugging Face config: it holds no JSON object"),
        (RopeMethod.from_hf, "{", "f.json cannot be read as a Hugging Face config: "),
        (
            RopeMethod.from_hf,
            {**YARN, "head_dim": 16},
            r"\(rope.factors\) is for RopeGeometry\(rotary_dim=16",
        ),
        (
            RopeMethod.from_hf,
            {**YARN, "rope_scaling": {"type": "su"}},
            r"\(rope.factors\): the Hugging Face config has no",
        ),
        (
            RopeMethod.from_hf,
            {**YARN, "rope_scaling": {**YARN["rope_scaling"], "factor": 2.0}},
            r"f.json \(rope.factors\) reaches 64 tokens, not target_len=128; "
            "set target_len=64, or give",
        ),
    ],
)
def test_errors_of_files(
    tmp_path: Path, method: RopeMethod, content: str | dict, text: str
) -> None:
    with pytest.raises(ArtifactError, match=text):
        resolve(method, write(tmp_path / "f.json", content))


def test_errors_of_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError,
        match="rope.method=from_file needs rope.factors=a factors file, .json or .csv",
    ):
        resolve(RopeMethod.from_file)
    with pytest.raises(
        ArtifactError,
        match="rope.method=from_hf needs rope.factors=a model folder, a config.json or a",
    ):
        resolve(RopeMethod.from_hf)
    with pytest.raises(
        ArtifactError,
        match="rope.method=ntk_rcd needs a factors file, but .*factors.json does not exist",
    ):
        resolve(RopeMethod.ntk_rcd, run=tmp_path)
    with pytest.raises(
        ArtifactError,
        match="rope.factors=.* holds no config.json; give a Hugging Face model folder",
    ):
        resolve(RopeMethod.from_hf, tmp_path)
    with pytest.raises(
        ArtifactError, match=r"f\.csv \(rope.factors\): line 2 of the factors CSV: 'x' is not"
    ):
        resolve(RopeMethod.from_file, write(tmp_path / "f.csv", "1\nx\n"))


def test_a_name_that_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def unreachable(repository: str, name: str) -> str:
        asked.append((repository, name))
        raise LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        ArtifactError,
        match=r"model.path=someone/model is neither .* reached \(no connection\); give",
    ):
        find_config_file("someone/model", "model.path")
    assert asked == [("someone/model", "config.json")]  # nothing but config.json is asked for


@pytest.mark.parametrize(
    ("config", "geometry"),
    [  # as published: Llama-2 leaves out the base, Phi-2 the rotated part
        (
            {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32},
            RopeGeometry(128, 1e4, 4096),
        ),
        (
            {"model_type": "phi", "hidden_size": 2560, "num_attention_heads": 32},
            RopeGeometry(40, 1e4, 4096),
        ),
        (
            {
                "model_type": "phi3",
                "hidden_size": 3072,
                "num_attention_heads": 24,
                "partial_rotary_factor": 0.75,
            },
            RopeGeometry(96, 1e4, 4096),
        ),
        ({"model_type": "llama", "head_dim": 64, "rope_theta": 1e5}, RopeGeometry(64, 1e5, 4096)),
    ],
)
def test_model_class_completes_the_config(
    tmp_path: Path, config: dict[str, Any], geometry: RopeGeometry
) -> None:
    write(tmp_path / "config.json", config)
    assert rope_geometry(tmp_path, 4096) == geometry


def test_a_model_class_with_a_rope_per_layer_type(tmp_path: Path) -> None:
    file = write(
        tmp_path / "config.json", {"model_type": "gemma3_text", "rope_theta": 1e6, "head_dim": 8}
    )
    with pytest.raises(ArtifactError, match="gemma3_text models have a RoPE per layer type"):
        read_model_config(file)


def test_a_scaling_beside_a_default_of_transformers_5_is_seen(tmp_path: Path) -> None:
    config = {**YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    write(tmp_path / "config.json", config)
    with pytest.raises(
        ArtifactError,
        match="already has RoPE scaling 'yarn'; give model.path of the model before ext",
    ):
        rope_geometry(tmp_path, 32)


def test_shipped_factors_are_what_a_search_gives() -> None:
    """``rope=smollm2_135m_16k``: SmolLM2's geometry, NTK below c, the bound from c up."""
    shipped = ROOT / "conf" / "factors" / "smollm2_135m_16384.json"
    preset = (ROOT / "conf" / "rope" / "smollm2_135m_16k.yaml").read_text(encoding="utf-8")
    assert f"factors: {shipped.relative_to(ROOT)}" in preset
    geometry = RopeGeometry(rotary_dim=64, rope_base=100_000.0, original_len=8192)
    config = RopeConfig(RopeMethod.from_file, str(shipped))
    factors = resolve_factors(config, geometry, 16384, Path("unused"))
    c = factors.critical_index
    assert c == 20
    assert factors.factors[:c] == pytest.approx(ntk_part(c, factors.factors[c]), rel=1e-12)
    assert first_out_of_bound(factors, c) is None
    assert max(factors.factors) <= 2 * factors.scale
    assert factors.provenance["objective"] == "perplexity"
