"""The journal of a search: every loss that was computed, so that a killed search repeats nothing.

JSON lines. The first names what the losses depend on (model, samples, target length, ...); each further one holds the
losses of one batch of samples under one set of factors, appended and flushed as soon as it is known. ``null`` stands
for a loss that was not finite. A last line torn by a crash is cut off; damage anywhere else is refused.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError
from longrope2.rope import RescaleFactors

__all__ = ["Journal", "factors_key"]

VERSION = 1


def factors_key(factors: RescaleFactors) -> str:
    """Hash of everything in the factors that a long-window loss depends on."""
    content = [factors.factors, factors.long_attention_scale]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


class Journal:
    """Losses by factors, in memory and on disk; use it in ``with``.

    Attributes:
        num_losses_read: Sample losses found in the file when it was opened.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open or start the journal.

        Args:
            path: The file; its folder is made where missing.
            header: What the losses depend on; plain JSON values.

        Raises:
            ArtifactError: another search has the file open, it is damaged, or it belongs to another search.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._losses: dict[str, list[float]] = {}
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(json.loads(json.dumps(dict(header))))
        except BaseException:
            self._file.close()
            raise
        self.num_losses_read = sum(len(losses) for losses in self._losses.values())

    def losses(self, factors: RescaleFactors) -> list[float]:
        """Known losses of the first samples under these factors; infinite where the loss was not finite."""
        return list(self._losses.get(factors_key(factors), ()))

    def add(self, factors: RescaleFactors, losses: list[float]) -> None:
        """Record the losses of the next samples under these factors."""
        key = factors_key(factors)
        known = self._losses.setdefault(key, [])
        record = {
            "factors": key,
            "first_sample": len(known),
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        }
        self._append(record)
        known.extend(losses)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        """Keep a second search from appending to the same file."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(f"{self._path} is in use by another search; wait for it, or end it") from None

    def _read(self, header: dict[str, Any]) -> None:
        """Load what is there, cut off a torn last line, and check or write the header."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
                if not line.endswith(b"\n"):
                    raise ValueError("no line end")
            except ValueError:
                del records[number - 1 :]
                if number < len(lines):
                    raise self._damaged(number) from None
                self._file.truncate(sum(len(kept) for kept in lines[:-1]))
        if not records:
            self._append({"search_journal": VERSION, **header})
            return
        self._check_header(records[0], header)
        for number, record in enumerate(records[1:], start=2):
            self._take(record, number)

    def _check_header(self, found: Any, header: dict[str, Any]) -> None:
        """The journal must be of this program's version and of this very search."""
        if not isinstance(found, dict) or found.pop("search_journal", None) != VERSION:
            raise self._damaged(1)
        for key in sorted(found.keys() | header.keys()):
            if found.get(key) != header.get(key):
                raise ArtifactError(
                    f"{self._path} belongs to another search: {key} was {found.get(key)}, now it is {header.get(key)}; "
                    f"use another run.name, or remove {self._path.parent} to search again"
                )

    def _take(self, record: Any, number: int) -> None:
        """Add one line of the file to the known losses."""
        try:
            known = self._losses.setdefault(record["factors"], [])
            losses = [math.inf if loss is None else float(loss) for loss in record["losses"]]
            if record["first_sample"] != len(known):
                raise ValueError("a line is missing")
        except (KeyError, TypeError, ValueError):
            raise self._damaged(number) from None
        known.extend(losses)

    def _damaged(self, number: int) -> ArtifactError:
        """The error for a line that cannot be right."""
        return ArtifactError(
            f"{self._path} is damaged at line {number}; remove that line and all after it to keep the losses before"
        )

    def _append(self, record: dict[str, Any]) -> None:
        """One line, handed to the operating system at once."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
