"""Nothing is dropped in silence: a checker of its own adds up what was planted, file by file.

It reads the product as any program would (JSON, parquet, Arrow) and shares no code with
``data_prep.verify``: for every file, the records in it are the documents in the segments and the
losses that are told of it; every packed text was planted, and every token is where the list says.
"""

import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import dirty_corpora
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dirty_corpora import NOT_READ, Planted, Texts

from data_prep.config import BucketQuota, PackConfig
from data_prep.pack import pack as pack_corpus
from data_prep.verification import audit_folder
from data_prep.verify import main as verify_main
from longrope2.config import compose
from longrope2.corpora import remote
from longrope2.errors import ArtifactError

ADAPTERS = ("folder", "redpajama_v1", "redpajama_v2", "starcoder", "fineweb_edu", "pg19")
KEPT = "(kept)"
RANGE_BYTES = 20_000


def plant(root: Path) -> Planted:
    """All corpora, and the settings that read them."""
    texts, everything = Texts(0), Planted()
    for adapter in ADAPTERS:
        (root / adapter).mkdir()
        own = getattr(dirty_corpora, f"write_{adapter}")(root / adapter, texts)
        everything.records |= own.records
        everything.texts |= own.texts
        everything.cut |= own.cut
    return everything


def pack(root: Path, *more: str) -> Path:
    roots = [f"corpus.{adapter}.root={root / adapter}" for adapter in ADAPTERS[1:]]
    words = [
        *("corpus=folder", "model=tiny", "target_len=512", *roots, *more),
        *("corpus.kind=mix", f"corpus.members=[{','.join(ADAPTERS)}]", "corpus.name=mixed"),
        *(f"corpus.folder={root / 'folder'}", "corpus.more_text_fields=[body]"),
        *("corpus.heldout_fraction=0.2", "corpus.starcoder.join_repositories=false"),
        *("corpus.redpajama_v2.partitions=[head_middle,tail]", "documents.max_tokens=2000"),
        *(
            "corpus.redpajama_v1.domains=[arxiv,c4,common_crawl]",
            f"run.root={root}",
            "run.name=run",
        ),
    ]
    config = compose(PackConfig, "pack", words)
    config.quotas = {adapter: BucketQuota(short=None, long=None) for adapter in ADAPTERS}
    pack_corpus(config)
    return root / "run" / "1_segments"


def whole_unit(name: str) -> str:
    """A unit without the range of bytes that it is of its file."""
    return re.sub(r"@\d+-\d+$", "", name)


def whole_document(doc_id: str) -> str:
    return re.sub(r"#\d+$", "", doc_id)


class Product:
    """What the folder says, read without the code that wrote it."""

    def __init__(self, segments: Path) -> None:
        self.manifest = json.loads((segments / "manifest.json").read_text())
        self.listed = pq.read_table(segments / "documents.parquet").to_pylist()
        self.losses = pq.read_table(segments / "losses.parquet").to_pylist()
        self.tokens = self._tokens(segments)

    def _tokens(self, segments: Path) -> Counter[str]:
        """Tokens of each document in the shards."""
        found: Counter[str] = Counter()
        for name in self.manifest["files"]:
            with pa.memory_map(str(segments / name)) as source:
                rows = pa.ipc.open_stream(source).read_all().drop(["tokens"]).to_pylist()
            for row in rows:
                start = 0
                for end, doc_id, pad in zip(
                    row["doc_ends"], row["doc_id"], row["is_padding"], strict=True
                ):
                    found[doc_id] += 0 if pad else end - start
                    start = end
        return found

    def packed(self) -> dict[str, set[str]]:
        """File -> documents of it that are listed as packed."""
        found: dict[str, set[str]] = defaultdict(set)
        for row in self.listed:
            found[whole_unit(row["unit"])].add(whole_document(row["doc_id"]))
        return found

    def lost(self) -> dict[str, Counter[str]]:
        """File -> reason -> records, without what was kept and the damage itself."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.losses:
            if row["file"] is None and not row["reason"].endswith(KEPT):
                found[whole_unit(row["unit"])][row["reason"]] += row["num_records"]
        return found

    def damaged(self) -> dict[str, dict[str, Any]]:
        """Unit -> the damage of its file, for information about lists of duplicates aside."""
        rows = [row for row in self.losses if row["file"] and not row["reason"].endswith(KEPT)]
        return {row["unit"]: row for row in rows}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, Product, Path]:
    root = tmp_path_factory.mktemp("mixed")
    planted = plant(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "RANGE_BYTES", RANGE_BYTES)
        segments = pack(root, "workers=1")
    return planted, Product(segments), segments


pytestmark = pytest.mark.slow


def test_records_of_every_file_are_packed_or_told_as_lost(product) -> None:
    planted, made, _ = product
    packed, lost = made.packed(), made.lost()
    for unit, number in planted.records.items():
        told = len(packed[unit]) + sum(lost[unit].values())
        assert told == number, (unit, len(packed[unit]), lost[unit])
    assert set(packed) | set(lost) | set(made.damaged()) == set(planted.records)
    assert sum(map(len, packed.values())) > 500


def test_only_what_is_fit_is_packed_and_only_for_a_reason_left_out(product) -> None:
    planted, made, _ = product
    hashes = {
        unit: {hashlib.sha256(text.encode()).digest()[:16] for text in texts}
        for unit, texts in planted.texts.items()
    }
    for row in made.listed:
        assert row["text_hash"] in hashes[whole_unit(row["unit"])], row["doc_id"]
    fit = "held out for search and evaluation", "tokenized, not chosen"
    for unit, reasons in made.lost().items():
        expected = len(planted.texts[unit]) - len(made.packed()[unit])
        assert sum(reasons[reason] for reason in fit) == expected, (unit, reasons)


def test_damaged_files_are_told_with_what_was_read(product) -> None:
    planted, made, segments = product
    damaged = made.damaged()
    assert set(damaged) == planted.cut
    for unit, row in damaged.items():
        assert row["records_read"] == planted.records[unit], unit
    named = made.manifest["details"]["damaged_files"]
    report = (segments / "report.html").read_text()
    for row in damaged.values():
        (line,) = [line for line in named if line.startswith(f"{row['file']}: {row['reason']}")]
        assert line in report


def test_sums_by_source_are_those_of_the_files(product) -> None:
    _, made, _ = product
    counts = made.manifest["counts"]
    told: dict[str, Counter[str]] = defaultdict(Counter)
    for row in made.losses:
        told[row["source"]][row["reason"]] += row["num_records"]
    for source in ADAPTERS:
        expected = Counter(counts["num_records_skipped"].get(source, {}))
        expected += Counter(counts["num_documents_untokenized"].get(source, {}))
        left = sum(counts["num_documents_left_out"].get(source, {}).values())
        assert told[source] == expected + Counter({"tokenized, not chosen": left}), source
    assert counts["num_files_not_read"] == NOT_READ
    assert counts["num_documents_left_out"]["fineweb_edu"] == {"id of another document": 1}


def test_every_token_of_the_list_is_in_the_segments_or_told_as_the_rest(
    product, monkeypatch
) -> None:
    _, made, segments = product
    rest: Counter[str] = Counter()
    ids = [row["doc_id"] for row in made.listed]
    assert len(set(ids)) == len(ids) and set(made.tokens) <= {*ids, ""}
    for row in made.listed:
        missing = row["num_tokens"] - made.tokens[row["doc_id"]]
        assert missing >= 0
        rest[row["source"]] += missing
    assert +rest == Counter(made.manifest["counts"]["rest_tokens"])
    monkeypatch.setattr(remote, "RANGE_BYTES", RANGE_BYTES)
    verify_main([str(segments), "--sample", "10000"])  # blesses what pack has blessed


def test_verify_finds_losses_that_are_changed(product, tmp_path) -> None:
    copy = Path(shutil.copytree(product[2], tmp_path / "copy"))
    audit_folder(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["counts"]["num_records_skipped"]["pg19"] = {"empty text": 1000}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"losses.parquet: \d+ losses of pg19, 100\d in the"):
        audit_folder(copy)
    (copy / "losses.parquet").write_bytes(b"")
    with pytest.raises(ArtifactError, match="losses.parquet: missing, or its SHA-256 differs"):
        audit_folder(copy)


def test_workers_and_ranges_change_nothing_of_the_account(product, tmp_path, capsys) -> None:
    """Other processes, whole files: the same texts and losses; all of it in the last lines."""
    planted, made, _ = product
    for adapter in ADAPTERS:
        (tmp_path / adapter).mkdir()
    plant_again = plant_in(tmp_path)
    segments = pack(tmp_path, "workers=2")
    again, printed = Product(segments), capsys.readouterr().out
    assert plant_again.records == planted.records
    assert {u: dict(r) for u, r in again.lost().items()} == {
        u: dict(r) for u, r in made.lost().items()
    }
    assert f"  damaged: {tmp_path}/folder/cut/c.jsonl.gz: truncated file, " in printed
    assert "  not read: 2 files, ending .csv\n" in printed


def plant_in(root: Path) -> Planted:
    for adapter in ADAPTERS:
        (root / adapter).rmdir()
    return plant(root)
