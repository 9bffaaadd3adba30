"""``run.from_run``: another run's segments and factors, remembered, and refused where senseless."""

from pathlib import Path

import pytest

from data_prep.config import PackConfig
from data_prep.pack import check as check_pack
from longrope2.claim import claim_folder
from longrope2.config import RunConfig, compose, load
from longrope2.errors import ConfigError
from longrope2.files.artifacts import find_segments, product_folder, run_with
from longrope2.report.data import load_run
from longrope2.report.training import limits
from longrope2.training.before import segments_folder
from longrope2.training.config import TrainRoot

TINY = ("model=tiny", "target_len=256")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs: ``first/base`` with segments and factors, ``bare`` with nothing."""
    for product in ("segments", "factors"):
        product_folder(tmp_path / "first" / "base", product).mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    return tmp_path


def config(runs: Path, name: str, *more: str) -> TrainRoot:
    return compose(TrainRoot, "train", [*TINY, f"run.root={runs}", f"run.name={name}", *more])


def claim(runs: Path, name: str, *more: str) -> RunConfig:
    found = config(runs, name, *more)
    claim_folder(product_folder(found.run.folder, "checkpoints"), found)
    return found.run


def test_products_of_another_run(runs: Path) -> None:
    run = config(runs, "new", "run.from_run=first/base").run
    base = runs / "first" / "base"
    assert run.folder_with("segments") == run.folder_with("factors") == base
    assert run.describe_source() == f"segments of {base}, factors of {base}"


def test_what_the_run_has_itself_comes_first(runs: Path) -> None:
    product_folder(runs / "new", "factors").mkdir(parents=True)
    run = config(runs, "new", "run.from_run=first/base").run
    assert run.folder_with("factors") == runs / "new"
    assert run.folder_with("segments") == runs / "first" / "base"
    assert run.describe_source() == f"segments of {runs / 'first' / 'base'}"


def test_without_it_nothing_is_taken(runs: Path) -> None:
    run = config(runs, "new").run
    assert run.folder_with("segments") == runs / "new" and run.describe_source() == ""


def test_it_is_remembered_and_a_run_of_runs_leads_to_the_first(runs: Path) -> None:
    claim(runs, "second", "run.from_run=first/base")
    assert config(runs, "second").run.from_run == "first/base"
    third = claim(runs, "deep/er/third", "run.from_run=second")
    assert third.folder_with("segments") == runs / "first" / "base"
    assert run_with(third.folder, "factors") == runs / "first" / "base"
    # The same command, without the key or with it, is the same run; ranks read what was written.
    assert claim(runs, "deep/er/third").from_run == "second"
    written = load(TrainRoot, product_folder(third.folder, "checkpoints") / "config.yaml")
    assert written.run.from_run == "second"


def test_segments_that_the_other_run_was_given_are_passed_on(runs: Path, tmp_path: Path) -> None:
    """``segments=`` stands for what a run was trained on; factors are not of that."""
    elsewhere = tmp_path / "packed" / "elsewhere"
    claim(runs, "first/base", f"segments={elsewhere}")
    new = config(runs, "new", "run.from_run=first/base")
    assert segments_folder(new) == elsewhere
    taken = f"segments in {elsewhere}, factors of {runs / 'first' / 'base'}"
    assert new.run.describe_source() == taken
    claim(runs, "new", "run.from_run=first/base")
    third = config(runs, "third", "run.from_run=new")
    assert segments_folder(third) == elsewhere
    assert find_segments(runs / "new") == elsewhere
    # Its own come first, and another setting before all.
    product_folder(runs / "third", "segments").mkdir(parents=True)
    assert segments_folder(third) == product_folder(runs / "third", "segments")
    third.segments = "x"
    assert segments_folder(third) == Path("x")


def test_runs_may_be_moved(runs: Path, tmp_path: Path) -> None:
    claim(runs, "second", "run.from_run=first/base")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("first", "second"):
        (runs / name).rename(moved / name)
    assert run_with(moved / "second", "segments") == moved / "first" / "base"
    assert config(moved, "second").run.from_run == "first/base"


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("new", "old", "run.from_run=old: {runs}/old does not exist; give the name of a run in"),
        ("new", "../x", "run.from_run=../x must name a run below run.root={runs}"),
        ("second", "bare", "run.from_run=bare, but {runs}/second takes from first/base; use"),
        ("bare", "bare", "run.from_run=bare takes from bare itself; name another run"),
        ("first/base", "second", "run.from_run=second takes from first/base itself; name another"),
    ],
)
def test_sources_that_cannot_be(runs: Path, name: str, source: str, words: str) -> None:
    claim(runs, "second", "run.from_run=first/base")
    with pytest.raises(ConfigError) as refused:
        config(runs, name, f"run.from_run={source}")
    assert words.format(runs=runs) in str(refused.value)


def test_the_word_that_the_key_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"unknown key run\.from; it is run\.from_run now"):
        compose(TrainRoot, "train", [*TINY, "run.from=old"])


def test_a_changed_key_names_the_way(runs: Path) -> None:
    claim(runs, "second", "run.from_run=first/base")
    with pytest.raises(ConfigError) as refused:
        claim(runs, "second", "training.learning_rate=0.5")
    text = str(refused.value)
    assert "training.learning_rate was 2e-05, now it is 0.5" in text
    assert "run.from_run=second lets the new run take this one's segments and factors" in text
    with pytest.raises(ConfigError) as refused:
        claim(runs, "second", "target_len=512")
    assert "run.from_run" not in str(refused.value)  # neither fits another window


def test_packing_is_refused(runs: Path) -> None:
    given = ["corpus=sample", f"run.root={runs}", "run.name=new", "run.from_run=first/base"]
    asked = compose(PackConfig, "pack", [*TINY, *given, "align=3"])
    with pytest.raises(ConfigError) as refused:
        check_pack(asked)
    assert (
        "run.from_run=first/base: the run takes that one's segments; pack under another run.name"
        in refused.value.faults
    )
    assert len(refused.value.faults) == 2


def test_the_report_says_where_products_come_from(runs: Path) -> None:
    claim(runs, "second", "run.from_run=first/base")
    record = load_run(runs / "second")
    base = runs / "first" / "base"
    assert record.taken_from == {"segments": base, "factors": base}
    assert f"The segments were made in another run: {base}." in limits(record)
    assert load_run(runs / "second").stages["checkpoints"].started
