"""The journal of a search: every loss that was computed, so that a killed search repeats nothing.

JSON lines. The first names what the losses depend on (model, samples, target length, ...); each
further one holds the losses of one batch of samples under one set of factors, appended and flushed
as soon as it is known. ``null`` stands for a loss that was not finite. A last line torn by a crash
is cut off; damage anywhere else is refused.

Every worker of a search appends to a file of its own (``journal.jsonl``, ``journal.1.jsonl``, ...)
and reads them all when it starts, so workers never wait for each other, and a later run may have
more or fewer of them.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longrope2.errors import ArtifactError
from longrope2.rope.factors import RescaleFactors

VERSION = 2
JOURNAL_FILE = "journal.jsonl"


def factors_key(factors: RescaleFactors) -> str:
    """Hash of everything in the factors that a long-window loss depends on."""
    content = [factors.factors, factors.long_attention_scale]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


class Journal:
    """Losses by factors and batch, in memory and on disk; use it in ``with``.

    Attributes:
        num_losses: Sample losses known: those found in the files and those added since.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], worker: int = 0, writes: bool = True
    ) -> None:
        """Open or start the journal of a worker, and read those of all.

        Args:
            folder: Where the journals are; made where missing.
            header: What the losses depend on; plain JSON values.
            worker: Number of this worker; 0 has ``journal.jsonl``.
            writes: False for the processes of a worker that leave writing to another one.

        Raises:
            ArtifactError: another search has the file open, a journal is damaged, or belongs to
                another search.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / (f"journal.{worker}.jsonl" if worker else JOURNAL_FILE)
        self._losses: dict[str, dict[int, list[float]]] = {}
        self.num_losses = 0
        self._file = self._path.open("ab") if writes else None
        try:
            if self._file is not None:
                self._lock(self._file)
            self._read_all(folder, json.loads(json.dumps(dict(header))))
        except BaseException:
            self.__exit__()
            raise

    def losses(self, factors: RescaleFactors) -> dict[int, list[float]]:
        """Known losses under these factors, by batch; infinite where the loss was not finite."""
        return dict(self._losses.get(factors_key(factors), {}))

    def add(self, factors: RescaleFactors, batch: int, losses: list[float]) -> None:
        """Record the losses of one batch of samples under these factors."""
        key = factors_key(factors)
        self._append(
            {
                "factors": key,
                "batch": batch,
                "losses": [loss if math.isfinite(loss) else None for loss in losses],
            }
        )
        self._remember(key, batch, losses)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def _lock(self, file: BinaryIO) -> None:
        """Keep a second search from appending to the same file."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"{self._path} is in use by another search; wait for it, or end it"
            ) from None

    def _read_all(self, folder: Path, header: dict[str, Any]) -> None:
        """Load what all workers have written; cut a torn last line off the own file and give it a header."""
        has_header = False
        for path in sorted(folder.glob("journal*.jsonl")):
            lines = path.read_bytes().splitlines(keepends=True)
            records = _whole_records(path, lines)
            if records:
                self._check_header(path, records[0], header)
            for number, record in enumerate(records[1:], start=2):
                self._take(path, record, number)
            if path == self._path and self._file is not None:
                has_header = bool(records)
                self._file.truncate(sum(map(len, lines[: len(records)])))
        if not has_header:
            self._append({"search_journal": VERSION, **header})

    def _check_header(self, path: Path, found: Any, header: dict[str, Any]) -> None:
        """The journal must be of this program's version and of this very search."""
        if not isinstance(found, dict) or "search_journal" not in found:
            raise _damaged(path, 1)
        if (version := found.pop("search_journal")) != VERSION:
            raise ArtifactError(
                f"{path} has version {version}, this program reads {VERSION}; use another run.name, or remove "
                f"{path.parent} to search again"
            )
        for key in sorted(found.keys() | header.keys()):
            if found.get(key) != header.get(key):
                raise ArtifactError(
                    f"{path} belongs to another search: {key} was {found.get(key)}, now it is {header.get(key)}; "
                    f"use another run.name, or remove {path.parent} to search again"
                )

    def _take(self, path: Path, record: Any, number: int) -> None:
        """Add one line of a file to the known losses."""
        try:
            losses = [math.inf if loss is None else float(loss) for loss in record["losses"]]
            self._remember(str(record["factors"]), int(record["batch"]), losses)
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, number) from None

    def _remember(self, key: str, batch: int, losses: list[float]) -> None:
        """Keep the losses of a batch; those known first stay."""
        known = self._losses.setdefault(key, {})
        if batch not in known:
            known[batch] = losses
            self.num_losses += len(losses)

    def _append(self, record: dict[str, Any]) -> None:
        """One line, handed to the operating system at once."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()


def _whole_records(path: Path, lines: list[bytes]) -> list[Any]:
    """The parsed lines, without a last one that a crash has torn.

    Raises:
        ArtifactError: a line before the last one cannot be read.
    """
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no line end")
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise _damaged(path, number) from None
    return records


def _damaged(path: Path, number: int) -> ArtifactError:
    """The error for a line that cannot be right."""
    return ArtifactError(
        f"{path} is damaged at line {number}; remove that line and all after it to keep the losses before"
    )
