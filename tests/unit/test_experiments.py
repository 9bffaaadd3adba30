"""The paper's experiments and baselines: planned on a machine that has nothing of them."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.train import main
from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError
from longrope2.presets import CONF_FOLDER
from longrope2.rope.methods import RopeMethod
from longrope2.training.config import TrainRoot

BASES = {"llama3_8b_128k": 8192, "phi3_mini_128k": 2048}
SINGLE = {"_yarn": "yarn", "_ntk": "ntk", "_yarn_rcd": "yarn_rcd", "_ntk_rcd": "ntk_rcd"}
MIXED = {f"{name}_mixed": rope for name, rope in SINGLE.items()}
BASELINES = {"": "searched", "_longrope": "searched", **SINGLE, **MIXED}
EXPERIMENTS = [f"{base}{baseline}" for base in BASES for baseline in BASELINES]


def dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> str:
    """What the command prints; it must end without an error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["launch.train", *overrides, "dry_run=true"])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [p.stem for p in CONF_FOLDER.glob("*.yaml") if "experiment:" in p.read_text()]
)
def test_an_experiment_that_does_not_exist_is_refused(config: str) -> None:
    """Every stage that knows experiments; a schema of no fields is enough to choose groups."""

    @dataclass
    class Nothing:
        pass

    with pytest.raises(
        ConfigError,
        match="experiment=nope does not exist; choose experiment= one of .*llama3_8b_128k",
    ):
        compose(Nothing, config, ["model=tiny", "experiment=nope"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_planned_without_gpus_weights_segments_or_factors(
    name: str, tmp_path, monkeypatch, capsys
) -> None:
    base = next(base for base in BASES if name.startswith(base))
    baseline = name.removeprefix(base)
    printed = dry_run(monkeypatch, capsys, f"experiment={name}", f"run.root={tmp_path}")
    assert f"window {BASES[base]} -> 131072" in printed
    everywhere = " at every length" if baseline in SINGLE else ""
    mixed = "mixed windows if the segments will be of both kinds"
    assert f"rope       {BASELINES[baseline]}{everywhere}, {mixed}" in printed
    assert "with 70 % long (assumed: there are no segments yet)" in printed
    assert "processes  64: 8 data x 8 sequence, ZeRO stage 3" in printed
    assert f"steps      {10_000_000_000 // 8_388_608} of 8388608 tokens" in printed
    missing = printed.split("missing on this machine")[1]
    assert f"segments {tmp_path}/{base}/1_segments: run data_prep.pack first" in missing
    found_by = f"{base}_longrope" if baseline == "_longrope" else base
    wants_factors = BASELINES[baseline] in ("searched", "yarn_rcd", "ntk_rcd")
    assert (
        f"{tmp_path}/{found_by}/2_factors/factors.json: run launch.search first" in missing
    ) == wants_factors
    assert "  model    " in missing
    assert not list(tmp_path.iterdir())


def test_the_papers_settings() -> None:
    """Section 4.1 and the released recipe.

    AdamW (0.9, 0.95), weight decay 0.1, 2e-5, 64 segments of 131,072 a step.
    """
    for base in BASES:
        config = compose(TrainRoot, "train", [f"experiment={base}"])
        training = config.training
        assert (training.learning_rate, training.beta1, training.beta2) == (2e-5, 0.9, 0.95)
        assert (training.weight_decay, training.gradient_clip, training.mixed) == (0.1, 1.0, True)
        assert training.global_batch_tokens == 64 * config.target_len
        assert config.run.name == base
    names = {path.stem for path in (CONF_FOLDER / "experiment").glob("*_128k*.yaml")}
    assert names == {*EXPERIMENTS, "qwen3_0p6b_128k", "smollm2_1p7b_128k"}  # no paper's


@pytest.mark.parametrize(
    "method", [m for m in RopeMethod if m.value not in ("from_hf", "from_file")]
)
def test_any_method_is_one_override(method: RopeMethod, tmp_path, monkeypatch, capsys) -> None:
    printed = dry_run(
        monkeypatch,
        capsys,
        "experiment=llama3_8b_128k",
        f"run.root={tmp_path}",
        f"rope={method.value}",
    )
    assert f"rope       {method.value}, mixed windows if the segments will be" in printed


def test_without_mixed_windows_is_one_override(tmp_path, monkeypatch, capsys) -> None:
    printed = dry_run(
        monkeypatch,
        capsys,
        "experiment=phi3_mini_128k",
        f"run.root={tmp_path}",
        "training.mixed=false",
    )
    assert "rope       searched, mixed windows off" in printed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallel.sequence=64"],
            "parallel.sequence=64 cannot share 32 query and 8 key/value heads",
        ),
        (
            ["model.config_folder=null"],
            "a dry run can do without it when model.config_folder names a folder",
        ),
        (["model.config_folder=conf"], "model.config_folder=conf holds no config.json"),
        (["rope=from_file"], "rope.method=from_file needs rope.factors="),
        (["segments=SOMETHING_ELSE"], "kind is 'factors', expected 'segments'"),
    ],
)
def test_wrong_is_not_missing(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What is there and does not fit is a fault in a dry run too."""
    (tmp_path / "manifest.json").write_text('{"kind": "factors", "schema_version": 1}')
    given = [o.replace("SOMETHING_ELSE", str(tmp_path)) for o in overrides]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        sys, "argv", ["launch.train", "experiment=llama3_8b_128k", *given, "dry_run=true"]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
