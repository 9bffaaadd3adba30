"""Composition: what a user mistypes comes back as one message that names the key."""

from pathlib import Path

import pytest

from data_prep.config import PackConfig
from longrope2.claim import claim_folder
from longrope2.config import compose, dump, find_shipped, load, to_plain
from longrope2.errors import ConfigError
from longrope2.evaluation.config import EvaluateRoot
from longrope2.presets import CONF_FOLDER
from longrope2.training.config import TrainRoot, check

TINY = ["model=tiny", "target_len=2048", "training=miniature"]


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(TrainRoot, "train", [*TINY, *overrides])
    return list(caught.value.faults)


def test_round_trip_through_the_run_folder(tmp_path: Path) -> None:
    config = compose(TrainRoot, "train", [*TINY, "training.tokens=8192", "rope=yarn"])
    dump(config, tmp_path / "config.yaml")
    assert load(TrainRoot, tmp_path / "config.yaml") == config
    unset = {"factors": None, "attention_scale": None, "both_windows": False}
    assert to_plain(config)["rope"] == {"method": "yarn", **unset}


def test_unknown_key_is_named_with_its_neighbours() -> None:
    (fault,) = faults("training.learning_rat=1")
    assert fault.startswith(
        "unknown key training.learning_rat (did you mean training.learning_rate?); keys beside it: "
        "tokens, global_batch_tokens"
    )


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("trainng.tokens=5", "unknown key trainng.tokens (did you mean training.tokens?); keys"),
        ("experimnt=tiny", "unknown key experimnt (did you mean experiment?); keys beside it: run"),
        ("learning_rate=1", "unknown key learning_rate (did you mean training.learning_rate?); "),
        ("rope=yarn_rdc", "rope=yarn_rdc does not exist (did you mean yarn_rcd?); choose rope= "),
        ("zero.zzz=1", "unknown key zero.zzz; keys beside it: "),
    ],
)
def test_a_misspelt_name_is_answered_by_the_one_that_is_meant(argument: str, meant: str) -> None:
    (found,) = faults_of(*TINY, argument)
    assert found.startswith(meant)


def test_a_misspelt_key_of_a_list_is_answered_too() -> None:
    given = ["model=tiny", "target_len=2048", "run.name=x", "evaluation.subjects[0].chekpoint=x"]
    with pytest.raises(ConfigError, match=r"did you mean evaluation\.subjects\.0\.checkpoint\?"):
        compose(EvaluateRoot, "evaluate", given)


def test_a_new_entry_of_a_dictionary_needs_a_plus() -> None:
    folder = ["target_len=2048", "corpus=folder", "corpus.folder=texts"]
    with pytest.raises(
        ConfigError, match=r"unknown key mixture.sources.web; to add it, put \+ in front"
    ):
        compose(PackConfig, "pack", [*folder, "mixture.sources.web=5"])
    assert not compose(PackConfig, "pack", folder).mixture.is_given
    config = compose(
        PackConfig, "pack", [*folder, "+mixture.sources.web=5", "mixture.buckets.long=5"]
    )
    assert config.mixture.sources == {"web": 5} and config.mixture.fixes_lengths


def test_wrong_type_is_named() -> None:
    (fault,) = faults("training.tokens=many")
    assert "training.tokens" in fault and "many" in fault


def test_wrong_choice_lists_the_choices() -> None:
    (fault,) = faults("rope.method=magic")
    assert "rope.method" in fault and "magic" in fault and "yarn" in fault


def test_unknown_group_member_lists_the_members() -> None:
    with pytest.raises(
        ConfigError, match="rope=magic does not exist; choose rope= one of dynamic_ntk, from_file"
    ):
        compose(TrainRoot, "train", [*TINY, "rope=magic"])


def test_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match="target_len is not set; give it as target_len=VALUE"):
        compose(TrainRoot, "train", ["model=tiny", "run.name=x"])


def test_missing_group_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="(?s)model.*tiny"):
        compose(TrainRoot, "train", ["target_len=2048"])


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; run the stage once without --config"):
        load(TrainRoot, tmp_path / "config.yaml")


def test_config_file_of_another_schema(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("colour: red\n")
    with pytest.raises(ConfigError, match="unknown key colour"):
        load(TrainRoot, tmp_path / "config.yaml")


def test_a_claimed_folder_may_be_moved_and_older_than_a_key(tmp_path: Path) -> None:
    claim_folder(tmp_path, compose(TrainRoot, "train", [*TINY, "run.root=/before"]))
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("  norm: auto\n", ""))
    assert "norm: auto" not in path.read_text()
    claim_folder(tmp_path, compose(TrainRoot, "train", [*TINY, "run.root=/after"]))
    assert "norm: auto" in path.read_text() and "/after" in path.read_text()
    path.write_text(path.read_text().replace("  norm: auto\n", ""))
    with pytest.raises(ConfigError, match="training.norm was auto, now it is model"):
        claim_folder(tmp_path, compose(TrainRoot, "train", [*TINY, "training.norm=model"]))


def test_claimed_folder_refuses_another_configuration(tmp_path: Path) -> None:
    first = compose(TrainRoot, "train", TINY)
    claim_folder(tmp_path, first)
    claim_folder(tmp_path, first)
    other = compose(
        TrainRoot, "train", [*TINY, "training.learning_rate=0.5", "training.log_steps=7"]
    )
    with pytest.raises(ConfigError) as caught:
        claim_folder(tmp_path, other, changeable=("training.log_steps",))
    assert caught.value.faults == (
        "training.learning_rate was 0.001, now it is 0.5: "
        f"{tmp_path}/config.yaml was made with other settings; "
        f"use another run.name, or remove {tmp_path} to make it again"
        "; run.from_run=tiny_2048 lets the new run take this one's segments and factors",
    )
    assert load(TrainRoot, tmp_path / "config.yaml") == first


def given(*arguments: str) -> TrainRoot:
    return compose(TrainRoot, "train", arguments)


@pytest.mark.parametrize("text", ["/d/exp=3,lr=1e-5", "/d/a b", "/d/[x]", "007", "1e5", "/d/ä:b"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert given(*TINY, f"model.path={text}").model.path == text


def test_a_path_from_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert given(*TINY, "model.path=~/models/x").model.path == "/home/me/models/x"
    assert given(*TINY, "model.path='~/models/x'").model.path == "~/models/x"
    assert given(*TINY, "segments=null").segments is None
    assert given(*TINY, "segments=${run.root}/x").segments == "runs/x"


LEAVE_OUT = "+training.tokens=5: leave the + out; the key exists"


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("training.learning_rate=1e-5,2e-5", "training.learning_rate=1e-5,2e-5: takes one value"),
        ("rope=yarn,pi", "rope=yarn,pi names several; run once for each; choose rope= one of "),
        ("--multirun", "--multirun: sweeps are not supported; run once for each value"),
        ("-m", "-m: sweeps are not supported"),
        ("--cfg", "unknown flag --cfg; settings are key=value, --help lists them"),
        ("word", "'word' is no setting; settings are key=value, --help lists them"),
        ("=5", "'=5' is no setting"),
        ("+training.foo=1", "unknown key training.foo; keys beside it: tokens, "),
        ("++training.foo=1", "unknown key training.foo; keys beside it: tokens, "),
        ("+training.tokens=5", LEAVE_OUT),
        ("++training.tokens=5", LEAVE_OUT),
        ("+model=tiny", "+model=tiny: leave the + out"),
        (
            "~training.tokens",
            "~training.tokens: keys cannot be removed; give training.tokens=VALUE",
        ),
        ("~training.tokens=5", "~training.tokens=5: keys cannot be removed"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings do nothing here; run.root and"),
        ("hydra/launcher=x", "hydra/launcher=x: Hydra's own settings do nothing here"),
        ("suite=paper", "unknown key suite; keys beside it: run, model"),
        ("model@x=tiny", "unknown key model@x (did you mean model?); keys beside it: run, model"),
        ("cluster=a100_64", "unknown key cluster; it is hardware now"),
        ("parallel.zero_stage=[", "parallel.zero_stage=[ cannot be read; put text in quotes"),
        ("training.norm=a=b", "training.norm=a=b cannot be read; put text in quotes"),
        ("run.name=", "run.name= must name a folder below run.root=runs; set run.root"),
        ("run.name=.", "run.name=. must name a folder below run.root=runs"),
        ("run.name=../x", "run.name=../x must name a folder below run.root=runs"),
        ("run.name=/x", "run.name=/x must name a folder below run.root=runs"),
        ("training=null", "training=null does not exist; choose training= one of miniature, paper"),
    ],
)
def test_what_is_no_setting_is_one_clear_fault(argument: str, fault: str) -> None:
    (found,) = faults_of(*(a for a in TINY if a.split("=")[0] != argument.split("=")[0]), argument)
    assert found.startswith(fault)


def faults_of(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        given(*arguments)
    return caught.value.faults


def test_a_group_given_twice() -> None:
    assert faults_of(*TINY, "model=tiny") == ("model is given twice: tiny and tiny",)


def test_a_name_made_of_another_key_may_not_leave_the_root() -> None:
    (fault,) = faults_of(*TINY, "model.name=../../x")
    assert fault.startswith("run.name=../../x_2048 must name a folder below run.root=runs")


def test_all_faults_of_a_command_line_come_together() -> None:
    wrong = {
        "--multirun": "--multirun",
        "model=nope": "model=nope does not exist",
        "training.learning_rate=1,2": "training.learning_rate=1,2: takes one value",
        "+training.foo=1": "unknown key training.foo",
        "training.tokens=many": "training.tokens: Value 'many'",
        "rope.method=magic": "rope.method: Invalid value 'magic'",
        "training=miniature": "target_len is not set",
        "run.name=": "run.name= must",
    }
    found = faults_of(*wrong)
    starts = zip(found, wrong.values(), strict=True)
    assert all(fault.startswith(start) for fault, start in starts), found


def test_missing_choices_and_values_come_together() -> None:
    group, target = faults_of()
    assert group.startswith("model is not chosen; give model=NAME, one of custom, llama2_7b, ")
    assert group.endswith(", tiny (or set model.name, model.path, model.original_len)")
    assert target == "target_len is not set; give it as target_len=VALUE"
    by_keys = ["model.name=x", "model.path=/x", "model.original_len=8", "target_len=64"]
    assert given(*by_keys).run.name == "x_64"
    assert given("experiment=tiny").model.name == "tiny"


@pytest.mark.parametrize("name", ["search", "train", "evaluate", "export", "generate", "plan"])
def test_no_stage_chooses_the_model_or_the_target(name: str) -> None:
    """What nobody typed must not be complained of, nor made."""
    text = (CONF_FOLDER / f"{name}.yaml").read_text()
    assert "  - model: null\n" in text and "target_len:" not in text


def test_presets_stand_here_or_beside_the_configuration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shipped("models/tiny") == CONF_FOLDER.parent / "models" / "tiny"
    assert find_shipped("models/other") == Path("models/other")
    assert find_shipped("pyproject.toml") == Path("pyproject.toml")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert find_shipped("models/tiny") == Path("models/tiny")


def check_faults(world_size: int, *overrides: str) -> list[str]:
    config = compose(TrainRoot, "train", [*TINY, *overrides])
    with pytest.raises(ConfigError) as caught:
        check(config, Path("models/tiny"), world_size)
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("training.learning_rate=0", "training.learning_rate=0.0 must be above 0"),
        ("training.beta2=1.0", "training.beta2=1.0 must be in [0, 1)"),
        (
            "training.min_learning_rate_ratio=2",
            "training.min_learning_rate_ratio=2.0 must be in [0, 1]",
        ),
        ("training.warmup_steps=-1", "training.warmup_steps=-1 must not be negative"),
        ("training.tokens=0", "training.tokens=0 must be above 0, or null"),
        (
            "training.tokens=100",
            "training.tokens=100 is less than one step of training.global_batch_tokens=4096",
        ),
        (
            "target_len=2000",
            "target_len=2000 must be a multiple of model.original_len=128, and not below it; "
            "use for example 2048",
        ),
        (
            "training.global_batch_tokens=5000",
            "training.global_batch_tokens=5000 must be a multiple of target_len *",
        ),
        ("parallel.zero_stage=4", "parallel.zero_stage=4 must be 0, 1, 2 or 3"),
    ],
)
def test_each_fault_names_its_key(override: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in check_faults(1, override))


def test_sequence_size_that_does_not_divide_the_processes() -> None:
    assert check_faults(4, "parallel.sequence=3") == [
        "parallel.sequence=3 does not divide 4 processes; use [1, 2, 4]"
    ]


def test_sequence_size_that_does_not_divide_the_target_or_the_heads() -> None:
    found = check_faults(3, "parallel.sequence=3", "training.same_kind_segments=1")
    assert found[0].startswith("target_len=2048 must be a multiple of parallel.sequence=3")
    assert found[1].startswith(
        "parallel.sequence=3 cannot share 4 query and 4 key/value heads; use one of [1, 2, 4]; "
        "parallel.context shares a segment without sharing heads"
    )


def test_context_size_that_does_not_divide_the_processes() -> None:
    assert check_faults(4, "parallel.sequence=2", "parallel.context=4") == [
        "parallel.sequence=2 x parallel.context=4 = 8 does not divide 4 processes; "
        "their product may be [1, 2, 4]"
    ]
    assert check_faults(4, "parallel.context=0") == [
        "parallel.sequence=1 and parallel.context=0 must both be at least 1"
    ]


def test_context_size_that_does_not_divide_the_target_but_may_the_heads() -> None:
    found = check_faults(5, "parallel.context=5", "training.same_kind_segments=1")
    assert found == [
        "target_len=2048 must be a multiple of 10 with parallel.sequence=1 x parallel.context=5, "
        "so that every rank holds an equal share of a segment"
    ]
    for fitting in (["parallel.context=8"], ["parallel.context=2", "parallel.sequence=4"]):
        check(compose(TrainRoot, "train", [*TINY, *fitting]), Path("models/tiny"), 8)


def test_data_parallel_size_must_divide_the_group() -> None:
    (fault,) = check_faults(2, "training.same_kind_segments=1")
    assert fault.startswith(
        "training.same_kind_segments=1 must be a multiple of the data-parallel size 2"
    )


def test_all_faults_come_together() -> None:
    found = check_faults(2, "training.learning_rate=-1", "target_len=100", "parallel.sequence=3")
    assert len(found) >= 3


def test_token_counts_in_scientific_notation() -> None:
    """Wherever the schema wants whole numbers: keys, lists, and entries of dictionaries."""
    words = ["model=tiny", "run.name=x"]
    quotas = ["quotas.stdlib_modules={short: 1e4, long: null}", "quotas.retrieval.long=2e3"]
    packed = compose(PackConfig, "pack", [*words, "corpus=sample", "target_len=2.56e2", *quotas])
    modules = packed.quotas["stdlib_modules"]
    counts = [packed.target_len, modules.short, packed.quotas["retrieval"].long]
    assert counts == [256, 10_000, 2000] and {type(n) for n in counts} == {int}
    lengths = compose(
        EvaluateRoot, "evaluate", [*words, "target_len=1e3", "evaluation.lengths=[1e2,1e3]"]
    ).evaluation.lengths
    assert lengths == [100, 1000] and lengths is not None and type(lengths[0]) is int
    train = ["experiment=tiny_extend", "training.learning_rate=1e0"]
    made = compose(TrainRoot, "train", [*train, "training.tokens=1e9"]).training
    assert made.tokens == 10**9 and type(made.learning_rate) is float
    with pytest.raises(ConfigError, match=r"training\.tokens"):
        compose(TrainRoot, "train", [*train, "training.tokens=1.5"])
