"""Which text a run's figures are of, and what its stages share, derived from their manifests.

Search and evaluation note the hashes of the texts they read, packing notes those it packed
(``documents.parquet``): what they have in common is counted, not assumed.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from longrope2.corpora.held_out import MOST_NAMED, documents_file
from longrope2.corpora.run_corpus import HeldoutText, segments_of
from longrope2.files.artifacts import Manifest
from longrope2.report.data import RunRecord

_EARLIER = "by an earlier version, which did not note the documents it read"


def evaluated_text(record: RunRecord) -> str:
    """Which text the tables are of, a sentence; empty where nothing was evaluated on text."""
    found = record.evaluation or record.suite
    return "" if found is None or found.text is None else str(found.text)


def text_statements(record: RunRecord) -> list[str]:
    """One statement per fact, plain text; none before an evaluation on text."""
    manifest = record.stages["evaluations"].manifest
    if manifest is None or "corpus" not in manifest.inputs:
        return []
    measured = manifest.details.get("text_hashes")
    if measured is None:
        return [
            f"Whether training, search and evaluation share text is unknown: evaluated {_EARLIER}."
        ]
    return [
        str(HeldoutText(**manifest.details["text"])),
        *_of_search(record.stages["factors"].manifest, manifest, set(measured)),
        *_of_training(record, set(measured), manifest.details.get("packed_ids", [])),
    ]


def _of_search(factors: Manifest | None, evaluations: Manifest, measured: set[str]) -> list[str]:
    """What the factors were searched on, and how much of it was evaluated on too."""
    if factors is None:
        return []
    searched = factors.details.get("text_hashes")
    if searched is None:
        return [f"Whether search and evaluation share text is unknown: searched {_EARLIER}."]
    settings: dict[str, Any] = factors.config["search"]
    on_needles = settings["objective"] == "needle"
    seeds = f"{factors.seeds.get('seed')} and {evaluations.seeds.get('needle')}"
    apart = f" Keys, values and places are drawn separately (seeds {seeds})." if on_needles else ""
    if not searched:
        return [f"The factors were searched on needles in noise, which is no document.{apart}"]
    what = "needles hidden in documents" if on_needles else "the perplexity of documents"
    of = f"The factors were searched on {what} of corpus {factors.details['text']['corpus']}"
    common = len(measured.intersection(searched))
    if not common:
        return [f"{of}, none of which evaluation reads.{apart}"]
    return [
        f"{of}; {common:,} of the {len(measured):,} that evaluation reads are among them.{apart}"
    ]


def _of_training(record: RunRecord, measured: set[str], packed_ids: list[str]) -> list[str]:
    """Whether the segments hold what evaluation reads; ``packed_ids``: what it found itself."""
    segments = segments_of(record.folder)
    if segments is None:
        return []
    listed = documents_file(segments)
    if listed is None:
        lacking = f"{segments} does not list its documents"
        return [f"Whether the training segments hold evaluated text is unknown: {lacking}."]
    common = max(len(measured & _packed_hashes(listed)), len(packed_ids))
    if not common:
        evaluated = f"{len(measured):,} documents that evaluation reads"
        return [f"None of the {evaluated} is in the training segments."]
    these = f"{common:,} of the {len(measured):,} documents that evaluation reads are"
    named = f" ({', '.join(packed_ids[:MOST_NAMED])})" if packed_ids else ""
    return [f"{these} in the training segments{named}: a trained model has seen them."]


def _packed_hashes(path: Path) -> set[str]:
    """Hashes of all texts that were packed, hexadecimal."""
    column = pq.read_table(path, columns=["text_hash"]).column("text_hash")
    return {value.hex() for value in column.to_pylist()}
