"""Composition: what a user mistypes comes back as one message that names the key."""

from pathlib import Path

import pytest

from data_prep.config import PackConfig
from longrope2.config import claim_folder, compose, dump, load, to_plain
from longrope2.errors import ConfigError
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
    assert to_plain(config)["rope"] == {"method": "yarn", "factors": None, "both_windows": False}


def test_unknown_key_is_named_with_its_neighbours() -> None:
    (fault,) = faults("training.learning_rat=1")
    assert fault.startswith(
        "unknown key training.learning_rat; keys beside it: tokens, global_batch_tokens"
    )


def test_a_new_entry_of_a_dictionary_needs_a_plus() -> None:
    folder = ["target_len=2048", "corpus=folder", "corpus.folder=texts"]
    with pytest.raises(
        ConfigError, match=r"unknown key corpus.plan.sources.web; to add it, put \+ in front"
    ):
        compose(PackConfig, "pack", [*folder, "corpus.plan.sources.web=5"])
    assert not compose(PackConfig, "pack", folder).corpus.plan.is_given
    config = compose(
        PackConfig, "pack", [*folder, "+corpus.plan.sources.web=5", "corpus.plan.buckets.long=5"]
    )
    assert config.corpus.plan.sources == {"web": 5} and config.corpus.plan.fixes_lengths


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
        "training.learning_rate was 0.001, now it is 0.5",
        f"{tmp_path}/config.yaml was made with other settings; "
        f"use another run.name, or remove {tmp_path} to make it again",
    )
    assert load(TrainRoot, tmp_path / "config.yaml") == first


def check_faults(world_size: int, *overrides: str) -> list[str]:
    config = compose(TrainRoot, "train", [*TINY, *overrides])
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
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
        "parallel.sequence=3 cannot share 4 query and 4 key/value heads; use one of [1, 2, 4]"
    )


def test_data_parallel_size_must_divide_the_group() -> None:
    (fault,) = check_faults(2, "training.same_kind_segments=1")
    assert fault.startswith(
        "training.same_kind_segments=1 must be a multiple of the data-parallel size 2"
    )


def test_all_faults_come_together() -> None:
    found = check_faults(2, "training.learning_rate=-1", "target_len=100", "parallel.sequence=3")
    assert len(found) >= 3
