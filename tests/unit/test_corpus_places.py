"""Identity is content: a mirror elsewhere goes on and is accepted; folders are hashed once."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_prep import tokenizing
from data_prep.pack import main as pack_main
from data_prep.tokenizing import TokenizeJob
from longrope2.corpora import remote
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.folder import FolderCorpus
from longrope2.corpora.losses import Losses
from longrope2.corpora.remote import FileSet, StoredFile
from longrope2.corpora.run_corpus import heldout_text
from longrope2.files import folder_hashes
from longrope2.files.artifacts import read_manifest, sha256_of_file
from longrope2.files.folder_hashes import sha256_of_files

WORDS = "sea wind stone river night morning horse letter candle garden winter road".split()


def write_texts(folder: Path, number: int = 200) -> None:
    """Lines of all lengths, one of them faulty, in one file."""
    folder.mkdir()
    lines = []
    for row in range(number):
        text = " ".join(WORDS[(row * n) % 11] + str(n) for n in range(5 + row % 90))
        lines.append(json.dumps({"text": text}))
    lines.insert(number // 3, "{broken")
    (folder / "a.jsonl").write_text("\n".join(lines))


def pack(folder: Path, root: Path, *more: str) -> Path:
    pack_main(
        [
            *("--target", "256", "--corpus", "folder", "--model", "tiny", "workers=1"),
            *(f"corpus.folder={folder}", f"run.root={root}", "run.name=run", *more),
        ]
    )
    return root / "run" / "1_segments"


def shards(segments: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in segments.glob("*.arrow")}


def counts(segments: Path) -> dict:
    return read_manifest(segments, "segments").counts


class Stopped(Exception):
    """What a job's time limit does, for a test."""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path / "texts"


def stop_after(monkeypatch, number: int) -> None:
    """Let that many parts of units be written, then stop."""
    written = []

    def write_part(self, *arguments, own=TokenizeJob._write_part):
        if len(written) == number:
            raise Stopped
        own(self, *arguments)
        written.append(arguments)

    monkeypatch.setattr(TokenizeJob, "_write_part", write_part)


def test_a_stopped_run_goes_on_from_a_mirror_elsewhere(texts, tmp_path, monkeypatch) -> None:
    """Parts of a unit survive, and the corpus is mounted at another path afterwards."""
    whole = pack(texts, tmp_path / "whole")
    monkeypatch.setattr(tokenizing, "PART_CHARACTERS", 8_000)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        pack(texts, tmp_path / "parts")
    work = tmp_path / "parts/run/1_segments/work"
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*.tokens")}
    assert len(made) == 3
    moved = texts.rename(tmp_path / "elsewhere")
    kept = pack(moved, tmp_path / "parts", "keep_work=true")
    assert len(list(work.iterdir())) == 1  # the same fingerprint
    tokens = {path: path.stat().st_mtime_ns for path in work.rglob("*.tokens")}
    assert len(tokens) > 6 and made.items() <= tokens.items()
    assert shards(kept) == shards(whole) and counts(kept) == counts(whole)
    assert counts(kept)["num_records_skipped"] == {"folder": {"bad json": 1}}


def test_finished_segments_are_accepted_from_another_place(texts, tmp_path, capsys) -> None:
    segments = pack(texts, tmp_path)
    before = shards(segments) | {"manifest": sha256_of_file(segments / "manifest.json")}
    moved = texts.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    pack(moved, tmp_path)
    out = capsys.readouterr().out
    assert "already complete" in out
    changed = f"corpus.folder was {texts}, now it is {moved}"
    assert f"the same text and model in another place: {changed}" in out
    assert before == shards(segments) | {"manifest": sha256_of_file(segments / "manifest.json")}
    noted = yaml.safe_load((segments / "config.yaml").read_text())
    assert noted["corpus"]["folder"] == str(moved)
    pack(moved, tmp_path)
    assert "another place" not in capsys.readouterr().out
    config = CorpusConfig("folder", kind=CorpusKind.folder, folder=str(moved))
    found = heldout_text(config, build_corpus(config).describe(), tmp_path / "run")
    assert not found.is_other


def test_other_text_is_refused_wherever_it_stands(texts, tmp_path, capsys) -> None:
    pack(texts, tmp_path)
    (texts / "a.jsonl").write_text('{"text": "another one"}')
    with pytest.raises(SystemExit):
        pack(texts, tmp_path)
    assert re.search(
        r"inputs.corpus.files.*was packed differently|was packed differently.*inputs"
        r".corpus.files",
        capsys.readouterr().err,
    )


def test_a_description_of_the_hub_holds_the_commit_and_a_mirror_its_listing() -> None:
    files = (StoredFile("x", "a.parquet", 5),)
    mirrors = [FileSet(base, files).describe() for base in ("/mnt/a", "/data/b")]
    assert [{k: v for k, v in m.items() if k != "base"} for m in mirrors][0] == {
        k: v for k, v in mirrors[1].items() if k != "base"
    }
    assert FileSet("hf://datasets/x/y@abc", files).describe()["commit"] == "abc"
    assert "commit" not in mirrors[0]


def hashed_files(monkeypatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []

    def hashing(path, own=folder_hashes.sha256_of_file):
        names.append(path.name)
        return own(path)

    monkeypatch.setattr(folder_hashes, "sha256_of_file", hashing)
    return names


def test_a_folder_is_hashed_once_while_nothing_changes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(folder_hashes, "SMALL_BYTES", 10)
    folder, cache = tmp_path / "texts", tmp_path / "cache"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(f"text of {name}")
        os.utime(folder / name, (1_000_000, 1_000_000))
    expected = {name: sha256_of_file(folder / name) for name in ("a", "b", "c")}
    names = hashed_files(monkeypatch)
    assert sha256_of_files(folder, ["a", "b", "c"], cache) == expected
    assert re.fullmatch(
        rf"hashing: 3 files, 0.00 GiB of {folder} in 0 s\n", capsys.readouterr().err
    )
    assert sha256_of_files(folder, ["a", "b", "c"], cache) == expected and names == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    (folder / "b").write_text("text of B")
    os.utime(folder / "b", (1_000_001, 1_000_001))
    found = sha256_of_files(folder, ["a", "b", "c"], cache)
    assert found["b"] == sha256_of_file(folder / "b") != expected["b"] and names[3:] == ["b"]
    (folder / "c").write_text("just now")  # may change again within the same tick
    for _ in range(2):
        sha256_of_files(folder, ["a", "b", "c"], cache)
    assert names[4:] == ["c", "c"]
    # A mirror elsewhere is hashed by itself, and a broken cache is none.
    moved = folder.rename(tmp_path / "elsewhere")
    assert sha256_of_files(moved, ["a"], cache) == {"a": expected["a"]}
    for place in (cache / "hashes").iterdir():
        place.write_text("[]")
    assert sha256_of_files(moved, ["a"], cache) == {"a": expected["a"]} and names[6:] == ["a", "a"]
    (tmp_path / "file").write_text("")
    assert sha256_of_files(moved, ["a"], tmp_path / "file") == {"a": expected["a"]}


@pytest.mark.parametrize("size", [1, 7, 100, 1_000, 5_000])
def test_ranges_of_a_file_have_all_its_records_once(texts, monkeypatch, size) -> None:
    def read() -> tuple[list[str], list[str], Counter]:
        corpus, skipped = FolderCorpus(str(texts), text_field="text"), Losses()
        documents = [d for unit in corpus.units() for d in corpus.read(unit, skipped)]
        return [d.text for d in documents], [d.doc_id for d in documents], skipped

    whole, _, skipped = read()
    assert len(whole) == 200 and skipped == {"bad json": 1}
    total = (texts / "a.jsonl").stat().st_size
    monkeypatch.setattr(remote, "RANGE_BYTES", max(size, total // 40) if size < 100 else size)
    texts_read, ids, skipped = read()
    assert texts_read == whole and len(set(ids)) == 200 and skipped == {"bad json": 1}
    content = (texts / "a.jsonl").read_bytes()
    first, last = (int(doc_id.rpartition(":")[2]) for doc_id in (ids[1], ids[-1]))
    assert json.loads(content[first:].split(b"\n")[0])["text"] == whole[1]
    assert json.loads(content[last:])["text"] == whole[-1]


def test_ranges_cut_where_lines_end_and_begin(tmp_path, monkeypatch) -> None:
    """Every place of the cut, lines of one byte, empty lines, and one that is too long."""
    from longrope2.corpora import records

    content = b'{"a":1}\n\n{"a":22}\n' + b"x" * 40 + b'\n{"a":3}'
    (tmp_path / "a.jsonl").write_bytes(content)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 30)
    location = str(tmp_path / "a.jsonl")
    for cut in range(1, len(content)):
        skipped, found = Losses(), []
        for span in ((0, cut), (cut, len(content))):
            found += records.json_records(location, skipped, span=span)
        places = [(0, {"a": 1}), (9, {"a": 22}), (59, {"a": 3})]
        assert found == places and skipped == {records.TOO_LONG: 1}


def test_only_large_files_of_plain_lines_become_ranges() -> None:
    large = 3 * remote.RANGE_BYTES - 5
    assert remote.line_ranges("a.jsonl.zst", large) == remote.line_ranges("a.jsonl", None) == []
    assert remote.line_ranges("a.jsonl", remote.RANGE_BYTES) == []
    ranges = remote.line_ranges("a.jsonl", large)
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert len(ranges) == 3 and ranges[-1][1] == large
    for span in ranges:
        name = remote.ranged_name("x/a.jsonl", span)
        assert remote.split_ranged_name(name) == ("x/a.jsonl", span)
    assert remote.split_ranged_name("x/a@1-2.jsonl") == ("x/a@1-2.jsonl", None)
