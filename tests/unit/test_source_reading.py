"""Reading files of any kind: bounded memory, broken connections, damage; a server stands here."""

import gzip
import io
import json
import random
import re
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from public_corpora import CRAWL, page, write_redpajama_v1

from longrope2.corpora import records, remote
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.losses import Losses
from longrope2.corpora.records import json_records, parquet_records, whole_text
from longrope2.errors import ConfigError, DataError


class FlakyServer(ThreadingHTTPServer):
    """Serves ``files`` with ranges; the next ``num_broken`` answers with a body stop half way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.num_broken = 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def respond(self, *, with_body: bool) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted.group(1)) if wanted else 0
        end = (
            min(len(content), int(wanted.group(2)) + 1)
            if wanted and wanted.group(2)
            else len(content)
        )
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if with_body and self.server.num_broken > 0:
            self.server.num_broken -= 1
            self.wfile.write(content[start : (start + end) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    flaky = FlakyServer()
    yield flaky
    flaky.shutdown()
    flaky.server_close()


def lines_of(number):
    return [json.dumps({"text": f"{n} {n * 7919}"}) for n in range(number)]


def read_all(location):
    skipped = Losses()
    return [record["text"] for _, record in json_records(location, skipped)], dict(skipped)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_reading_goes_on_after_a_broken_connection(server, monkeypatch, suffix):
    monkeypatch.setattr(remote, "READ_BYTES", 4096)
    content = "\n".join(lines_of(5000)).encode()
    packed = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix](
        content
    )
    server.files[f"/a.{suffix}"] = packed
    server.num_broken = 3
    texts, skipped = read_all(f"{server.url}/a.{suffix}")
    assert server.num_broken == 0 and skipped == {}
    assert texts == [json.loads(line)["text"] for line in lines_of(5000)]


def test_parquet_goes_on_after_a_broken_connection(server):
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": [f"{n} " * 40 for n in range(1000)]}), sink, row_group_size=150
    )
    server.files["/a.parquet"] = sink.getvalue()
    server.num_broken = 2
    rows = list(parquet_records(f"{server.url}/a.parquet", ["text"], Losses()))
    assert server.num_broken == 0
    assert [(number, record["text"]) for number, record in rows] == [
        (n, f"{n} " * 40) for n in range(1000)
    ]


def test_rows_from_the_middle_of_a_file(tmp_path):
    pq.write_table(
        pa.table({"text": [str(n) for n in range(1000)]}),
        tmp_path / "a.parquet",
        row_group_size=150,
    )
    for first in (0, 1, 149, 150, 151, 333, 999, 1000):
        batches = remote._batches_from(str(tmp_path / "a.parquet"), first, ["text"])
        assert [t for batch in batches for t in batch.column("text").to_pylist()] == [
            str(n) for n in range(first, 1000)
        ]


def test_missing_file_is_counted_but_a_dead_server_is_not(server):
    assert read_all(f"{server.url}/none.jsonl") == ([], {"missing file": 1})
    server.files["/a.jsonl"] = "\n".join(lines_of(10)).encode()
    server.num_broken = 10**6
    with pytest.raises(
        DataError,
        match=r"a.jsonl cannot be read at byte or row 0: .*run the same command again to go on",
    ):
        read_all(f"{server.url}/a.jsonl")
    server.shutdown()
    server.server_close()
    with pytest.raises(
        DataError, match=r"b.jsonl cannot be read at byte or row 0: .*corpus.SOURCE.root=FOLDER"
    ):
        read_all(f"{server.url}/b.jsonl")


def test_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(
        DataError, match="a.jsonl cannot be read at byte or row 0: IsADirectoryError"
    ):
        read_all(str(tmp_path / "a.jsonl"))


def test_redpajama_v1_from_urls(server, tmp_path):
    """As on the web: lists of URLs, and the files they name; here below one address."""
    texts, _ = write_redpajama_v1(tmp_path)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        name = path.relative_to(tmp_path).as_posix()
        server.files[f"/{name}"] = path.read_bytes()
        urls = server.files.get(f"/urls/{name.split('/')[0]}.txt", b"")
        url = f"https://data.together.xyz/redpajama-data-1T/v1.0.0/{name}\n".encode()
        server.files[f"/urls/{name.split('/')[0]}.txt"] = urls + url
    config = CorpusConfig(name="web", kind=CorpusKind.redpajama_v1)
    config.redpajama_v1.root = server.url
    corpus = build_corpus(config)
    skipped = Losses()
    found = {d.doc_id: d.text for unit in corpus.units() for d in corpus.read(unit, skipped)}
    assert found == texts and skipped["truncated file"] == 1
    assert f"redpajama_v1/{CRAWL}" in [unit.name for unit in corpus.units()]
    del server.files["/urls/c4.txt"]
    with pytest.raises(
        ConfigError,
        match=r"urls/c4.txt of .* cannot be read \(ClientResponseError: 404.*expected FOLDER/arxiv",
    ):
        build_corpus(config)


def test_redpajama_v2_from_urls(server):
    tags = ["2023-06/0000/en_head", "2023-06/0000/en_middle"]
    server.files["/listings/en-2023-06-head_middle.txt"] = "\n".join(reversed(tags)).encode()
    server.files[f"/documents/{tags[0]}.json.gz"] = gzip.compress(page("a page").encode())
    config = CorpusConfig(name="web", kind=CorpusKind.redpajama_v2)
    config.redpajama_v2.root = server.url
    corpus, skipped = build_corpus(config), Losses()
    assert [unit.name for unit in corpus.units()] == [f"redpajama_v2/{tag}" for tag in tags]
    documents = [d for unit in corpus.units() for d in corpus.read(unit, skipped)]
    assert [(d.doc_id, d.text) for d in documents] == [
        (f"redpajama_v2/{tags[0]}.json.gz/0", "a page")
    ]
    assert skipped == {"missing file": 1, "list of duplicates, missing file (kept)": 2}


def test_memory_does_not_grow_with_the_file(tmp_path):
    generator, peaks = random.Random(0), []
    lines = [
        json.dumps({"text": generator.randbytes(2_000).hex()}).encode() + b"\n" for _ in range(500)
    ]
    for times in (2, 10):  # 4 and 20 MB
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines * times), 1))
        tracemalloc.start()
        assert sum(1 for _ in json_records(str(tmp_path / "a.jsonl.gz"), Losses())) == 500 * times
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4e6 and peaks[1] < 1.5 * peaks[0]


def test_records_too_long_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    long = json.dumps({"text": "x" * 2000})
    (tmp_path / "a.jsonl").write_text("\n".join([*lines_of(2), long, *lines_of(1), long]))
    texts, skipped = read_all(str(tmp_path / "a.jsonl"))
    assert texts == ["0 0", "1 7919", "0 0"] and skipped == {records.TOO_LONG: 2}
    numbers = [number for number, _ in json_records(str(tmp_path / "a.jsonl"), Losses())]
    assert numbers == [0, 1, 3]
    (tmp_path / "a.txt").write_text("x" * 2000)
    assert whole_text(str(tmp_path / "a.txt"), counts := Losses()) is None and counts == {
        records.TOO_LONG: 1
    }


def test_packed_files_of_several_members(tmp_path):
    parts = [line.encode() + b"\n" for line in lines_of(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)) + b"\0" * 512)
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert read_all(str(tmp_path / name)) == (["0 0", "1 7919", "2 15838"], {})
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    assert read_all(str(tmp_path / "b.jsonl.gz")) == ([], {"truncated file": 1})
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(parts[0]) + b"garbage")
    assert read_all(str(tmp_path / "c.jsonl.zst")) == (["0 0"], {"damaged file": 1})


def rows_of(path):
    skipped = Losses()
    return [record["text"] for _, record in parquet_records(str(path), ["text"], skipped)], dict(
        skipped
    )


def test_damaged_pages_and_bytes_of_parquet(tmp_path):
    table = pa.table({"text": [f"{n} " * 40 for n in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200, compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    start = middle.data_page_offset + 40
    content[start : start + 200] = b"\xff" * 200
    (tmp_path / "a.parquet").write_bytes(content)
    rows, counts = rows_of(tmp_path / "a.parquet")
    assert (
        rows == [f"{n} " * 40 for n in range(len(rows))]
        and 400 <= len(rows) < 600
        and counts == {"damaged file": 1}
    )
    latin = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin}), tmp_path / "b.parquet")
    assert rows_of(tmp_path / "b.parquet") == (["fine"], {"invalid utf-8": 1})
