"""One corpus per run: taken from the segments, refused where it cannot be, named where another."""

from pathlib import Path

import pytest

from longrope2.config import compose, to_plain
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.run_corpus import (
    HeldoutText,
    corpus_of_run,
    heldout_text,
    packed_corpus,
    segments_of,
)
from longrope2.errors import ConfigError
from longrope2.evaluation.config import EvaluateRoot, check
from longrope2.export.run import Export, cost_in_words, find_export
from longrope2.export.variants import ExportRoot
from longrope2.files.artifacts import Manifest, describe_input, write_manifest
from longrope2.search import prepare
from longrope2.search.config import SearchRoot

TINY = ["model=tiny", "target_len=256"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "my texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text number {number}")
    return folder


def corpus_in(folder: Path, **changes: object) -> CorpusConfig:
    given = {"name": "folder", "kind": CorpusKind.folder, "folder": str(folder), **changes}
    return CorpusConfig(**given)  # pyright: ignore[reportArgumentType]


def pack(run: Path, corpus: CorpusConfig, name: str = "1_segments") -> Path:
    """The manifest of segments that were packed from a corpus."""
    inputs = {"corpus": {"name": corpus.name, **build_corpus(corpus).describe()}}
    config = {"corpus": to_plain(corpus)}
    write_manifest(run / name, Manifest("segments", inputs=inputs, config=config))
    return run / name


def test_the_corpus_of_the_segments_unless_another_is_given(tmp_path: Path, texts: Path) -> None:
    own = corpus_in(texts, heldout_fraction=0.3, more_text_endings=[".md"])
    pack(tmp_path / "r", own)
    assert corpus_of_run(None, tmp_path / "r") == own == packed_corpus(tmp_path / "r")
    other = CorpusConfig("sample", CorpusKind.sample)
    assert corpus_of_run(other, tmp_path / "r") is other
    assert corpus_of_run(other, tmp_path / "without segments") is other


def test_a_run_without_segments_must_be_given_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        corpus_of_run(None, tmp_path)
    assert str(refused.value) == (
        f"corpus is not chosen, and {tmp_path}/1_segments holds no segments to take it from; give "
        "corpus=NAME, for example corpus=sample (the Python standard library) or corpus=folder "
        "corpus.folder=DIR, or run data_prep.pack first"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "corpus=folder corpus.folder=DIR"),
        (
            {"name": "mine", "heldout_fraction": 0.3, "text_field": "body"},
            "corpus=folder corpus.folder=DIR corpus.name=mine corpus.text_field=body "
            "corpus.heldout_fraction=0.3",
        ),
        (
            {"more_text_endings": [".md"]},
            "corpus=folder corpus.folder=DIR corpus.more_text_endings=[.md]",
        ),
    ],
)
def test_a_folder_that_was_moved(
    tmp_path: Path, texts: Path, changes: dict[str, object], words: str
) -> None:
    """The message's own words, with the new place, give the same corpus, which is the run's own."""
    own = corpus_in(texts, **changes)
    segments = pack(tmp_path / "r", own)
    texts.rename(tmp_path / "moved")
    with pytest.raises(ConfigError) as refused:
        corpus_of_run(None, tmp_path / "r")
    assert str(refused.value) == (
        f"{segments} was packed from corpus.folder={texts}, which is not there any more; give its "
        f"new place: {words}"
    )
    given = words.replace("DIR", str(tmp_path / "moved")).replace(" corpus.", "\0corpus.")
    made = compose(SearchRoot, "search", [*TINY, *given.split("\0")]).corpus
    assert made == corpus_in(tmp_path / "moved", **changes)
    text = heldout_text(made, build_corpus(made).describe(), tmp_path / "r")
    assert not text.is_other and str(text).endswith(", the run's own.")


def test_a_larger_share_of_what_was_packed_is_refused(tmp_path: Path, texts: Path) -> None:
    segments = pack(tmp_path / "r", corpus_in(texts, heldout_fraction=0.1))
    with pytest.raises(ConfigError) as refused:
        corpus_of_run(corpus_in(texts, heldout_fraction=0.2), tmp_path / "r")
    assert str(refused.value) == (
        f"corpus.heldout_fraction=0.2 is more than the 0.1 that {segments} left out, so that texts "
        "in the segments would count as held out; use at most 0.1, or pack again with more"
    )
    corpus_of_run(corpus_in(texts, heldout_fraction=0.1), tmp_path / "r")


def test_a_manifest_with_keys_of_another_version(tmp_path: Path) -> None:
    corpus = {"name": "x", "kind": "sample", "gone": 1}
    write_manifest(tmp_path / "1_segments", Manifest("segments", config={"corpus": corpus}))
    with pytest.raises(ConfigError, match=r"unknown key gone; .*; give corpus=NAME$"):
        corpus_of_run(None, tmp_path)


def test_which_text_it_is(tmp_path: Path, texts: Path) -> None:
    own, run = corpus_in(texts), tmp_path / "r"
    description = build_corpus(own).describe()
    label = f"folder ({texts})"
    assert heldout_text(own, description, run) == HeldoutText(label, None, is_other=False)
    assert (
        str(HeldoutText("a", None, False)) == "Text: held out of corpus a; the run has no segments."
    )
    pack(run, own)
    assert str(heldout_text(own, description, run)) == (
        f"Text: held out of corpus {label}, the run's own."
    )
    sample = CorpusConfig("sample", CorpusKind.sample)
    assert str(heldout_text(sample, {"python": "3"}, run)) == (
        f"Text: held out of corpus sample, not of the run's own corpus, {label}."
    )
    (texts / "0.txt").write_text("other words")
    assert str(heldout_text(own, build_corpus(own).describe(), run)) == (
        f"Text: held out of corpus {label}, which has changed since the run's segments were packed."
    )


def test_segments_of_another_run_that_a_checkpoint_was_trained_on(
    tmp_path: Path, texts: Path
) -> None:
    run, elsewhere = tmp_path / "r", pack(tmp_path / "other", corpus_in(texts))
    assert segments_of(run) is None
    trained = Manifest("checkpoints", inputs={"segments": describe_input(elsewhere)})
    write_manifest(run / "3_checkpoints", trained)
    assert segments_of(run) == elsewhere
    own = pack(run, corpus_in(texts, name="own"))
    assert segments_of(run) == elsewhere
    trained.inputs = {"segments": {**describe_input(own), "path": str(elsewhere)}}
    write_manifest(run / "3_checkpoints", trained)  # moved: the same manifest stands in the run
    assert segments_of(run) == own
    trained.inputs = {"segments": {"path": str(tmp_path / "gone"), "sha256": "0"}}
    write_manifest(run / "3_checkpoints", trained)
    assert segments_of(run) == own


def test_search_evaluation_and_export_read_it(tmp_path: Path, texts: Path) -> None:
    own = corpus_in(texts, heldout_fraction=0.4)
    words = [*TINY, f"run.root={tmp_path}", "run.name=r"]
    search = compose(SearchRoot, "search", [*words, "search=quick"])
    short = "evaluation.perplexity.scored_tokens=8"
    evaluate = compose(EvaluateRoot, "evaluate", [*words, short])
    untrained = ["export.trained=false", "rope=pi"]
    export = compose(ExportRoot, "export", [*words, *untrained])
    for checks in (lambda: prepare.check(search), lambda: check(evaluate)):
        with pytest.raises(ConfigError, match="1_segments holds no segments to take it from"):
            checks()
    assert cost_in_words(find_export(export)) == (
        f"of a static choice: not measured, {tmp_path}/r/1_segments holds no segments whose corpus "
        "could give the texts; corpus=NAME names one"
    )
    pack(tmp_path / "r", own)
    prepare.check(search)
    check(evaluate)
    found = find_export(export)
    assert search.text == evaluate.text == found.corpus == own
    held = f"of a static choice: on 8 texts held out of corpus folder ({texts})"
    assert cost_in_words(found) == held
    none = compose(ExportRoot, "export", [*words, *untrained, "export.cost_windows=0"])
    off = Export(none, found.checkpoint, found.factors, {})
    assert cost_in_words(off) == "of a static choice: not measured (export.cost_windows=0)"
    texts.rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match="DIR.*, or export.cost_windows=0, which measures nothing"
    ):
        find_export(export)
    assert find_export(none).corpus is None


def test_tasks_that_need_no_text_need_no_corpus(tmp_path: Path) -> None:
    words = [*TINY, f"run.root={tmp_path}", "evaluation.perplexity.scored_tokens=8"]
    config = compose(EvaluateRoot, "evaluate", [*words, "suite=short"])
    assert not config.reads_text
    try:
        check(config)
    except ConfigError as error:  # where lm-eval is not installed
        assert error.faults[0].startswith("suite.short_tasks.tasks needs lm-eval")
        assert len(error.faults) == 1
    assert config.corpus is None and to_plain(config)["corpus"] is None
