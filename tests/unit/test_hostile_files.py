"""Files made to fill memory, ids made to collide, and what the system refuses."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pack_documents import Made, table_of
from public_corpora import page

from data_prep.candidates import find_candidates
from data_prep.config import DocumentsConfig
from data_prep.token_files import LengthBuckets
from longrope2.command import run_command
from longrope2.corpora import records, remote
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document
from longrope2.corpora.decoding import BLOCK_BYTES, DamagedData, TruncatedData, decoded
from longrope2.corpora.document_ids import CHANGED, with_unique_ids
from longrope2.corpora.losses import Losses
from longrope2.errors import ConfigError, DataError
from longrope2.system_errors import explain

BOMB_BYTES = 2**25
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    """32 MiB of one letter, packed."""
    return {packing: pack(b"x" * BOMB_BYTES) for packing, pack in PACKERS.items()}


def texts_of(location: Path) -> tuple[list[str], Losses]:
    skipped = Losses()
    return [r["text"] for _, r in records.json_records(str(location), skipped)], skipped


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_that_become_gigabytes(bombs, packing, tmp_path, monkeypatch) -> None:
    """The record is counted out, those before and after it are read, memory stays small."""
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2**22)
    pack, line = PACKERS[packing], b'{"text": "fine"}\n'
    (tmp_path / f"a.jsonl{packing}").write_bytes(pack(line) + bombs[packing] + pack(b"\n" + line))
    assert (tmp_path / f"a.jsonl{packing}").stat().st_size < BOMB_BYTES / 500
    tracemalloc.start()
    texts, skipped = texts_of(tmp_path / f"a.jsonl{packing}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["fine", "fine"] and skipped == {records.TOO_LONG: 1} and not skipped.files
    assert peak < 2**25
    sizes = map(len, decoded(f"a{packing}", iter([bombs[packing]])))
    assert max(sizes) < 10 * BLOCK_BYTES


@pytest.mark.parametrize("packing", PACKERS)
def test_every_cut_of_a_packed_file_is_noticed(packing: str) -> None:
    content = b"".join(b"%d %d\n" % (n, n * 7919) for n in range(40))
    packed = PACKERS[packing](content)
    for end in range(len(packed)):
        found = []
        with pytest.raises((TruncatedData, DamagedData)):
            found += decoded(f"a{packing}", iter([packed[:end]]))
        assert content.startswith(b"".join(found))
    one_by_one = (packed[n : n + 1] for n in range(len(packed)))
    assert b"".join(decoded(f"A{packing.upper()}", one_by_one)) == content


def test_a_small_parquet_file_with_a_document_of_many_megabytes(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2**24)
    monkeypatch.setattr(remote, "SMALL_GROUP_BYTES", 2**24)
    long = "x" * (records.MAX_RECORD_BYTES + 1)
    table = pa.table({"text": ["fine", long, "also fine"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 40_000
    skipped = Losses()
    assert not list(records.parquet_records(str(path), ["text"], skipped))
    assert skipped == {"parquet that grows more than 200-fold": 1}
    assert skipped.files[0].num_records == 0
    pq.write_table(table, path, compression="none", use_dictionary=False)
    skipped = Losses()
    rows = [(n, r["text"]) for n, r in records.parquet_records(str(path), ["text"], skipped)]
    assert rows == [(0, "fine"), (2, "also fine")] and skipped == {records.TOO_LONG: 1}


def test_values_of_a_dictionary_do_not_fill_memory(tmp_path, monkeypatch) -> None:
    """One long value that every row repeats: few rows are read at once, all rows are read."""
    value = np.random.default_rng(0).bytes(2**19).hex()
    pq.write_table(pa.table({"text": [value] * 200}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**21
    monkeypatch.setattr(remote, "BATCH_BYTES", 2**22)
    sizes = [b.nbytes for b in remote.parquet_batches(str(tmp_path / "a.parquet"), ["text"])]
    assert max(sizes) <= 5 * 2**20
    read = records.parquet_records(str(tmp_path / "a.parquet"), ["text"], Losses())
    assert sum(record["text"] == value for _, record in read) == 200


def test_numbers_of_thousands_of_digits_and_deep_nesting(tmp_path) -> None:
    digits, nested = "9" * 5000, "[" * 100_000
    lines = ['{"text": "a"}', f'{{"text": "b", "n": {digits}}}', f'{{"text": {nested}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts, skipped = texts_of(tmp_path / "a.jsonl")
    assert texts == ["a"]
    expected = {"number of too many digits": 1, "json nested too deeply": 1, "bad json": 1}
    assert skipped == expected


def test_a_length_of_thousands_of_digits_in_redpajama_v2(tmp_path) -> None:
    (tmp_path / "documents/2023-06/0000").mkdir(parents=True)
    (tmp_path / "duplicates/2023-06/0000").mkdir(parents=True)
    lines = [page("short"), page("x").replace('"length": 1,', f'"length": {"9" * 5000},')]
    place = tmp_path / "documents/2023-06/0000/en_head.json.gz"
    place.write_bytes(gzip.compress("\n".join(lines).encode()))
    listed = pa.table({"doc_id": ["a/" + "9" * 5000, "a/\u0663", "nothing", None]})
    pq.write_table(listed, tmp_path / "duplicates/2023-06/0000/en_head.duplicates.parquet")
    config = CorpusConfig("m", CorpusKind.redpajama_v2)
    config.redpajama_v2.root = str(tmp_path)
    config.redpajama_v2.short_characters, config.redpajama_v2.short_survival = 10, 1.0
    corpus, skipped = build_corpus(config), Losses()
    found = [d.text for unit in corpus.units() for d in corpus.read(unit, skipped)]
    faults = {"number of too many digits": 1, "list of duplicates, no row in doc_id (kept)": 3}
    assert found == ["short"] and skipped == faults


def unique(ids: list[str]) -> tuple[list[str], Losses]:
    skipped = Losses()
    documents = (Document(doc_id, "text", "s", "d") for doc_id in ids)
    return [d.doc_id for d in with_unique_ids(documents, skipped)], skipped


def test_doubled_ids_are_numbered_and_none_looks_like_a_part() -> None:
    ids = ["a", "b", "a", "a (2)", "a", "c#1", "c", "c#1"]
    found, skipped = unique(ids)
    assert found == ["a", "b", "a (2)", "a (2) (2)", "a (3)", "c#1 (1)", "c", "c#1 (1) (2)"]
    assert len(set(found)) == len(ids) and skipped == {CHANGED: 4}
    found, _ = unique(["same"] * 20_000)  # in linear time
    assert len(set(found)) == 20_000 and found[-1] == "same (20000)"


def test_public_corpora_with_doubled_ids(tmp_path) -> None:
    (tmp_path / "sample/10BT").mkdir(parents=True)
    columns = {"text": ["one", "two", "three"], "id": ["<u>", "<u>", "x#3"]}
    pq.write_table(pa.table(columns), tmp_path / "sample/10BT/0.parquet")
    config = CorpusConfig("m", CorpusKind.fineweb_edu)
    config.fineweb_edu.root = str(tmp_path)
    corpus, skipped = build_corpus(config), Losses()
    found = {d.doc_id: d.text for unit in corpus.units() for d in corpus.read(unit, skipped)}
    named = {"<u>": "one", "<u> (2)": "two", "x#3 (1)": "three"}
    assert found == {f"fineweb_edu/{name}": text for name, text in named.items()}
    assert skipped == {CHANGED: 1}


def test_an_id_in_two_units_is_counted_out_once(tmp_path) -> None:
    made = [Made("a", 9, text="1"), Made("b", 9, text="2"), Made("a", 12, text="3")]
    table = table_of(tmp_path, made, documents_per_unit=2)
    lengths = LengthBuckets(("short",), (100,))
    for exact in (True, False):
        config = DocumentsConfig(exact_duplicates=exact)
        candidates, account = find_candidates(table, lengths, config)
        assert sorted(candidates.document_P.tolist()) == [0, 1]
        assert account.left_out == {("s", "id of another document"): 12}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "/runs/x: No space left on device: the disk is full: make room there and"),
        (errno.EDQUOT, "your share of the disk is used up"),
        (errno.EFBIG, "allows no file of this size"),
        (errno.EROFS, "the file system can only be read: run.root=FOLDER writes elsewhere"),
        (errno.EACCES, "your user may not do that: change the permissions"),
        (errno.EPERM, "your user may not do that"),
        (errno.EMFILE, r"this process may open no more files: raise the limit \(ulimit -n 65536\)"),
        (errno.ENFILE, "all of this machine's open files are in use"),
        (errno.ENAMETOOLONG, "give a shorter run.name or path"),
        (errno.ELOOP, "links point at each other"),
        (errno.EIO, "the disk or its connection is faulty"),
        (errno.ESTALE, "the network disk was replaced or remounted"),
        (errno.ENOTCONN, "the network disk is not connected"),
        (errno.EHOSTDOWN, "the network disk is not connected"),
        (errno.ETIMEDOUT, "the network disk does not answer"),
        (errno.ENOMEM, "there is no memory left"),
        (errno.ENOLCK, "the file system gives no locks"),
    ],
)
def test_what_the_system_refuses_is_one_line(number: int, words: str, capsys) -> None:
    def refused() -> None:
        raise OSError(number, os.strerror(number), "/runs/x")

    with pytest.raises(SystemExit) as end:
        run_command(refused)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert told.startswith("error: /runs/x: ") and re.search(words, told)


def test_other_errors_keep_their_traceback() -> None:
    def lost() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")

    with pytest.raises(FileNotFoundError):
        run_command(lost)
    assert explain(OSError("no number")) is None
    moved = OSError(errno.EROFS, "Read-only file system", b"/a", None, "/b")
    assert (explain(moved) or "").startswith("/a -> /b: Read-only file system: ")


def test_names_that_the_terminal_cannot_show(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run_command(lambda: print("caf\udce9 \u00e4"))
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\udce9 \\xe4\n"  # type: ignore[attr-defined]


def test_a_corpus_file_that_cannot_be_opened_says_why(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))

    def refuse(self: Path, mode: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    words = "a.jsonl cannot be read at byte or row 0: .*a.jsonl: Too many open files: this process"
    with pytest.raises(DataError, match=words):
        texts_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("root", "extra"), [("s3://b/x", "s3"), ("gs://b/x", "gcs")])
def test_a_bucket_without_its_package_names_the_extra(root, extra, monkeypatch) -> None:
    package = {"s3": "s3fs", "gcs": "gcsfs"}[extra]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    config = CorpusConfig("m", CorpusKind.fineweb_edu)
    config.fineweb_edu.root = root
    with pytest.raises(ConfigError, match=rf"needs {package}, .*: pip install '\.\[{extra}\]'"):
        build_corpus(config)
