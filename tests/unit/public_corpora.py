"""Miniature mirrors of the public corpora, with their real field names, file names and faults.

Every ``write_*`` fills a mirror folder and returns what an adapter must make of it: the texts of
its documents by id, and the counts of what it leaves out.
"""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

SPECIAL = "<|end_of_text|> <s> </s> <|endoftext|> <|begin_of_text|> <|assistant|>"
LONG_LINE = "x y" * 1_000_000  # a line of 3 MB
LONG_DOCUMENT = "word " * 400_000  # about 400,000 tokens
LONE_SURROGATE = '{"text": "half a pair \\ud800", "meta": {}}'

META = {
    "arxiv": {"timestamp": "2020", "yymm": "2001", "arxiv_id": "2001.1",
              "language": "en", "url": "https://arxiv.org/abs/1"},
    "c4": {"timestamp": "2019", "source": "c4", "language": "en", "url": "https://c4"},
    "github": {
        "content_hash": "h", "timestamp": "", "source": "github", "line_count": 3,
        "max_line_length": 9, "avg_line_length": 3.5, "alnum_prop": 0.7, "repo_name": "a/b",
        "id": "1", "size": "20", "binary": False,
        "copies": "1", "ref": "refs/heads/main", "path": "a.py", "mode": "33188", "license": "mit",
        "language": [{"name": "Python", "bytes": "20"}],
    },
    "stackexchange": {"timestamp": "2023", "source": "stackexchange", "language": "en",
                      "question_score": "3", "url": "u"},
    "wikipedia": {"timestamp": "2023", "title": "T",
                  "language": "de", "url": "https://de.wikipedia.org"},
}  # fmt: skip
CRAWL = "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst"


def write_redpajama_v1(root: Path) -> tuple[dict[str, str], dict[str, int]]:
    """One file per domain, ``common_crawl`` with its own schema and a second, truncated file."""
    counts = {
        "empty text": 2,
        "no text": 1,
        "lone surrogate": 1,
        "bad json": 2,
        "no meta (kept)": 1,
        "truncated file": 1,
    }
    lines = [
        record(SPECIAL, "arxiv"),
        record(" \n", "arxiv"),
        LONE_SURROGATE,
        json.dumps({"text": "no meta"}),
        '{"text": "torn',
        "[1, 2]",
        json.dumps({"meta": {}}),
        "",
        record(LONG_LINE, "arxiv"),
        record(LONG_DOCUMENT, "arxiv"),
        record("", "arxiv"),
    ]
    write(root / "arxiv/arxiv_023827cd.jsonl", "\n".join(lines).encode())
    kept = {0: SPECIAL, 3: "no meta", 8: LONG_LINE, 9: LONG_DOCUMENT}
    texts = {f"arxiv/arxiv_023827cd.jsonl:{line}": text for line, text in kept.items()}
    names = {
        "c4": "c4-train.00000-of-01024.jsonl",
        "github": "filtered_08cdfa755e6d4d89b673d5bd1acee5f6.sampled.jsonl",
        "stackexchange": "stackexchange.jsonl",
        "wikipedia": "wiki.jsonl",
    }
    for domain, name in names.items():
        write(root / domain / name, (record(f"text of {domain}", domain) + "\n").encode())
        texts[f"{domain}/{name}:0"] = f"text of {domain}"
    prediction = {
        "pred_label": "__label__wiki",
        "pred_label_prob": 0.9,
        "wiki_prob": 0.9,
        "source": "cc/2023-06/en_head_0000",
    }
    crawl = [
        json.dumps({"text": f"page {n} ä", **prediction}, ensure_ascii=False) for n in range(3)
    ]
    packed = zstandard.compress("\n".join(crawl).encode())
    write(root / CRAWL, packed + zstandard.compress(b"\n" + crawl[0].encode()))  # two frames
    texts |= {f"{CRAWL}:{n}": f"page {n} ä" for n in range(3)} | {f"{CRAWL}:3": "page 0 ä"}
    write(
        root / CRAWL.replace("head_0000", "head_0001"), packed[:-4]
    )  # nothing of it can be decompressed
    return {f"redpajama_v1/{name}": text for name, text in texts.items()}, counts


def record(text: str, domain: str) -> str:
    """A line of RedPajama-Data-1T."""
    return json.dumps({"text": text, "meta": META[domain]})


def write_redpajama_v2(root: Path) -> tuple[dict[str, str], dict[str, int]]:
    """A shard of head (with a list of duplicates), middle (truncated, without one) and tail."""
    pages = [page("first"), page("a duplicate"), page(""), page("long " * 50), page(SPECIAL)]
    write(root / "documents/2023-06/0000/en_head.json.gz", gzip.compress("\n".join(pages).encode()))
    lots = "\n".join(page(f"page {n} {n * 7919}") for n in range(400)).encode()
    write(root / "documents/2023-06/0000/en_middle.json.gz", gzip.compress(lots)[:-2000])
    write(root / "documents/2023-06/0000/en_tail.json.gz", gzip.compress(page("tail").encode()))
    write(root / "documents/2023-06/0000/de_head.json.gz", gzip.compress(page("deutsch").encode()))
    (root / "duplicates/2023-06/0000").mkdir(parents=True)
    shard = "2023-06/0000/en_head.json.gz"
    duplicates = {"shard_id": [shard], "doc_id": [f"{shard}/1"], "digest": ["sha1:A"]}
    pq.write_table(
        pa.table(duplicates), root / "duplicates/2023-06/0000/en_head.duplicates.parquet"
    )
    name = f"redpajama_v2/{shard}"
    texts = {f"{name}/0": "first", f"{name}/3": "long " * 50, f"{name}/4": SPECIAL}
    counts = {
        "listed duplicate": 1,
        "empty text": 1,
        "truncated file": 1,
        "list of duplicates, missing file (kept)": 1,
    }
    return texts, counts


def page(text: str) -> str:
    """A line of RedPajama-Data-V2; its title tries to look like a key."""
    return json.dumps(
        {
            "url": "https://a.b",
            "date_download": "2023-02-01T00:00:00Z",
            "digest": "sha1:A",
            "length": len(text),
            "nlines": 1,
            "source_domain": "a.b",
            "title": 'a "length": 9999999',
            "raw_content": text,
            "cc_segment": "crawl-data/x.wet.gz",
            "original_nlines": 2,
            "original_length": len(text) + 1,
            "line_ids": [0],
            "language": "en",
            "language_score": 0.9,
            "perplexity": 300.5,
            "bucket": "head",
        }
    )


def write_starcoder(root: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Two Python files that share repositories, with int and float stars; Go; notebooks."""
    rows = [
        ("b.py", "x/one", "second file\n"),
        ("c.py", "x/two", "<reponame>x/two\n<gh_stars>1-10\nprint(1)\n"),
        ("empty.py", "x/two", ""),
        ("nul.py", None, "no repository"),
    ]
    write_code(
        root / "python/train-00000-of-00002.parquet", rows, pa.array([3, 1, 1, 0], pa.int64())
    )
    rows = [
        ("a.py", "x/one", "<filename>a.py<gh_stars>3\nfirst file\n"),
        ("z.py", "x/two", SPECIAL),
        ("d.py", "x/two", "<reponame>x/two\n"),
    ]
    write_code(
        root / "python/train-00001-of-00002.parquet",
        rows,
        pa.array([3.0, None, None], pa.float64()),
    )
    write_code(
        root / "go/train-00000-of-00001.parquet",
        [("a.go", "x/one", "package a")],
        pa.array([3], pa.int64()),
    )
    (root / "jupyter-scripts-dedup-filtered").mkdir()
    notebook = pa.table({"content": ["a notebook"], "avg_line_length": [3.0]})
    pq.write_table(notebook, root / "jupyter-scripts-dedup-filtered/train-00000-of-00001.parquet")
    name = "starcoder/python/train-00000-of-00002+1"
    texts = {
        f"{name}/x/one": "first file\n\n\nsecond file\n",
        f"{name}/x/two": f"print(1)\n\n\n{SPECIAL}",
        f"{name}/python/train-00000-of-00002.parquet:3": "no repository",
        "starcoder/go/train-00000-of-00001/x/one": "package a",
    }
    return texts, {
        "empty text": 2,
        "control text removed (kept)": 3,
        "no repository name (kept)": 1,
    }


def write_code(path: Path, rows: list[tuple[str, str | None, str]], stars: pa.Array) -> None:
    """A parquet file of starcoderdata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths, repositories, contents = zip(*rows, strict=True)
    table = {
        "max_stars_repo_path": paths,
        "max_stars_repo_name": repositories,
        "max_stars_count": stars,
        "id": [str(n) for n in range(len(rows))],
        "content": contents,
    }
    pq.write_table(pa.table(table), path)


def write_fineweb_edu(root: Path) -> tuple[dict[str, str], dict[str, int]]:
    """One file of the sample, a page without an id, one without text."""
    texts = ["educational", None, SPECIAL, "no id"]
    columns = {
        "text": texts,
        "id": ["<urn:uuid:1>", "<urn:uuid:2>", "<urn:uuid:3>", None],
        "dump": ["CC-MAIN-2024-10"] * 4,
        "url": ["u"] * 4,
        "file_path": ["s3://x"] * 4,
        "language": ["en"] * 4,
        "language_score": [0.9] * 4,
        "token_count": [1, 0, 20, 2],
        "score": [3.1] * 4,
        "int_score": [3] * 4,
    }
    (root / "sample/10BT").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "sample/10BT/000_00000.parquet")
    found = {
        "<urn:uuid:1>": "educational",
        "<urn:uuid:3>": SPECIAL,
        "sample/10BT/000_00000.parquet:3": "no id",
    }
    return {f"fineweb_edu/{name}": text for name, text in found.items()}, {"no text": 1}


def write_pg19(root: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Train, validation and test files of a mirror; returns the train books."""
    (root / "data").mkdir(parents=True)
    for split, number in (("train", 11), ("validation", 12), ("test", 13)):
        book = {
            "short_book_title": [f"The {split} book"],
            "publication_date": pa.array([1900], pa.int32()),
            "url": [f"http://www.gutenberg.org/ebooks/{number}"],
            "text": [f"Once upon a {split}."],
        }
        pq.write_table(pa.table(book), root / f"data/{split}-00000-of-00001.parquet")
    return {"pg19/train/11 The train book": "Once upon a train."}, {}


def write(path: Path, content: bytes) -> None:
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
