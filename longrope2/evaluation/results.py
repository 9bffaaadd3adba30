"""Finished measurements on disk, one JSON line each: a rerun after a kill measures only what is missing.

A line is identified by a fingerprint of everything its values depend on (weights, RoPE table of the window used, data),
not by the subject's name: changed weights or samples are measured anew, and two subjects that are the same model in
the short window share one measurement.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError

__all__ = ["RESULTS_FILE", "Measurement", "ResultsLog"]

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Measurement:
    """One subject at one length of one suite."""

    subject: str
    suite: str
    """``needle``, ``perplexity`` or ``retention``."""
    length: int
    """Tokens of each sample or window (for retention: at most)."""
    fingerprint: str
    """Hash of the weights, the RoPE table and the data."""
    values: dict[str, Any]
    """Raw per-sample numbers; means and intervals are worked out from them."""


class ResultsLog:
    """Append-only file of measurements; each line is on disk before the next measurement starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = _read(path)
        self._values = {measurement.fingerprint: measurement.values for measurement in found}
        self._lines = {(measurement.subject, measurement.fingerprint) for measurement in found}

    def find(self, fingerprint: str) -> dict[str, Any] | None:
        """Values measured before for the same fingerprint."""
        return self._values.get(fingerprint)

    def append(self, measurement: Measurement) -> None:
        """Add one line and force it to disk; a line that is there already is not repeated."""
        if (measurement.subject, measurement.fingerprint) in self._lines:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(asdict(measurement)) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._values[measurement.fingerprint] = measurement.values
        self._lines.add((measurement.subject, measurement.fingerprint))


def _read(path: Path) -> list[Measurement]:
    """Measurements of the file; a torn last line, left by a kill, is cut off the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    measurements = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            measurements.append(Measurement(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ArtifactError(
                f"{path}, line {number} is not a measurement ({error}); remove the file to measure everything anew"
            ) from None
    return measurements
