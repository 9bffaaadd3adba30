"""Corpora: stable ids, disjoint splits, files read as they are, faults named."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from longrope2.corpora.build import build_corpus, heldout_documents, heldout_texts
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document, Split, split_of
from longrope2.corpora.folder import FolderCorpus
from longrope2.corpora.losses import Losses
from longrope2.corpora.sample import SampleCorpus
from longrope2.errors import ConfigError, DataError


def test_splits_are_disjoint_and_about_five_percent():
    texts = [f"text {n}" for n in range(20_000)]
    heldout = [t for t in texts if split_of_text(t) is Split.heldout]
    assert 0.045 < len(heldout) / len(texts) < 0.055
    assert heldout == [t for t in texts if split_of_text(t) is Split.heldout]


def split_of_text(text, fraction=0.05, *, doc_id="some", group=None):
    return split_of(Document(doc_id, text, "s", "d", group), fraction)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_heldout_fraction_of_a_folder(tmp_path, fraction):
    for n in range(200):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    config = CorpusConfig(
        name="mine", kind=CorpusKind.folder, folder=str(tmp_path), heldout_fraction=fraction
    )
    corpus = build_corpus(config)
    train, heldout = (
        {d.doc_id for d in corpus.documents(split)} for split in (Split.train, Split.heldout)
    )
    assert not train & heldout and train | heldout == {f"folder/{n}.txt" for n in range(200)}
    assert abs(len(heldout) / 200 - fraction) <= (0.1 if 0 < fraction < 1 else 0)
    if fraction == 0.3:  # a larger fraction only adds documents
        texts = {f"folder/{n}.txt": f"text {n}" for n in range(200)}
        smaller = {i for i, text in texts.items() if split_of_text(text) is Split.heldout}
        assert smaller and heldout > smaller


def test_heldout_fraction_of_the_sample_corpus():
    whole = build_corpus(CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=1.0))
    first = [d.doc_id for d in whole.read(whole.units()[0], Losses())]
    assert [d.doc_id for d in itertools.islice(whole.documents(Split.heldout), len(first))] == first


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_impossible_heldout_fraction(fraction):
    with pytest.raises(
        ConfigError, match=f"corpus.heldout_fraction={fraction} must be from 0 to 1"
    ):
        build_corpus(CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=fraction))


@pytest.mark.parametrize("name", ["books", "pg19"])
def test_corpora_that_only_serve_search(tmp_path, name):
    composed = yaml.safe_load((Path("conf/corpus") / f"{name}.yaml").read_text())
    config = CorpusConfig(
        **{**composed, "kind": CorpusKind(composed["kind"]), "folder": str(tmp_path)}
    )
    (tmp_path / "a.txt").write_text("a book")
    assert [(d.doc_id, d.text) for d in heldout_documents(config)] == [("folder/a.txt", "a book")]
    assert not list(build_corpus(config).documents(Split.train))


def test_sample_corpus():
    corpus = SampleCorpus()
    train, heldout = list(corpus.documents(Split.train)), list(corpus.documents(Split.heldout))
    ids = [d.doc_id for d in train + heldout]
    assert len(set(ids)) == len(ids) > 300
    assert {d.source for d in train} == {d.source for d in heldout} == set(corpus.sources)
    assert not {d.text for d in train} & {d.text for d in heldout}
    assert {d.doc_id for d in corpus.reserved()} == {d.doc_id for d in heldout}
    assert "stdlib_modules/json/decoder.py" in ids
    assert not any("/test" in i or "site-packages" in i for i in ids)
    assert corpus.describe() == SampleCorpus().describe()
    assert corpus.describe()["num_documents"] == len(ids)


def test_sample_texts_are_the_files():
    import json.decoder
    import pathlib

    documents = {d.doc_id: d.text for split in Split for d in SampleCorpus().documents(split)}
    assert json.decoder.__file__ is not None
    assert documents["stdlib_modules/json/decoder.py"] == pathlib.Path(
        json.decoder.__file__
    ).read_text("utf-8")


def folder_texts(folder, text_field="text"):
    corpus = FolderCorpus(str(folder), text_field=text_field)
    return {d.doc_id: d.text for split in Split for d in corpus.documents(split)}


def test_folder_corpus_reads_every_kind(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a\r\n text\n", newline="")
    lines = [json.dumps({"text": text}) for text in ("one", "two", " ")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as handle:
        handle.write(lines[0] + "\n")
    pq.write_table(pa.table({"text": ["p", "q"], "other": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert folder_texts(tmp_path) == {
        "folder/sub/a.txt": "a\n text\n",
        "folder/b.jsonl:0": "one",
        "folder/b.jsonl:1": "two",
        "folder/c.jsonl.gz:0": "one",
        "folder/d.parquet:0": "p",
        "folder/d.parquet:1": "q",
    }
    described = FolderCorpus(str(tmp_path), text_field="text").describe()
    assert set(described["files"]) == {"sub/a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"}


@pytest.mark.parametrize(
    ("name", "content", "texts", "counts"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', ["x"], {"no text": 1}),
        ("a.jsonl", b'{"text": "x"\n["y"]\n{"text": "z"}', ["z"], {"bad json": 2}),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ["x"], {"invalid utf-8": 1}),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-9],
            ["x"] * 100,
            {"truncated file": 1},
        ),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n')[:-3], [], {"truncated file": 1}),
        ("a.jsonl.gz", b"nonsense", [], {"damaged file": 1}),
        ("a.txt", b"\xff\xfe\xff", [], {"invalid utf-8": 1}),
        ("a.txt", b" \n", [], {"empty text": 1}),
        ("a.parquet", b"nonsense", [], {"damaged file": 1}),
    ],
)
def test_folder_counts_what_is_at_fault(tmp_path, name, content, texts, counts):
    (tmp_path / name).write_bytes(content)
    corpus, skipped = FolderCorpus(str(tmp_path), text_field="text"), Losses()
    assert [d.text for unit in corpus.units() for d in corpus.read(unit, skipped)] == texts
    assert skipped == counts


def test_heldout_texts_tell_what_was_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n')
    config = CorpusConfig(
        name="mine", kind=CorpusKind.folder, folder=str(tmp_path), heldout_fraction=1.0
    )
    assert heldout_texts(config) == ["x"]
    assert capsys.readouterr().err == "corpus mine, records left out while reading: 1 empty text\n"


def test_text_field_that_no_first_record_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(ConfigError) as error:
        folder_texts(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl: its first records have no text in 'text' (their fields: body, id); "
        "set corpus.text_field, or more_text_fields=[...] beside it"
    )
    assert folder_texts(tmp_path, "body") == {"folder/a.jsonl:0": "x"}


def test_parquet_without_the_field(tmp_path):
    pq.write_table(pa.table({"body": ["p"], "id": [1]}), tmp_path / "d.parquet")
    with pytest.raises(
        ConfigError,
        match=r"d.parquet: its first records have no text in 'text' \(their fields: body, id\)",
    ):
        folder_texts(tmp_path)
    assert folder_texts(tmp_path, "body") == {"folder/d.parquet:0": "p"}


def test_titles_stand_in_the_ids(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x", "title": "One Book"}\n{"text": "y", "title": " "}\n'
    )
    pq.write_table(pa.table({"text": ["p"], "title": ["Two"]}), tmp_path / "b.parquet")
    corpus = FolderCorpus(str(tmp_path), text_field="text", title_field="title")
    found = {d.doc_id for split in Split for d in corpus.documents(split)}
    assert found == {"folder/a.jsonl:0 One Book", "folder/a.jsonl:1", "folder/b.parquet:0 Two"}
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError) as error:
        FolderCorpus(str(tmp_path), text_field="text", title_field="title")
    words = "its first records have no text in 'title' (their fields: text); set corpus.title_field"
    assert error.value.faults == (f"{tmp_path}/a.jsonl: {words}", f"{tmp_path}/b.parquet: {words}")


def test_folder_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="corpus.folder=/no/such is not a folder"):
        FolderCorpus("/no/such", text_field="text")
    with pytest.raises(
        ConfigError, match=r"holds no file ending in \.txt, \.txt\.gz, .* \.jsonl, .* \.parquet"
    ):
        FolderCorpus(str(tmp_path), text_field="text")
    with pytest.raises(ConfigError, match="corpus.folder is not set"):
        build_corpus(CorpusConfig(name="folder", kind=CorpusKind.folder))


def test_heldout_texts(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    config = CorpusConfig(name="mine", kind=CorpusKind.folder, folder=str(tmp_path))
    assert split_of_text("only one") is Split.train
    words = (
        r"no document fell into the held-out split \(corpus.heldout_fraction=0.05\); "
        "use a larger corpus, or a larger"
    )
    with pytest.raises(DataError, match=words):
        heldout_texts(config)
    sample = heldout_texts(CorpusConfig(name="sample", kind=CorpusKind.sample))
    assert sample == [d.text for d in SampleCorpus().documents(Split.heldout)]
