"""Room and time of the packer's plan for many documents: ``python -m benchmarks.pack_plan``.

Makes the indices of tokenized units (no text, no ids), then lets the packer choose and write its
list in a process of its own: duplicates are looked for, over-long documents are cut, and all that
stays is chosen, which takes most room. Bytes a document are the growth of that process' peak
resident memory over what it had when its imports were done.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.config import BucketQuota, PackConfig
from data_prep.demand import length_buckets
from data_prep.reading import Readings
from data_prep.reading_plan import needed_reading
from data_prep.scan import StratumScan, divide_units
from data_prep.shards import PackList
from data_prep.stages import _TokenizeStage, _write_pack_list
from data_prep.token_files import ROWS_PER_BATCH, TokenizedUnit, UnitAccount, _index_schema
from longrope2.config import ModelConfig
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Unit
from longrope2.corpora.held_out import HeldOutTexts

SOURCE = "synthetic"
NUM_DOMAINS = 7
SHARE_OF_COPIES = 0.03  # documents with the text of another one
MEDIAN_TOKENS, SPREAD = 600.0, 1.2  # of a log-normal distribution


def make_units(folder: Path, num_documents: int, num_units: int) -> list[TokenizedUnit]:
    """Indices of units of equal size; a unit's documents are of one domain."""
    size = num_documents // num_units
    units = []
    for number in range(num_units):
        unit, generator = TokenizedUnit(folder, f"unit-{number:05d}"), np.random.default_rng(number)
        tokens = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SPREAD, size)).astype(np.int64)
        _write_index(unit, number, np.clip(tokens, 1, 2_000_000), generator)
        account = UnitAccount([unit.stem], SOURCE, num_documents=size)
        account.num_tokens, account.num_characters = int(tokens.sum()), 4 * int(tokens.sum())
        account.is_last = True
        unit.write_account(account)
        units.append(unit)
    return units


def _write_index(
    unit: TokenizedUnit, number: int, tokens: np.ndarray, generator: np.random.Generator
) -> None:
    size, schema = len(tokens), _index_schema(0)
    hashes = generator.integers(0, 2**63, (size, 2), np.int64).astype(np.uint64)
    copies = generator.random(size) < SHARE_OF_COPIES
    hashes[copies] = generator.integers(0, 1000, (int(copies.sum()), 1), np.int64).astype(np.uint64)
    columns: dict[str, Any] = {
        "doc_id": [f"{SOURCE}/{number:05d}.jsonl.zst:{row}" for row in range(size)],
        "unit": np.zeros(size, np.int32),
        "domain": [f"domain{number % NUM_DOMAINS}"] * size,
        "start": np.cumsum(tokens) - tokens,
        "num_tokens": tokens,
        "num_characters": 4 * tokens,
        "text_hash": [row.tobytes() for row in hashes],
        # Of the training split, whatever the held-out share.
        "content_hash": [b"\xff" * 8 + row.tobytes()[:8] for row in hashes],
        "order": generator.integers(0, 2**63, size, np.int64).astype(np.uint64) * np.uint64(2),
        "signature": [b""] * size,
    }
    batch = pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    with pa.OSFile(str(unit.folder / f"{unit.stem}.index.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, schema) as writer:
            for first in range(0, size, ROWS_PER_BATCH):
                writer.write_batch(batch.slice(first, ROWS_PER_BATCH))


class _Tokenized(_TokenizeStage):
    """A tokenize stage whose units are there already."""

    encoder = SimpleNamespace(  # type: ignore[assignment]
        num_boundary_tokens=2, vocab_size=32_000, bos_id=1, eos_id=2, control_ids=(1, 2)
    )
    held_out = HeldOutTexts(0.05, frozenset())  # type: ignore[assignment]

    def start(self) -> Readings:
        """Everything is read."""
        units = divide_units(self.corpus.units(), [SOURCE], self.config.seed)
        scans = dict.fromkeys(units, StratumScan(4.0, None))
        lengths, windows = length_buckets(self.config), self.config.short_overlong
        readings = Readings(units, scans, lengths, windows, max_units=None)
        readings.start(needed_reading(self.config, dict.fromkeys(units), {}))
        return readings

    def run(self, readings: Readings) -> list[TokenizedUnit]:
        """The units that were made."""
        readings.tasks()
        return [TokenizedUnit(self.work, unit.name) for unit in self.corpus.units()]


def plan(folder: Path) -> dict[str, float]:
    """Choose from the units of ``folder`` and write the list; what it took."""
    stems = sorted(path.stem for path in folder.glob("unit-*.json"))
    units = [Unit(stem, SOURCE, size_bytes=2**21) for stem in stems]
    model = ModelConfig(name="synthetic", path="nowhere", original_len=8192)
    config = PackConfig(
        model=model,
        target_len=131_072,
        corpus=CorpusConfig(name=SOURCE, kind=CorpusKind.sample),
        quotas={SOURCE: BucketQuota(short=None, long=None)},
    )
    corpus: Any = SimpleNamespace(units=lambda: units)
    before, began = _peak_bytes(), time.perf_counter()
    pack_list = PackList(folder / "list")
    _write_pack_list(config, _Tokenized(config, folder, corpus, folder), pack_list)
    seconds, peak = time.perf_counter() - began, _peak_bytes()
    rows = sum(pack_list.parts(unit).num_rows for unit in range(pack_list.summary()["num_units"]))
    return {"seconds": seconds, "growth_bytes": peak - before, "num_listed": rows}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Make, plan and print one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pack_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="of units made before; only plan")
    given = parser.parse_args()
    if given.folder is not None:
        print(json.dumps(plan(given.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_units(Path(scratch), given.documents, given.units)
        command = [sys.executable, "-m", "benchmarks.pack_plan", "--folder", scratch]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found = {"documents": given.documents, "units": given.units, **json.loads(told)}
    found["bytes_a_document"] = round(found["growth_bytes"] / given.documents, 1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
