"""Each adapter over 10,000 mutated records and some hundred mutated files, from a fixed seed.

No traceback; every record becomes a document or a counted loss; ids differ and are text; memory
stays bounded. What is counted here is counted from the bytes that were written.
"""

import codecs
import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from public_corpora import META, page

from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document
from longrope2.corpora.losses import Losses

NUM_RECORDS = 10_000
NUM_FILES = 300
ROWS_OF_A_FILE = 40
# Pieces that break parsers, put anywhere into a line.
SPLICES = [
    b'"', b"{", b"}", b"[" * 5000, b"\\", b"\\ud800", b"\xff", b"\0", b"\r", b"9" * 4400,
    b"NaN", b"1e999", b'"text": null,', b'"raw_content": 3,', b'"length": -1,', b"\xe2\x80\xa8",
    b"\n", codecs.BOM_UTF8,
]  # fmt: skip
VALUES: list[Any] = [
    None, "", " \n", 0, -1, 1.5, True, [], {}, ["text"], {"text": "x"}, "\ud800", "a\0b",
    "\u2028\u2029", "x" * 10_000, "<reponame>x\n", "#1", "a#7", "../..", "é" * 50, 10**4400,
]  # fmt: skip
pytestmark = pytest.mark.slow


def mutated_lines(draw: random.Random, make: Callable[[str], str]) -> bytes:
    """Lines of records, most of them damaged in one way or another."""
    lines = []
    for number in range(NUM_RECORDS):
        line = make(f"text number {number} {draw.random()}")
        match draw.randrange(6):
            case 0:
                damaged = line.encode()
            case 1:  # another value, of any type
                record = json.loads(line)
                record[draw.choice(list(record))] = draw.choice(VALUES[:-1])
                damaged = json.dumps(record).encode()
            case 2:  # flipped bytes
                flipped = bytearray(line.encode())
                for _ in range(draw.randint(1, 4)):
                    flipped[draw.randrange(len(flipped))] = draw.randrange(256)
                damaged = bytes(flipped)
            case 3:  # something put in
                place, damaged = draw.randrange(len(line)), line.encode()
                damaged = damaged[:place] + draw.choice(SPLICES) + damaged[place:]
            case 4:  # cut, at either end
                place, damaged = draw.randrange(len(line)), line.encode()
                damaged = draw.choice([damaged[:place], damaged[place:]])
            case _:  # noise
                damaged = draw.randbytes(draw.randrange(80))
        lines.append(damaged)
    return b"\n".join(lines)


def num_lines(content: bytes) -> int:
    return sum(bool(line.removeprefix(codecs.BOM_UTF8).strip()) for line in content.split(b"\n"))


def config_of(kind: CorpusKind, root: Path, **more: Any) -> CorpusConfig:
    config = CorpusConfig("fuzz", kind, folder=str(root), heldout_fraction=0.0)
    for key, value in more.items():
        setattr(config, key, value)
    if (source := getattr(config, kind.value, None)) is not None and hasattr(source, "root"):
        source.root = str(root)
    return config


def read(config: CorpusConfig) -> tuple[list[Document], Losses, int]:
    """Documents, losses and peak memory of Python in bytes."""
    corpus, losses = build_corpus(config), Losses()
    tracemalloc.start()
    documents = [d for unit in corpus.units() for d in corpus.read(unit, losses)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for document in documents:
        assert document.text.strip() and document.doc_id.isprintable()
        (document.text + document.doc_id + document.domain + (document.group or "")).encode()
    assert len({document.doc_id for document in documents}) == len(documents)
    return documents, losses, peak


def num_lost(losses: Losses) -> int:
    return sum(n for reason, n in losses.items() if not reason.endswith("(kept)"))


JSON_ADAPTERS = {
    "folder": (CorpusKind.folder, "a.jsonl", lambda t: json.dumps({"text": t, "title": "T"})),
    "json": (CorpusKind.folder, "a.json.xz", lambda t: json.dumps({"text": t})),
    "v1": (
        CorpusKind.redpajama_v1, "arxiv/a.jsonl.zst",
        lambda t: json.dumps({"text": t, "meta": META["arxiv"]}),
    ),
    "v2": (CorpusKind.redpajama_v2, "documents/2023-06/0000/en_head.json.gz", page),
}  # fmt: skip


def pack(name: str, content: bytes) -> bytes:
    packers = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}
    return packers.get(Path(name).suffix, bytes)(content)


def json_config(adapter: str, root: Path) -> CorpusConfig:
    kind = JSON_ADAPTERS[adapter][0]
    config = config_of(kind, root, title_field="title" if adapter == "folder" else None)
    config.redpajama_v1.domains = ["arxiv"]
    config.redpajama_v2.short_characters = 25
    return config


@pytest.mark.parametrize("adapter", JSON_ADAPTERS)
def test_mutated_lines(adapter: str, tmp_path: Path) -> None:
    _, name, make = JSON_ADAPTERS[adapter]
    content = make("the first").encode() + b"\n" + mutated_lines(random.Random(adapter), make)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(pack(name, content))
    documents, losses, peak = read(json_config(adapter, tmp_path))
    assert len(documents) + num_lost(losses) == num_lines(content) > 0.9 * NUM_RECORDS
    assert len(documents) > NUM_RECORDS / 10 and not [
        f for f in losses.files if not f.fault.endswith("(kept)")
    ]
    assert peak < 4 * len(content) + 2**25


@pytest.mark.parametrize("adapter", JSON_ADAPTERS)
def test_mutated_packed_files(adapter: str, tmp_path: Path) -> None:
    """Bytes of the file itself are flipped or cut off: what was read before is kept and told."""
    _, name, make = JSON_ADAPTERS[adapter]
    draw = random.Random(adapter)
    lines = [make(f"text {n} {draw.random()}").encode() for n in range(ROWS_OF_A_FILE)]
    whole = pack(name, b"\n".join(lines))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(whole)
    corpus = build_corpus(json_config(adapter, tmp_path))
    num_damaged = 0
    for _ in range(NUM_FILES):
        content = bytearray(whole)
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
        for _ in range(draw.randint(0, 5) if content else 0):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / name).write_bytes(content)
        losses = Losses()
        documents = [d for unit in corpus.units() for d in corpus.read(unit, losses)]
        damage = [f for f in losses.files if not f.fault.endswith("(kept)")]
        assert len(damage) <= 1
        num_damaged += len(damage)
        if damage:
            assert len(documents) + num_lost(losses) - 1 == damage[0].num_records
        elif name.endswith((".gz", ".xz")):  # they hold a checksum
            assert len(documents) + num_lost(losses) == ROWS_OF_A_FILE
    assert num_damaged > NUM_FILES / 2 or name.endswith(".jsonl")


def hostile_texts(draw: random.Random, number: int) -> list[bytes | None]:
    made: list[bytes | None] = []
    for row in range(number):
        text = f"text {row} {draw.random()}".encode()
        faulty = [None, b"", b" \n", b"caf\xe9", b"\xed\xa0\x80", draw.randbytes(40), b"a\0b"]
        faulty += [b"<reponame>x/y\n", b"<reponame>x/y\n" + text, b"#1", b"x" * 5000]
        made.append(text if draw.random() < 0.4 else draw.choice(faulty))
    return made


def hostile_names(draw: random.Random, number: int) -> list[str | None]:
    names = [None, "", "same", "a#1", "a", "  ", "two\nlines", "x" * 2000, "é" * 30, "#0", "a (2)"]
    return [draw.choice([*names, f"own {row}"]) for row in range(number)]


PARQUET_ADAPTERS = {
    "folder": (CorpusKind.folder, "a.parquet", "text", ["title"]),
    "fineweb_edu": (CorpusKind.fineweb_edu, "sample/10BT/0.parquet", "text", ["id"]),
    "pg19": (CorpusKind.pg19, "data/train-0.parquet", "text", ["url", "short_book_title"]),
    "starcoder": (
        CorpusKind.starcoder, "c/train-0.parquet", "content",
        ["max_stars_repo_name", "max_stars_repo_path"],
    ),
}  # fmt: skip


def write_rows(path: Path, draw: random.Random, number: int, adapter: str) -> None:
    _, _, text, names = PARQUET_ADAPTERS[adapter]
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pa.array(hostile_texts(draw, number), pa.binary()).view(pa.string())
    columns = {text: texts} | {name: pa.array(hostile_names(draw, number)) for name in names}
    pq.write_table(pa.table(columns), path, row_group_size=max(10, number // 4))


def parquet_config(adapter: str, root: Path, *, joins: bool = False) -> CorpusConfig:
    config = config_of(PARQUET_ADAPTERS[adapter][0], root)
    config.title_field = "title" if adapter == "folder" else None
    config.starcoder.join_repositories = joins
    return config


@pytest.mark.parametrize("adapter", PARQUET_ADAPTERS)
def test_hostile_rows(adapter: str, tmp_path: Path) -> None:
    draw = random.Random(adapter)
    write_rows(tmp_path / PARQUET_ADAPTERS[adapter][1], draw, NUM_RECORDS, adapter)
    documents, losses, peak = read(parquet_config(adapter, tmp_path))
    assert len(documents) + num_lost(losses) == NUM_RECORDS and len(documents) > NUM_RECORDS / 3
    assert peak < 2**26 and not losses.files


def test_hostile_rows_of_repositories(tmp_path: Path) -> None:
    """Joined to documents: every text that is fit stands in one of them, once."""
    write_rows(tmp_path / "c/train-0.parquet", random.Random(5), NUM_RECORDS, "starcoder")
    single, losses, _ = read(parquet_config("starcoder", tmp_path))
    joined, again, _ = read(parquet_config("starcoder", tmp_path, joins=True))
    assert num_lost(losses) == num_lost(again)
    separators = len("\n\n") * (len(single) - len(joined))
    assert sum(len(d.text) for d in joined) == sum(len(d.text) for d in single) + separators


TYPES = [
    pa.int64(), pa.float64(), pa.bool_(), pa.list_(pa.string()), pa.struct([("a", pa.string())]),
    pa.binary(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.null(),
    pa.timestamp("us"), pa.large_binary(), pa.map_(pa.string(), pa.string()), pa.decimal128(9, 2),
]  # fmt: skip


@pytest.mark.parametrize("adapter", PARQUET_ADAPTERS)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_columns_of_other_types(adapter: str, kind: pa.DataType, tmp_path: Path) -> None:
    """In any of the columns that an adapter reads."""
    _, name, text, others = PARQUET_ADAPTERS[adapter]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    is_text = pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    odd = pa.array(["a", "b", None]).cast(kind) if is_text else pa.nulls(3, kind)
    fine = pa.array(["one", "two", "three"])
    for wrong in [text, *others] if adapter != "folder" else others:
        columns = {column: odd if column == wrong else fine for column in [text, *others]}
        pq.write_table(pa.table(columns), tmp_path / name)
        config = parquet_config(adapter, tmp_path)
        config.title_field = None
        documents, losses, _ = read(config)
        assert len(documents) + num_lost(losses) == 3
        assert len(documents) == (3 if wrong != text else 2 if is_text else 0)


@pytest.mark.parametrize("adapter", PARQUET_ADAPTERS)
def test_mutated_parquet_files(adapter: str, tmp_path: Path) -> None:
    draw = random.Random(adapter)
    path = tmp_path / PARQUET_ADAPTERS[adapter][1]
    write_rows(path, draw, ROWS_OF_A_FILE, adapter)
    whole, corpus = path.read_bytes(), build_corpus(parquet_config(adapter, tmp_path))
    num_damaged, pool = 0, pa.default_memory_pool()
    for _ in range(NUM_FILES):
        content = bytearray(whole)
        if draw.random() < 0.1:
            del content[draw.randrange(len(content)) :]
        for _ in range(draw.randint(1, 6) if content else 0):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        losses = Losses()
        documents = [d for unit in corpus.units() for d in corpus.read(unit, losses)]
        for document in documents:
            (document.text + document.doc_id).encode()
        num_damaged += len(losses.files)
        if losses.files:
            assert len(documents) + num_lost(losses) - 1 == losses.files[0].num_records
        elif pq.read_metadata(path).num_rows == ROWS_OF_A_FILE:
            assert len(documents) + num_lost(losses) == ROWS_OF_A_FILE
    assert num_damaged > NUM_FILES / 10
    print(f"{adapter}: {num_damaged} of {NUM_FILES} damaged, {pool.max_memory()} bytes of Arrow")
    assert pool.max_memory() < 2**31
