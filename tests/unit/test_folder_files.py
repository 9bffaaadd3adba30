"""A folder of one's own: what is read of it, what is not, and that nothing of it goes unsaid."""

import bz2
import codecs
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from launch.init.before import take_plain_text
from longrope2.corpora.build import build_corpus, files_aside, ignored_files
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.losses import DamagedFile, Losses, named_files
from longrope2.errors import ConfigError
from longrope2.files.folder_walk import BROKEN, LOOP, NO_FILE, TWICE, walk_folder

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


def config_of(folder: Path, **more) -> CorpusConfig:
    return CorpusConfig("mine", CorpusKind.folder, folder=str(folder), **more)


def read(folder: Path, **more) -> tuple[dict[str, str], Losses]:
    corpus, skipped = build_corpus(config_of(folder, **more)), Losses()
    documents = [d for unit in corpus.units() for d in corpus.read(unit, skipped)]
    assert len({d.doc_id for d in documents}) == len(documents)
    return {d.doc_id.removeprefix("folder/"): d.text for d in documents}, skipped


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_every_ending_in_small_and_large_letters_and_every_packing(tmp_path: Path) -> None:
    expected = {}
    for packing, pack in PACKERS.items():
        for ending in (".jsonl", ".ndjson", ".json"):
            for name in (f"a{ending}{packing}", f"A{ending}{packing}".upper()):
                write(tmp_path / name, pack(line(f"1 {name}") + line(f"2 {name}")))
                expected |= {f"{name}:{row}": f"{row + 1} {name}" for row in (0, 1)}
        for name in (f"b.txt{packing}", f"B.TXT{packing.upper()}", f"c.md{packing}"):
            write(tmp_path / name, pack(name.encode()))
            expected[name] = name
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "D.PARQUET")
    found, skipped = read(tmp_path, more_text_endings=[".md"])
    assert found == expected | {"D.PARQUET:0": "p"} and not skipped
    assert ignored_files(config_of(tmp_path, more_text_endings=[".md"])) == {}


def test_links_are_followed_once_and_loops_are_not(tmp_path: Path) -> None:
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    write(top / "b/c/one.txt", b"one")
    write(elsewhere / "deep/two.txt", b"two")
    write(elsewhere / "three.txt", b"three")
    for place, target in {
        "b/up": top, "b/beyond": tmp_path, "linked": elsewhere, "b/again": elsewhere,
        "z_deep": elsewhere / "deep", "real": top / "b/c", "self": top / "self",
        "gone": tmp_path / "none", "four.txt": elsewhere / "three.txt", "aa": elsewhere,
    }.items():  # fmt: skip
        (top / place).symlink_to(target)
    os.mkfifo(top / "pipe.txt")
    found = walk_folder(top)
    # "aa" is first in the order of names; folders that stand there themselves come before links.
    assert found.files == ("aa/deep/two.txt", "aa/three.txt", "b/c/one.txt", "four.txt")
    assert found.aside == {LOOP: 2, TWICE: 4, BROKEN: 2, NO_FILE: 1}
    assert {d for d in read(top)[0]} == set(found.files)
    assert files_aside(config_of(top)) == found.aside


def test_a_mirror_of_a_public_corpus_follows_links_too(tmp_path: Path) -> None:
    from public_corpora import write_redpajama_v1

    texts, _ = write_redpajama_v1(tmp_path / "real")
    (tmp_path / "mirror").mkdir()
    for domain in (tmp_path / "real").iterdir():
        (tmp_path / "mirror" / domain.name).mkdir()
        (tmp_path / "mirror" / domain.name / "linked").symlink_to(domain)
    config = CorpusConfig("m", CorpusKind.redpajama_v1, heldout_fraction=0.0)
    config.redpajama_v1.root = str(tmp_path / "mirror")
    corpus = build_corpus(config)
    found = {d.text for unit in corpus.units() for d in corpus.read(unit, Losses())}
    assert found == set(texts.values())


def test_hidden_files_are_counted_and_not_read(tmp_path: Path) -> None:
    for name in ("a.txt", ".b.txt", ".ipynb_checkpoints/a.txt", "x/._a.jsonl", ".git/HEAD"):
        write(tmp_path / name, line("text"))
    assert set(read(tmp_path)[0]) == {"a.txt"}
    assert (
        files_aside(config_of(tmp_path)) == {"hidden": 3}
        and ignored_files(config_of(tmp_path)) == {}
    )


def test_json_files_without_lines_are_ignored_by_name(tmp_path: Path) -> None:
    lines = {"one.json": line("one"), "two.json": b'{"x": 1}\n' + line("two"), "none.json": b""}
    others = {
        "info.json": b'{"builder": "text"}\n',
        "pretty.json": json.dumps({"text": "a"}, indent=1).encode(),
        "array.json": json.dumps([{"text": "a"}]).encode(),
        "packed.json.gz": gzip.compress(b"[1]"),
    }
    for name, content in {**lines, **others}.items():
        write(tmp_path / name, content)
    found, skipped = read(tmp_path)
    assert found == {"one.json:0": "one", "two.json:1": "two"} and skipped == {"no text": 1}
    without = "without a record per line"
    assert ignored_files(config_of(tmp_path)) == {f".json {without}": 3, f".json.gz {without}": 1}


def test_byte_order_marks_cost_no_record(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    write(tmp_path / "a.jsonl", mark + line("one") + line("two") + mark + line("three") + mark)
    write(tmp_path / "b.txt", mark + b"text")
    write(tmp_path / "c.json", mark + line("four"))
    write(tmp_path / "d.txt", codecs.BOM_UTF16_LE + "text".encode("utf-16-le"))
    found, skipped = read(tmp_path)
    texts = {"a.jsonl:0": "one", "a.jsonl:1": "two", "a.jsonl:2": "three", "b.txt": "text"}
    assert found == texts | {"c.json:0": "four"} and skipped == {"invalid utf-8": 1}


def test_several_field_names_and_first_records_without_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": ""}\n{"text": null}\n{}\n' + line("a"))
    write(tmp_path / "b.jsonl", b'{"id": 1}\n{"content": "b", "text": " "}\n{"text": "t"}\n')
    pq.write_table(pa.table({"body": ["c"], "text": [None]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"content": ["d"]}), tmp_path / "d.parquet")
    found, skipped = read(tmp_path, more_text_fields=["content", "body"])
    texts = {"a.jsonl:3": "a", "b.jsonl:1": "b", "b.jsonl:2": "t", "c.parquet:0": "c"}
    assert found == texts | {"d.parquet:0": "d"}
    assert skipped == {"empty text": 1, "no text": 3}
    with pytest.raises(ConfigError, match="d.parquet: its first records have no text in 'text' "):
        read(tmp_path)


def test_names_in_other_encodings_are_read_and_spelt(tmp_path: Path) -> None:
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/a.jsonl")), line("text"))
    corpus = build_corpus(config_of(tmp_path))
    ((unit,), skipped) = (corpus.units(), Losses())
    (document,) = corpus.read(unit, skipped)
    assert (document.doc_id, document.domain) == ("folder/caf\\xe9/a.jsonl:0", "caf\\xe9")
    assert list(corpus.describe()["files"]) == ["caf\\xe9/a.jsonl"]
    write(tmp_path / "caf\\xe9" / "a.jsonl", line("text"))
    with pytest.raises(ConfigError, match=r"two files have the name caf\\xe9/a.jsonl when bytes"):
        build_corpus(config_of(tmp_path))


def test_damaged_files_are_named_with_what_was_read(tmp_path: Path) -> None:
    lots = b"".join(line(f"{n} {n * 7919}") for n in range(2000))
    for packing, pack in PACKERS.items():
        if packing:
            write(tmp_path / f"a.jsonl{packing}", pack(lots)[:-12])
    write(tmp_path / "b.txt.gz", b"nonsense")
    write(tmp_path / "c.parquet", b"nonsense")
    found, skipped = read(tmp_path)
    named = {Path(file.file).name: file for file in skipped.files}
    for packing in filter(None, PACKERS):
        name = f"a.jsonl{packing}"
        got = sum(doc_id.startswith(f"{name}:") for doc_id in found)
        assert named[name].num_records == got and named[name].fault == "truncated file"
    place, damaged = str(tmp_path / "b.txt.gz"), "damaged file"
    assert named["b.txt.gz"] == DamagedFile(place, damaged, 0)
    assert named["c.parquet"].fault == damaged and skipped == {"truncated file": 5, damaged: 2}
    assert str(named["b.txt.gz"]) == f"{place}: damaged file, nothing read"
    assert str(DamagedFile("x", "truncated file", 1234)) == "x: truncated file, 1,234 records read"


def test_titles_become_one_short_line_of_text(tmp_path: Path) -> None:
    titles = ["A  title\nin lines", "half \ud800", "x" * 5000]
    rows = [json.dumps({"text": f"t{n}", "title": title}) for n, title in enumerate(titles)]
    write(tmp_path / "a.jsonl", "\n".join(rows).encode())
    found, _ = read(tmp_path, title_field="title")
    names = ["0 A title in lines", "1 half \\ud800", "2 " + "x" * 300]
    assert list(found) == [f"a.jsonl:{name}" for name in names]


def test_folders_as_a_shell_would_take_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my texts/a.txt", b"text")
    for given in ("~/my texts", f'"{tmp_path}/my texts"', f"'{tmp_path}/my texts'"):
        config = CorpusConfig("mine", CorpusKind.folder, folder=given)
        assert config.folder == f"{tmp_path}/my texts" and len(build_corpus(config).units()) == 1


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("s3://bucket/texts", "corpus.folder=s3://bucket/texts is an address; your own files are"),
        ("/caf\udce9", r"corpus.folder=/caf\\xe9: the path has bytes that are no UTF-8"),
    ],
)
def test_places_that_are_no_folder(folder: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_corpus(CorpusConfig("mine", CorpusKind.folder, folder=folder))


def test_init_sees_the_same_files(tmp_path: Path) -> None:
    for name in ("a.MD", "b.txt", ".c.md", "d.csv"):
        write(tmp_path / name, b"text")
    (tmp_path / "linked").symlink_to(tmp_path)
    config = config_of(tmp_path)
    take_plain_text(config)
    assert config.more_text_endings == [".md"]
    assert set(read(tmp_path, more_text_endings=[".md"])[0]) == {"a.MD", "b.txt"}
    assert ignored_files(config) == {".csv": 1}


def test_damaged_files_are_named_without_passwords_and_not_all_of_them() -> None:
    losses = Losses()
    losses.damaged("https://me:secret@host/a.gz", "truncated file", 2)
    assert losses.files == [DamagedFile("https://host/a.gz", "truncated file", 2)]
    many = [DamagedFile(f"{n:02d}", "damaged file", 0) for n in range(11)]
    lines = named_files(many, "see there")
    assert lines[7:] == ["07: damaged file, nothing read", "and 3 more files; see there"]
