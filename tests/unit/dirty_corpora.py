"""Miniature corpora of every adapter with dirt of every kind, and what an honest account says.

Nothing here is read by this project's code: each writer notes for every file how many records it
holds and which texts of it are fit to be packed.
"""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from public_corpora import META, page

WORDS = "sea wind stone river night morning horse letter candle garden winter road lamp".split()
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@dataclass
class Planted:
    """What was written."""

    records: dict[str, int] = field(default_factory=dict)
    """Unit of the corpus, without its range -> records in its file."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """The same -> texts fit to be packed."""
    cut: set[str] = field(default_factory=set)
    """Units whose files are cut: ``records`` has what can still be read of them."""

    def add(self, unit: str, records: int, texts: list[str], *, is_cut: bool = False) -> None:
        self.records[unit], self.texts[unit] = records, texts
        self.cut |= {unit} if is_cut else set()


class Texts:
    """Texts of 10 to 400 words, no two alike."""

    def __init__(self, seed: int) -> None:
        self._random, self._number = random.Random(seed), 0

    def some(self, number: int) -> list[str]:
        return [self.one() for _ in range(number)]

    def one(self, num_words: int | None = None) -> str:
        self._number += 1
        length = num_words or self._random.choice([10, 30, 60, 120, 400])
        return " ".join([f"n{self._number}", *self._random.choices(WORDS, k=length)])


def dirty_lines(texts: list[str], field: str = "text", **more: Any) -> tuple[bytes, int]:
    """Lines with these texts among faulty ones, and how many records they are."""
    good = [json.dumps({field: text, **more}).encode() for text in texts]
    bad = [
        b'{"torn": ',
        b"[1, 2]",
        b"\xff\xfe\xfd",
        b'{"%s": ""}' % field.encode(),
        b'{"%s": null}' % field.encode(),
        b'{"%s": "half \\ud800"}' % field.encode(),
        b'{"%s": "a number", "n": %s}' % (field.encode(), b"9" * 5000),
        b'{"%s": %s}' % (field.encode(), b"[" * 20_000),
        b'{"%s": 7}' % field.encode(),
    ]
    random.Random(len(texts)).shuffle(bad)
    step = max(1, len(good) // len(bad))
    mixed = [b'{"%s": " "}' % field.encode(), b"", b"   "]
    for number, line in enumerate(good):
        mixed += [line] + ([bad.pop(), b""] if bad and number % step == 0 else [])
    lines = mixed + bad
    return b"\n".join(lines), sum(bool(line.strip()) for line in lines)


def cut_gzip(content: bytes) -> tuple[bytes, int]:
    """A packed file without its end, and the whole lines that can be unpacked of it."""
    packed = gzip.compress(content)[:-9]
    return packed, sum(
        bool(line.strip()) for line in zlib.decompressobj(31).decompress(packed).split(b"\n")[:-1]
    )


def write(path: Path | bytes, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def write_folder(root: Path, texts: Texts) -> Planted:
    """Every ending and packing, damage, hidden files, links, names in another encoding."""
    planted = Planted()
    for packing, pack in PACKERS.items():
        for ending in (".jsonl", ".ndjson", ".JSON"):
            own = texts.some(12)
            content, number = dirty_lines(own)
            name = f"lines/a{ending}{packing}"
            write(root / name, pack(codecs.BOM_UTF8 + content))
            planted.add(name, number, own)
        own = texts.one()
        write(root / f"texts/b.txt{packing}", pack(own.encode()))
        planted.add(f"texts/b.txt{packing}", 1, [own])
    own = texts.some(300)
    content, number = dirty_lines(own)
    write(root / "large.jsonl", content)
    planted.add("large.jsonl", number, own)
    own = texts.some(200)
    packed, number = cut_gzip(b"\n".join(json.dumps({"body": t}).encode() for t in own))
    write(root / "cut/c.jsonl.gz", packed)
    planted.add("cut/c.jsonl.gz", number, own[:number], is_cut=True)
    for name, content in {
        "cut/d.parquet": b"no parquet", "cut/e.jsonl.zst": b"nothing", "cut/f.txt.xz": b"",
    }.items():  # fmt: skip
        write(root / name, content)
        planted.add(name, 0, [], is_cut=True)
    own = texts.some(3)
    column = pa.array([*[t.encode() for t in own], b"caf\xe9", b" ", None], pa.binary())
    (root / "rows").mkdir()
    pq.write_table(pa.table({"text": column.view(pa.string())}), root / "rows/g.parquet")
    planted.add("rows/g.parquet", 6, own)
    double = texts.one()
    write(root / "twice/h.txt", double.encode())
    write(root / "twice/i.txt", double.encode())
    write(root / "twice/j.txt", b"\xff\xfe")
    planted.add("twice/h.txt", 1, [double])
    planted.add("twice/i.txt", 1, [double])
    planted.add("twice/j.txt", 1, [])
    long = texts.one(5000)
    write(os.fsencode(root) + b"/caf\xe9/long.txt", long.encode())
    planted.add("caf\\xe9/long.txt", 1, [long])
    elsewhere = root.parent / "elsewhere"
    linked = texts.one()
    write(elsewhere / "k.txt", linked.encode())
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    planted.add("linked/k.txt", 1, [linked])
    for name in (".hidden.txt", ".ipynb_checkpoints/b.txt", "l.csv", "m.csv", "n", "info.json"):
        write(root / name, b'{"about": "the folder"}')
    return planted


# What of the folder above is no file to read; ``info.json`` holds one object without text.
NOT_READ = {
    "ending .csv": 2,
    "ending without ending": 1,
    "ending .json without a record per line": 1,
    "hidden": 2,
    "link to a folder that is read under another name": 1,
}


def write_redpajama_v1(root: Path, texts: Texts) -> Planted:
    planted = Planted()
    for domain, name in (("arxiv", "a.jsonl"), ("common_crawl", "b.jsonl.zst"), ("c4", "c.jsonl")):
        own = texts.some(20)
        more = {"source": "cc"} if domain == "common_crawl" else {"meta": META[domain]}
        content, number = dirty_lines(own, **more)
        write(root / domain / name, PACKERS[".zst" if name.endswith("zst") else ""](content))
        planted.add(f"redpajama_v1/{domain}/{name}", number, own)
    return planted


def write_redpajama_v2(root: Path, texts: Texts) -> Planted:
    """A shard with a list of duplicates, one that is cut, one whose list is missing."""
    planted, shard = Planted(), "2023-06/0000"
    own = texts.some(20)
    lines = [page(text).encode() for text in own]
    write(root / f"documents/{shard}/en_head.json.gz", gzip.compress(b"\n".join(lines)))
    listed = {"doc_id": [f"{shard}/en_head.json.gz/{row}" for row in (1, 5)]}
    (root / f"duplicates/{shard}").mkdir(parents=True)
    pq.write_table(pa.table(listed), root / f"duplicates/{shard}/en_head.duplicates.parquet")
    kept = [text for row, text in enumerate(own) if row not in (1, 5)]
    planted.add(f"redpajama_v2/{shard}/en_head", 20, kept)
    own = texts.some(60)
    packed, number = cut_gzip(b"\n".join(page(text).encode() for text in own))
    write(root / f"documents/{shard}/en_middle.json.gz", packed)
    planted.add(f"redpajama_v2/{shard}/en_middle", number, own[:number], is_cut=True)
    own = texts.some(10)
    content, number = dirty_lines(own, "raw_content", length=9)
    write(root / f"documents/{shard}/en_tail.json.gz", gzip.compress(content))
    planted.add(f"redpajama_v2/{shard}/en_tail", number, own)
    return planted


def write_starcoder(root: Path, texts: Texts) -> Planted:
    planted = Planted()
    for language in ("python", "go"):
        own = texts.some(12)
        rows = {
            "max_stars_repo_path": ["a.py"] * 15,
            "max_stars_repo_name": ["x/y"] * 14 + [None],
            "content": [*own, "", None, "<reponame>x/y\n"],
        }
        (root / language).mkdir(parents=True)
        pq.write_table(pa.table(rows), root / language / "train-00000-of-00001.parquet")
        planted.add(f"starcoder/{language}/train-00000-of-00001", 15, own)
    return planted


def write_fineweb_edu(root: Path, texts: Texts) -> Planted:
    """Ids that stand twice in a file, and in two files; a file without the column."""
    planted = Planted()
    (root / "sample/10BT").mkdir(parents=True)
    for name, ids in (("0", ["<u1>", "<u1>", "x#0", None]), ("1", ["<u1>", "x", "<u9>", "<u8>"])):
        own = texts.some(4)
        rows = {"text": [*own, None, " "], "id": [*ids, "<u2>", "<u3>"]}
        pq.write_table(pa.table(rows), root / f"sample/10BT/{name}.parquet")
        planted.add(f"fineweb_edu/sample/10BT/{name}.parquet", 6, own)
    pq.write_table(pa.table({"id": ["<u4>"] * 3}), root / "sample/10BT/2.parquet")
    planted.add("fineweb_edu/sample/10BT/2.parquet", 3, [])
    return planted


def write_pg19(root: Path, texts: Texts) -> Planted:
    """Two books with one number and title; the validation book is held out by name."""
    planted = Planted()
    (root / "data").mkdir(parents=True)
    for split, number in (("train", 5), ("validation", 1)):
        own = [texts.one(700) for _ in range(number)]
        rows = {
            "short_book_title": ["A book"] * number,
            "url": [f"http://www.gutenberg.org/ebooks/{n // 2}" for n in range(number)],
            "text": own,
        }
        pq.write_table(pa.table(rows), root / f"data/{split}-00000-of-00001.parquet")
        if split == "train":
            planted.add(f"pg19/data/{split}-00000-of-00001.parquet", number, own)
    return planted
