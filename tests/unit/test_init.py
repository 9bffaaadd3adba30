"""``launch.init``: what it writes for a model and documents is taken by every stage, or refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from own_model import WINDOW, make_documents, make_model

from data_prep.config import PackConfig, ShortOverlong
from launch.init.__main__ import main
from launch.init.proposal import learning_rate
from longrope2.config import compose
from longrope2.corpora.corpus import Split
from longrope2.corpora.folder import FolderCorpus
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.errors import UserError
from longrope2.search.config import SearchRoot
from longrope2.training.config import TrainRoot
from longrope2.training.plan import resolve_run

LONG = (500, 900, 1200)
MIXED = {"short": 120, "long": 80, "long_words": LONG}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("own") / "my model")


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["launch.init", *words])
    main()


def given(model: Path, documents: Path, *words: str) -> list[str]:
    return [f"model.path={model}", f"corpus.folder={documents}", "target_len=1024", *words]


def test_an_experiment_for_every_stage(model, tmp_path, monkeypatch, capsys) -> None:
    documents = make_documents(tmp_path / "my documents", **MIXED)
    (documents / "a.pdf").write_text("no text")
    (documents / ".b.md").write_text("hidden")
    with (documents / next(documents.rglob("*.jsonl")).relative_to(documents)).open("a") as lines:
        lines.write("\n{torn")
    init(monkeypatch, *given(model, documents))
    out = capsys.readouterr().out
    path = Path("conf/experiment/my_model_1024.yaml")
    assert f"experiment in {path}; next: python -m data_prep.pack experiment=my_model_1024" in out
    words = ["experiment=my_model_1024"]
    train = compose(TrainRoot, "train", [*words, "dry_run=true"])
    assert "window 256 -> 1024" in resolve_run(train, 1).describe()
    assert (train.model.path, train.model.original_len) == (str(model), WINDOW)
    # Random weights find no needle, which was tried.
    assert "needle perplexity at 256 tokens" in out
    search = compose(SearchRoot, "search", words).search
    assert (search.objective.value, search.clip_losses) == ("perplexity", False)
    pack = compose(PackConfig, "pack", words)
    corpus = FolderCorpus(
        str(documents),
        text_field="text",
        heldout_fraction=pack.corpus.heldout_fraction,
        more_text_endings=[".md"],
    )
    assert pack.corpus.more_text_endings == [".md"]
    assert "note: files that are not read: 1 .pdf; those that are plain text can be" in out
    assert "note: not read either: 1 hidden" in out
    assert "note: records that cannot be used: 1 bad json" in out
    encoder = load_document_tokenizer(model)
    held = [len(encoder.encode(d.text)) + 2 for d in corpus.documents(Split.heldout)]
    text = path.read_text()
    assert f"{len(held):,} documents, {sum(held):,} tokens, at least 2.5 times" in text
    assert sum(held) >= 2.5 * 1024
    assert "files: 1 .jsonl, 67 .md, 67 .txt; 200 documents read" in text
    assert "the heads allow 1, 3" in text


def test_what_was_given_is_kept(model, tmp_path, monkeypatch, capsys) -> None:
    documents = make_documents(tmp_path / "docs", **MIXED)
    more = ["run.root=/r", "seed=3", "model.dropout=0", "corpus.heldout_characters=99000"]
    init(monkeypatch, *given(model, documents, "run.name=x", *more))
    config = compose(SearchRoot, "search", ["experiment=x"])
    assert (config.run.root, config.seed, config.model.dropout) == ("/r", 3, 0)
    assert config.corpus.heldout_characters == 99_000


def test_each_value_has_its_reason(model, tmp_path, monkeypatch, capsys) -> None:
    documents = make_documents(tmp_path / "docs", **MIXED)
    init(monkeypatch, *given(model, documents, "dry_run=true", "run.name=x"))
    printed = capsys.readouterr().out
    text = printed[printed.index("# Made by") :]
    assert not Path("conf").exists()
    body = yaml.safe_load(text)
    assert body["run"] == {"name": "x"}
    lines = text.splitlines()
    for number, line in enumerate(lines):
        assert len(line) <= 100 or str(documents) in line or str(model) in line
        if re.fullmatch(r" *\w+: .+", line) and line.strip() != 'name: "my_model"':
            assert lines[number - 1].strip().startswith("#"), line


def test_two_processes_work_on_a_segment_each(model, tmp_path, monkeypatch) -> None:
    """Three heads cannot be shared by two processes; the layout and the batch follow."""
    documents = make_documents(tmp_path / "docs", **MIXED)
    init(monkeypatch, *given(model, documents, "processes=2", "file=my experiments/a=b.yaml"))
    config = compose(TrainRoot, "train", ["experiment=my experiments/a=b.yaml", "dry_run=true"])
    parallel, training = config.parallel, config.training
    assert (parallel.processes, parallel.sequence, training.same_kind_segments) == (2, 1, 2)
    assert training.global_batch_tokens % (2 * 1024) == 0
    assert resolve_run(config, 2).micro_steps >= 1


@pytest.mark.slow
def test_for_another_machine_the_planner_chooses(model, tmp_path, monkeypatch) -> None:
    documents = make_documents(tmp_path / "docs", **MIXED)
    words = given(model, documents, "hardware=a100_64", "processes=3", "run.name=x")
    init(monkeypatch, *words)
    config = compose(TrainRoot, "train", ["experiment=x", "dry_run=true"])
    assert config.parallel.processes == 3
    assert resolve_run(config, 3).world_size == 3
    assert compose(SearchRoot, "search", ["experiment=x"]).search.algorithm.value == "longrope2"


@pytest.mark.slow
def test_no_short_documents(model, tmp_path, monkeypatch, capsys) -> None:
    documents = make_documents(tmp_path / "docs", short=0, long=60, long_words=LONG)
    init(monkeypatch, *given(model, documents, "run.name=x"))
    note = capsys.readouterr().out.split("note: ")[1]
    assert re.match(r"0 of \d+ documents are short, of at most model.original_len=256", note)
    config = compose(PackConfig, "pack", ["experiment=x"])
    quota = config.quotas["folder"]
    assert config.short_overlong is ShortOverlong.split
    assert quota.short and quota.long and 0.25 < quota.short / (quota.short + quota.long) < 0.35


@pytest.mark.slow
def test_no_long_documents(model, tmp_path, monkeypatch, capsys) -> None:
    documents = make_documents(tmp_path / "docs", short=400, long=0, long_words=LONG)
    init(monkeypatch, *given(model, documents, "run.name=x"))
    out = capsys.readouterr().out
    assert re.search(r"note: 0 of \d+ documents are long, above model.original_len=256", out)
    assert re.search(r"the longest held-out document has \d+ tokens: text and needles", out)
    config = compose(PackConfig, "pack", ["experiment=x"])
    assert config.quotas["retrieval"].long and config.quotas["retrieval"].short == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["target_len=1000"], "target_len=1000 must be a multiple of model.original_len=256, and"),
        (["target_len=65536"], "less than the 163,840 that search and evaluation need at target"),
        (["processes=0"], "processes=0 must be at least 1, or null"),
        (["most_characters=0"], "most_characters=0 must be at least 1"),
        (["file=x.txt"], "file=x.txt must end in .yaml"),
        (["corpus.folder=nope"], "corpus.folder=nope is not a folder"),
        (["corpus=sample"], "launch.init looks at documents of your own: give corpus.folder=FOLD"),
        (["processes=512"], "no layout of 512 processes of this machine can train this model"),
        (["run.name=tiny"], "conf/experiment/tiny.yaml is there already: give run.name=NAME or"),
        (["model.path=nope/nope"], "model.path=nope/nope is neither a folder"),
    ],
)
def test_refused_by_name(words, fault, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = make_documents(tmp_path / "docs", **MIXED)
    keys = {word.partition("=")[0]: word for word in given(model, documents)}
    if words == ["corpus=sample"]:
        del keys["corpus.folder"]
    keys |= {word.partition("=")[0]: word for word in words}
    with pytest.raises(UserError) as caught:
        init(monkeypatch, *keys.values())
    assert fault in str(caught.value)
    assert not Path("conf").exists()


def test_an_experiment_that_is_there_stays(model, tmp_path, monkeypatch) -> None:
    documents = make_documents(tmp_path / "docs", **MIXED)
    Path("mine.yaml").write_text("# precious\n")
    with pytest.raises(UserError, match="mine.yaml is there already: give run.name=NAME or file="):
        init(monkeypatch, *given(model, documents, "file=mine.yaml"))
    assert Path("mine.yaml").read_text() == "# precious\n"


def test_a_window_that_is_stated_nowhere(model, tmp_path, monkeypatch) -> None:
    documents = make_documents(tmp_path / "docs", **MIXED)
    words = given(model, documents, "model.config={max_position_embeddings: null}")
    with pytest.raises(UserError, match="states no window .*give model.original_len=TOKENS"):
        init(monkeypatch, *words)


def test_learning_rates_of_the_two_models_that_are_known() -> None:
    assert learning_rate(8_030_000_000) == 2e-5
    assert learning_rate(1_100_000) == 1e-3 and learning_rate(1000) == 1e-3
    assert np.isclose(learning_rate(94_000_000), (2e-5 * 1e-3) ** 0.5, rtol=0.02)
