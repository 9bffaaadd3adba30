"""The journal of a search: every loss that was computed, so that a killed search repeats nothing.

JSON lines. The first names what the losses depend on; each further one holds the losses of one
batch of samples under one set of factors, flushed as soon as they are known; ``null`` is one that
was not finite. Every worker appends to a file of its own (``journal.jsonl``, ``journal.1.jsonl``,
...) and reads them all when it starts: a later run may have more or fewer workers. The losses on
fresh samples are in files of their own, ``fresh.jsonl`` and so on.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope2.claim import remake, require_same
from longrope2.errors import ArtifactError
from longrope2.files.append_log import AppendLog, damaged_line, read_log
from longrope2.rope.factors import RescaleFactors

_VERSION = 2
_SEARCH = "journal"
FRESH = "fresh"
_IN_USE = "is in use by another search; wait for it, or end it"


def factors_key(factors: RescaleFactors) -> str:
    """Hash of everything in the factors that a long-window loss depends on."""
    content = [factors.factors, factors.long_attention_scale]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


class Journal:
    """Losses by factors and batch, in memory and on disk; use it in ``with``.

    Attributes:
        num_losses_by_batch: Sample losses known: those found in the files and those added since.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        worker: int = 0,
        writes: bool = True,
        *,
        name: str = _SEARCH,
    ) -> None:
        """Open or start the journal of a worker, and read those of all.

        Args:
            folder: Where the journals are; made where missing.
            header: What the losses depend on; plain JSON values.
            worker: Number of this worker; 0 has ``journal.jsonl``.
            writes: False for the processes of a worker that leave writing to another one.
            name: First part of the files' names.

        Raises:
            ArtifactError: a journal is in use, damaged, or of another search.
        """
        self._losses: dict[str, dict[int, list[float]]] = {}
        self.num_losses_by_batch: Counter[int] = Counter()
        self._name = name
        path = folder / (f"{name}.{worker}.jsonl" if worker else f"{name}.jsonl")
        self._log = AppendLog(path, sealed=True, in_use=_IN_USE) if writes else None
        try:
            self._read_all(folder, json.loads(json.dumps(dict(header))))
            if self._log is not None and not read_log(path):
                self._log.append({"search_journal": _VERSION, **header})
        except BaseException:
            self.__exit__()
            raise

    @property
    def num_losses(self) -> int:
        """Sample losses known."""
        return self.num_losses_by_batch.total()

    def losses(self, factors: RescaleFactors) -> dict[int, list[float]]:
        """Known losses under these factors, by batch; infinite where the loss was not finite."""
        return dict(self._losses.get(factors_key(factors), {}))

    def add(self, factors: RescaleFactors, batch: int, losses: list[float]) -> None:
        """Record the losses of one batch of samples under these factors."""
        key = factors_key(factors)
        if self._log is not None:
            finite = [loss if math.isfinite(loss) else None for loss in losses]
            self._log.append({"factors": key, "batch": batch, "losses": finite})
        self._remember(key, batch, losses)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._log is not None:
            self._log.close()

    def _read_all(self, folder: Path, header: dict[str, Any]) -> None:
        for path in sorted(folder.glob(f"{self._name}*.jsonl")):
            records = read_log(path)
            if records:
                self._check_header(path, records[0], header)
            for number, record in enumerate(records[1:], start=2):
                self._take(path, record, number)

    def _check_header(self, path: Path, found: Any, header: dict[str, Any]) -> None:
        if not isinstance(found, dict) or "search_journal" not in found:
            raise damaged_line(path, 1)
        if (version := found.pop("search_journal")) != _VERSION:
            fault = f"{path} has version {version}, this program reads {_VERSION}"
            raise ArtifactError(f"{fault}; {remake(path.parent)}")
        require_same(f"{path} belongs to another search", found, header, path.parent)

    def _take(self, path: Path, record: Any, number: int) -> None:
        """Add one line of a file to the known losses."""
        try:
            losses = [math.inf if loss is None else float(loss) for loss in record["losses"]]
            self._remember(str(record["factors"]), int(record["batch"]), losses)
        except (KeyError, TypeError, ValueError):
            raise damaged_line(path, number) from None

    def _remember(self, key: str, batch: int, losses: list[float]) -> None:
        """Keep the losses of a batch; those known first stay."""
        known = self._losses.setdefault(key, {})
        if batch not in known:
            known[batch] = losses
            self.num_losses_by_batch[batch] += len(losses)
