"""The hand-over from planning to packing: which part of which tokenized document goes to which shuffle unit.

One Arrow file per shuffle unit, written next to each other and declared complete by ``plan.json``, which comes last. A
document's shuffle unit follows from its order of choice alone, so it does not depend on how the corpus was read.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.candidates import WHOLE
from data_prep.document_table import DocumentTable
from data_prep.quotas import Selection
from longrope2.artifacts import atomic_path, write_text

__all__ = ["PLAN_SCHEMA", "PackPlan", "write_pack_plan"]

PLAN_SCHEMA = pa.schema([
    ("doc_id", pa.string()),  # of the part: "#NUMBER" behind the id of the document it was cut from
    ("source", pa.string()),
    ("domain", pa.string()),
    ("unit", pa.string()),  # name in the corpus
    ("stem", pa.string()),  # name of its token file
    ("start", pa.int64()),  # first id in the token file
    ("num_tokens", pa.int64()),  # without BOS and EOS
    ("offset", pa.int64()),  # first id in the document's own text
    ("bucket", pa.int8()),
    ("text_hash", pa.binary(16)),
])  # fmt: skip
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64


@dataclass(frozen=True)
class PackPlan:
    """A plan on disk."""

    folder: Path

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / "plan.json").is_file()

    def summary(self) -> dict[str, Any]:
        """What planning counted; the number of shuffle units is ``num_units``."""
        return json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))

    def parts(self, unit: int) -> pa.Table:
        """Parts of one shuffle unit."""
        with pa.memory_map(str(self.path(unit))) as source:
            return pa.ipc.open_stream(source).read_all()

    def path(self, unit: int) -> Path:
        """File of one shuffle unit."""
        return self.folder / f"plan-{unit:05d}.arrow"


def write_pack_plan(
    folder: Path, table: DocumentTable, selection: Selection, *, tokens_per_unit: int, summary: dict[str, Any]
) -> PackPlan:
    """Divide the chosen parts among shuffle units of about ``tokens_per_unit`` tokens and write them down.

    Args:
        folder: Gets the files.
        table: All documents.
        selection: The chosen parts.
        tokens_per_unit: Tokens of a shuffle unit.
        summary: Plain JSON values to keep with the plan.
    """
    plan, parts = PackPlan(folder), selection.parts
    num_units = max(1, round(int(parts.tokens_P.sum()) / tokens_per_unit))
    shuffle_unit_P = _mixed(table.order_D[parts.document_P]) % np.uint64(num_units)
    with ExitStack() as stack:
        writers = []
        for unit in range(num_units):
            sink = stack.enter_context(pa.OSFile(str(stack.enter_context(atomic_path(plan.path(unit)))), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_stream(sink, PLAN_SCHEMA)))
        for number in range(len(table.units)):
            own = np.flatnonzero(table.unit_D[parts.document_P] == number)
            if len(own):
                rows = _rows(table, selection, own, number)
                for unit in np.unique(shuffle_unit_P[own]):
                    here = pa.array(np.flatnonzero(shuffle_unit_P[own] == unit))
                    writers[int(unit)].write_batch(rows.take(here))
    write_text(folder / "plan.json", json.dumps({**summary, "num_units": num_units}, indent=1, sort_keys=True))
    return plan


def _rows(table: DocumentTable, selection: Selection, own: np.ndarray, number: int) -> pa.RecordBatch:
    """Rows of the parts ``own``, all from the tokenized unit ``number``."""
    parts = selection.parts.take(own)
    documents = parts.document_P
    ids = [
        doc_id if part == WHOLE else f"{doc_id}#{part}"
        for doc_id, part in zip(table.values("doc_id", documents), parts.number_P.tolist(), strict=True)
    ]
    names = table.accounts[number].units
    pairs = [table.domains[code] for code in table.domain_D[documents].tolist()]
    columns = [
        ids, [source for source, _ in pairs], [domain for _, domain in pairs],
        [names[place] for place in table.values("unit", documents)], [table.units[number].stem] * len(own),
        table.start_D[documents] + parts.start_P, parts.content_P, parts.start_P, selection.bucket_P[own].astype(np.int8),
        [row.tobytes() for row in table.text_hash_D2[documents]],
    ]  # fmt: skip
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, PLAN_SCHEMA, strict=True)], schema=PLAN_SCHEMA)


def _mixed(order: np.ndarray) -> np.ndarray:
    """Another 64-bit hash of the order: documents of one shuffle unit are not those chosen at the same time."""
    value = (order ^ (order >> np.uint64(30))) * MIX[0]
    value = (value ^ (value >> np.uint64(27))) * MIX[1]
    return value ^ (value >> np.uint64(31))
