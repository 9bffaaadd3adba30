"""``documents.parquet``: every document (or part of one) that was chosen, where it came from and how long it is.

It is what lets an audit go back from segments to source texts, and a reader see what the model was trained on.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.document_table import NUM_BOUNDARY_TOKENS
from data_prep.pack_plan import PackPlan
from longrope2.artifacts import atomic_path, sha256_of_file

__all__ = ["DOCUMENTS_FILE", "write_document_list"]

DOCUMENTS_FILE = "documents.parquet"
SCHEMA = pa.schema([
    ("doc_id", pa.string()),
    ("source", pa.string()),
    ("domain", pa.string()),
    ("unit", pa.string()),
    ("num_tokens", pa.int64()),  # BOS and EOS included
    ("offset", pa.int64()),  # first id in the ids of the whole document's text
    ("text_hash", pa.binary(16)),  # first half of the SHA-256 of the whole document's text
])  # fmt: skip


def write_document_list(folder: Path, plan: PackPlan) -> dict[str, Any]:
    """Write the list, shuffle unit by shuffle unit; returns its name, hash and number of rows."""
    path, rows = folder / DOCUMENTS_FILE, 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for unit in range(plan.summary()["num_units"]):
            parts = plan.parts(unit)
            with_boundaries = pa.array(parts.column("num_tokens").to_numpy() + NUM_BOUNDARY_TOKENS)
            columns = [with_boundaries if name == "num_tokens" else parts.column(name) for name in SCHEMA.names]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            rows += parts.num_rows
    return {"file": path.name, "sha256": sha256_of_file(path), "num_rows": rows}
