"""``launch.doctor rope``: the table, the bound, the critical indices, the figure, every error."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import __main__ as doctor
from launch.doctor.rope import DoctorRoot, compare, overrides, rope_command
from launch.doctor.rope_view import comparison_table
from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError
from longrope2.files.artifacts import product_folder
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors, critical_index_factors

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
LLAMA3 = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
          "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128_256,
          "rope_theta": 500000.0, "max_position_embeddings": 8192}  # fmt: skip
GEOMETRY = RopeGeometry(128, 5e5, 8192)
PUBLISHED_ARRAY = FIXTURES / "llama3_8b_128k_longrope2.json"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """LLaMA3-8B from a folder that holds config.json only."""
    write(tmp_path / "model", LLAMA3)
    return [
        "model=llama3_8b",
        f"model.path={tmp_path / 'model'}",
        "model.name=llama3_8b",
        "target_len=131072",
        f"run.root={tmp_path / 'runs'}",
    ]


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_search(tmp_path: Path, factors: RescaleFactors, name: str = "llama3_8b_131072") -> None:
    folder = product_folder(tmp_path / "runs" / name, "factors")
    folder.mkdir(parents=True)
    (folder / "factors.json").write_text(factors.to_json())


def searched(**changes: Any) -> RescaleFactors:
    fields = {
        "factors": (1.0,) * 30 + (17.0,) * 34,
        "geometry": GEOMETRY,
        "target_len": 131072,
        "method": "longrope2",
        "critical_index": 30,
    }
    return RescaleFactors(**(fields | changes))


def rows_of(arguments: list[str]) -> list[list[str]]:
    table = comparison_table(compare(compose(DoctorRoot, "doctor", overrides(arguments))))
    return [[str(column.header), *column.cells] for column in table.columns]  # type: ignore[list-item]


def columns_of(arguments: list[str]) -> dict[str, list[str]]:
    return {header: cells for header, *cells in rows_of(arguments)}


def faults_of(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        rope_command(arguments)
    return str(caught.value)


def test_periods_turns_and_factors(settings: list[str]) -> None:
    columns = columns_of([*settings, "pi", "ntk", "yarn"])
    assert list(columns) == ["i", "period, tokens", "turns in L0", "pi", "ntk", "yarn", ""]
    assert columns["i"][:64] == [str(i) for i in range(64)]
    assert (columns["period, tokens"][0], columns["period, tokens"][33]) == (
        "6.28",
        "5,454",
    )  # 2 pi 500000^(33/64)
    assert (columns["turns in L0"][33], columns["turns in L0"][35]) == (
        "1.5",
        "0.997",
    )  # rope_anchors: 1.50 at 33
    assert set(columns["pi"][:64]) == {"16"}
    assert (
        columns["ntk"][63]
        == f"{closed_form_factors(RopeMethod.ntk, GEOMETRY, 131072).factors[63]:.5g}"
    )
    assert columns["yarn"][26] == "1.7895"  # 1 / ((8 / 17) / 16 + 9 / 17)
    assert columns[""][24:36] == ["< ten turns", *[""] * 10, "< theoretical critical"]


def test_bound_from_the_theoretical_index_alone(settings: list[str]) -> None:
    columns = columns_of([*settings, "none", "pi", "ntk", "yarn"])
    assert columns["period, tokens"][64:] == ["bound from 35", "cos, sin times"]
    assert [columns[name][64] for name in ("none", "pi", "ntk", "yarn")] == [
        "no, at 35",
        "holds",
        "holds",
        "holds",
    ]
    assert [columns[name][65] for name in ("none", "pi", "ntk", "yarn")] == ["1", "1", "1", "1.277"]


def test_published_array_marks_the_real_index_and_adds_the_corrected_methods(
    settings: list[str],
) -> None:
    columns = columns_of([*settings, f"doctor.factors=[{PUBLISHED_ARRAY}]"])
    name = PUBLISHED_ARRAY.stem
    closed = ["pi", "ntk", "ntk_aware", "dynamic_ntk", "yarn", "llama3", "yarn_rcd", "ntk_rcd"]
    assert list(columns)[3:-1] == [*closed, name]
    assert columns[""][33] == "< real critical"
    assert columns["period, tokens"][64:66] == ["bound from 35", "bound from 33"]
    holds = {method for method in [*closed, name] if columns[method][65] == "holds"}
    assert holds == {"pi", "dynamic_ntk", "yarn_rcd", "ntk_rcd", name}
    assert (
        columns["ntk"][65],
        columns["ntk"][32],
        columns["ntk"][33],
        columns["ntk"][34],
        columns["ntk"][35],
    ) == ("no, at 33", "12.63", "13.672*", "14.8*", "16.02")
    assert columns[name][33] == "21.81"
    expected = critical_index_factors(RopeMethod.yarn_rcd, GEOMETRY, 131072, 33).factors[30]
    assert columns["yarn_rcd"][30] == f"{expected:.5g}"


def test_search_result_of_the_run(settings: list[str], tmp_path: Path) -> None:
    save_search(tmp_path, searched())
    columns = columns_of([*settings, "yarn", "ntk_rcd", f"doctor.factors=[{PUBLISHED_ARRAY}]"])
    assert list(columns)[3:-1] == ["yarn", "ntk_rcd", "searched", PUBLISHED_ARRAY.stem]
    assert (columns["searched"][30], columns[""][30], columns["ntk_rcd"][30]) == (
        "17",
        "< real critical",
        "16",
    )
    assert columns["searched"][65] == "holds"


def test_a_model_that_is_already_extended(settings: list[str], tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write(
        tmp_path / "model", {**LLAMA3, "max_position_embeddings": 131072, "rope_scaling": scaling}
    )
    columns = columns_of([*settings, "yarn", f"doctor.factors=[{tmp_path / 'model'}]"])
    assert columns["published"] == columns["model"]
    assert (columns["published"][63], columns["published"][64]) == ("8*", "no, at 35")


def test_whole_command_writes_a_figure_that_needs_nothing_else(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope_command([*settings, f"doctor.factors=[{PUBLISHED_ARRAY}]"])
    printed = capsys.readouterr().out
    assert "window       8192 -> 131072 tokens, s = 16" in printed
    assert "theoretical  critical index 35" in printed
    assert f"real         critical index 33, of {PUBLISHED_ARRAY.stem}" in printed
    assert "…" not in printed  # no cell is cut, however narrow the terminal
    path = tmp_path / "runs" / "llama3_8b_131072" / "rope.svg"
    assert f"figure: {path}" in printed
    svg = path.read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r'(href|src)="(?!#)', svg)
    rope_command([*settings, "yarn", f"doctor.plot={tmp_path / 'figure.png'}"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_every_preset_composes() -> None:
    names = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
    names.remove("custom")  # the user gives its path and window
    assert {
        "llama2_7b",
        "llama3_8b",
        "mistral_7b",
        "phi3_mini",
        "phi4_mini",
        "qwen3_8b",
        "tiny",
    } <= set(names)
    lengths = {
        name: compose(DoctorRoot, "doctor", [f"model={name}"]).model.original_len for name in names
    }
    assert lengths["llama3_8b"] == 8192
    assert (lengths["llama2_7b"], lengths["phi3_mini"], lengths["phi4_mini"]) == (4096, 2048, 4096)


def test_all_faults_of_the_settings_at_once(settings: list[str], tmp_path: Path) -> None:
    text = faults_of(
        [
            *settings,
            "target_len=131073",
            "doctor.plot=x.pdf",
            "doctor.methods=[searched,yarn]",
            f"model.path={tmp_path / 'nowhere'}",
        ]
    )
    assert "4 fault(s)" in text
    message = "target_len=131073 must be a multiple of model.original_len=8192, and at least twice "
    assert message in text
    assert "doctor.plot=x.pdf: must end in .svg or .png" in text
    assert (
        "doctor.methods: searched is read from a file, give it in doctor.factors; "
        "computed methods are none, pi" in text
    )
    assert (
        f"model.path={tmp_path / 'nowhere'} does not exist; give a local Hugging Face model folder"
        in text
    )


def test_all_faults_of_the_files_at_once(settings: list[str], tmp_path: Path) -> None:
    save_search(tmp_path, searched(target_len=65536))
    (tmp_path / "bad.csv").write_text("1\nx\n")
    other = FIXTURES / "phi4_mini_128k_longrope2.json"
    text = faults_of(
        [*settings, "ntk_rcd", f"doctor.factors=[{tmp_path / 'bad.csv'},{other},missing.json]"]
    )
    assert "5 fault(s)" in text
    assert "factors.json (run.name) is for target_len=65536, not 131072" in text
    assert (
        "bad.csv (doctor.factors): line 2 of the factors CSV: 'x' is not a list of numbers" in text
    )
    assert "(doctor.factors) is for RopeGeometry(rotary_dim=96" in text
    assert "missing.json (doctor.factors): " in text
    assert (
        "doctor.methods: ntk_rcd needs a critical index; "
        "run launch.search for run.name=llama3_8b_131072" in text
    )


def test_two_files_of_one_name(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / PUBLISHED_ARRAY.name).write_text(PUBLISHED_ARRAY.read_text())
    text = faults_of(
        [*settings, f"doctor.factors=[{PUBLISHED_ARRAY},{tmp_path / PUBLISHED_ARRAY.name}]"]
    )
    assert (
        f"doctor.factors: two files would both be called {PUBLISHED_ARRAY.stem}; rename one" in text
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {**LLAMA3, "model_type": "gpt2", "rope_theta": None},
            "model.path=.*: gpt2 has no rotary module: only RoPE models can be extended",
        ),
        (
            {**LLAMA3, "rope_scaling": {"type": "mrope"}},
            "model.path=.*: the config's RoPE type is 'mrope'",
        ),
        (
            {**LLAMA3, "model_type": "gemma3_text", "sliding_window": 10**6},
            "gemma3_text models have a RoPE per layer type",
        ),
    ],
)
def test_models_that_cannot_be_read(
    settings: list[str], tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    write(tmp_path / "model", config)
    assert re.search(text, faults_of(settings))


def test_methods_of_another_name_and_in_two_ways(settings: list[str]) -> None:
    assert "yarm" in faults_of([*settings, "yarm"])
    text = faults_of([*settings, "yarn", "doctor.methods=[ntk]"])
    assert "give methods as words (yarn) or as doctor.methods=[...], not both" in text


def test_subcommands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "hope"])
    with pytest.raises(
        ConfigError, match="the first word must be one of rope.*, or none; got 'hope'"
    ):
        doctor.main()


def test_exit_code_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["doctor", "rope", "model=llama3_8b", f"model.path={tmp_path}"]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(doctor.main)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert f"model.path={tmp_path} holds no config.json" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
