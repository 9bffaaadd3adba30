"""What a pack says in its last lines: missing halves, files not read, too little held-out text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep import pack as pack_module
from data_prep.config import PackConfig
from data_prep.notices import HeldOut, Kinds, notices
from longrope2.config import compose
from longrope2.corpora.build import build_corpus, files_aside, ignored_files
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.errors import ConfigError
from longrope2.files.artifacts import read_manifest

BOTH = Kinds(2000, 2000, num_short=3, num_long=3)
FOLDER = ["model=tiny", "target_len=512", "run.name=x", "corpus=folder", "corpus.folder=."]
SHORT_MISSING = (
    "no short segments: the short window, up to 128 tokens, will not be trained; no documents of "
    "at most 128 tokens are there. short_overlong=split cuts some of the longer documents into "
    "windows of 128 tokens; or add more short text"
)


def of(kinds: Kinds, *overrides: str, **more: Any) -> list[str]:
    config = compose(PackConfig, "pack", [*FOLDER, *overrides])
    return notices(config, kinds, more.get("ignored", {}), more.get("held_out"))


def test_nothing_to_say() -> None:
    enough = HeldOut(num_documents=4, tokens=1024, longest_tokens=512)
    assert of(BOTH, held_out=enough) == []
    unknown = Kinds(None, None, num_short=None, num_long=None)
    assert of(unknown) == []


@pytest.mark.parametrize(
    ("kinds", "overrides", "expected"),
    [
        (Kinds(0, 2000, 0, 3), [], SHORT_MISSING),
        (
            Kinds(400, 2000, 0, 3),
            ["short_overlong=split"],
            "no short segments: the short window, up to 128 tokens, will not be trained; documents "
            "of at most 128 tokens are there with 400 tokens, too few for one segment. Add more "
            "text",
        ),
        (
            Kinds(0, 2000, 0, 3),
            ["quotas.folder.short=0"],
            "no short segments: the short window, up to 128 tokens, will not be trained; none are "
            "asked for. Set quotas.SOURCE.short=TOKENS",
        ),
        (
            Kinds(2000, 0, 3, 0),
            [],
            "no long segments: the long window, up to 512 tokens, will not be trained; no "
            "documents of more than 128 tokens are there. Add longer texts, best of 512 tokens and "
            "more; quotas.retrieval.long=TOKENS generates needle documents of them",
        ),
        (
            Kinds(2000, 0, 3, 0),
            ["+mixture.sources.folder=10", "mixture.buckets.short=10"],
            "no long segments: the long window, up to 512 tokens, will not be trained; none are "
            "asked for. Set mixture.buckets.long=TOKENS",
        ),
    ],
)
def test_a_kind_that_is_missing(kinds: Kinds, overrides: list[str], expected: str) -> None:
    assert of(kinds, *overrides) == [expected]


def test_pre_training_at_one_window_misses_nothing() -> None:
    assert of(Kinds(2000, 0, 3, 0), "target_len=128") == []


def test_files_that_are_not_read() -> None:
    assert of(BOTH, ignored={".md": 40, ".pdf": 3}) == [
        "files not read, by ending: 40 .md, 3 .pdf; corpus.more_text_endings=[.md] reads them as "
        "plain text"
    ]
    many = {f".e{number}": 1 for number in range(10)} | {"without ending": 9}
    (said,) = of(BOTH, ignored=many)
    assert said.startswith("files not read, by ending: 9 without ending, 1 .e0, ")
    assert said.endswith(", 3 with other endings; rename what is text")
    (said,) = of(BOTH, ignored={".json without a record per line": 2, ".csv": 1})
    array = "an array of records becomes lines with `jq -c '.[]' FILE > FILE.jsonl`"
    assert said.endswith(f"2 .json without a record per line, 1 .csv; {array}")


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (
            HeldOut(0, 0, 0),
            "no text is held out (corpus.heldout_fraction=0.05): search and evaluation read it; "
            "pack again with corpus.heldout_fraction=0.2, or more text",
        ),
        (
            HeldOut(3, 300, 200),
            "about 300 tokens are held out in 3 documents (corpus.heldout_fraction=0.05), a search "
            "needs 1,024, twice target_len: search and evaluation read it; pack again with "
            "corpus.heldout_fraction=0.18, or more text",
        ),
        (
            HeldOut(1, 30, 30),
            "about 30 tokens are held out in 1 documents (corpus.heldout_fraction=0.05), a search "
            "needs 1,024, twice target_len: search and evaluation read it; pack again with more "
            "text",
        ),
        (
            HeldOut(9, 2000, 300),
            "the longest text that is held out has about 300 tokens (corpus.heldout_fraction=0.05),"
            " text perplexity at target_len=512 needs one of that length: a larger "
            "corpus.heldout_fraction, longer texts, or shorter evaluation.lengths",
        ),
    ],
)
def test_too_little_held_out_text(held_out: HeldOut, expected: str) -> None:
    assert of(BOTH, held_out=held_out) == [expected]


@pytest.mark.parametrize("share", ["0.0", "1.0"])
def test_a_share_that_was_meant_to_hold_out_nothing_or_all(share: str) -> None:
    assert of(BOTH, f"corpus.heldout_fraction={share}", held_out=HeldOut(0, 0, 0)) == []


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """200 documents, all longer than the miniature's window: 90 .txt, 70 .md, 40 in a .jsonl."""
    folder, rng = tmp_path / "my documents", random.Random(0)
    folder.mkdir()

    def text() -> str:
        return " ".join(
            rng.choices("alpha beta gamma delta epsilon".split(), k=rng.randint(150, 400))
        )

    for ending, number in ((".txt", 90), (".md", 70)):
        for place in range(number):
            (folder / f"{place:03d}{ending}").write_text(text())
    lines = [json.dumps({"text": text()}) for _ in range(40)]
    (folder / "many.jsonl").write_text("\n".join(lines))
    (folder / ".hidden.md").write_text(text())
    return folder


def packed(folder: Path, root: Path, capsys: Any, *more: str) -> tuple[str, Path]:
    """What the command printed, and its product."""
    words = ["--target", "512", "--corpus", "folder", f"corpus.folder={folder}"]
    pack_module.main([*words, f"run.root={root}", "run.name=x", *more])
    return capsys.readouterr().out, root / "x" / "1_segments"


def test_documents_without_a_short_one(documents: Path, tmp_path: Path, capsys: Any) -> None:
    """Said by the dry run, in the last lines, by the finished product again, and on its page."""
    ignored = "files not read, by ending: 70 .md; corpus.more_text_endings=[.md] reads them"
    printed, folder = packed(documents, tmp_path, capsys, "--dry-run")
    assert f"  expected: {SHORT_MISSING}\n" in printed and f"  expected: {ignored}" in printed
    printed, folder = packed(documents, tmp_path, capsys)
    last = printed.splitlines()[-2:]
    assert last[0] == f"note: {SHORT_MISSING}" and last[1].startswith(f"note: {ignored}")
    assert read_manifest(folder, "segments").counts["num_short_segments"] == 0
    assert SHORT_MISSING in (folder / "report.html").read_text()
    again, _ = packed(documents, tmp_path, capsys)
    assert "already complete" in again and again.splitlines()[-2:] == last


def test_the_remedies_work(documents: Path, tmp_path: Path, capsys: Any) -> None:
    more = ("short_overlong=split", "corpus.more_text_endings=[.md]")
    printed, folder = packed(documents, tmp_path, capsys, *more)
    counts = read_manifest(folder, "segments").counts
    assert "note:" not in printed and counts["num_short_segments"] and counts["num_long_segments"]
    held_out = counts["num_documents_untokenized"]["folder"]["held out for search and evaluation"]
    assert counts["num_documents_tokenized"]["folder"] + held_out == 200
    assert counts["num_files_not_read"] == {"hidden": 1} and "not read: 1 files, hidden" in printed


def test_held_out_text_is_counted(documents: Path, tmp_path: Path, capsys: Any) -> None:
    printed, _ = packed(documents, tmp_path, capsys, "corpus.heldout_fraction=0.001")
    expected = "note: no text is held out (corpus.heldout_fraction=0.001): search and evaluation"
    assert printed.splitlines()[-1].startswith(expected)


def test_ignored_files_by_ending(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.MD", "d.md.gz", "README", "e.pdf", ".git/f.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    config = CorpusConfig("mine", CorpusKind.folder, folder=str(tmp_path))
    others = {".pdf": 1, "without ending": 1}
    assert ignored_files(config) == {".md": 2, ".md.gz": 1, **others}
    assert files_aside(config) == {}
    config.more_text_endings = [".md"]
    assert ignored_files(config) == others and files_aside(config) == {"hidden": 1}
    names = [unit.name for unit in build_corpus(config).units()]
    assert names == ["a.txt", "b.md", "c.MD", "d.md.gz"]
    sample = CorpusConfig("sample", CorpusKind.sample)
    assert ignored_files(sample) == files_aside(sample) == {}
    config.more_text_endings = ["md"]
    with pytest.raises(
        ConfigError, match=r"more_text_endings=\['md'\]: an ending starts with a dot"
    ):
        build_corpus(config)


def test_a_folder_of_other_endings_only(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    config = CorpusConfig("mine", CorpusKind.folder, folder=str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        build_corpus(config)
    endings = [".txt", ".jsonl", ".ndjson", ".json"]
    packings = ["", ".gz", ".bz2", ".xz", ".zst", ".zstd"]
    read = ", ".join(f"{ending}{packing}" for ending in endings for packing in packings)
    assert str(refused.value) == (
        f"corpus.folder={tmp_path} holds no file ending in {read}, .parquet; .md, .markdown, .rst, "
        ".text are read where corpus.more_text_endings names them, as it does after launch.init; "
        "it holds 1 .md (corpus.more_text_endings=[.md] reads those)"
    )


def test_a_folder_of_files_that_are_no_text(tmp_path: Path) -> None:
    """After ``.md`` was asked for, it stands among the endings that are read."""
    (tmp_path / "a.pdf").write_bytes(b"")
    config = CorpusConfig("mine", CorpusKind.folder, folder=str(tmp_path))
    config.more_text_endings = [".md"]
    with pytest.raises(ConfigError) as refused:
        build_corpus(config)
    assert ", .md, .md.gz, .md.bz2, .md.xz, .md.zst, .md.zstd, .jsonl, " in str(refused.value)
    assert "; .markdown, .rst, .text are read where " in str(refused.value)
    said = "; it holds 1 .pdf (corpus.more_text_endings names those that are plain text)"
    assert str(refused.value).endswith(said)
    (tmp_path / "a.pdf").unlink()
    with pytest.raises(ConfigError, match="; it holds no file at all$"):
        build_corpus(config)
