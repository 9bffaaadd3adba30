"""Needle samples on disk: the tokens of each sample and where its value starts.

Two files of one name: ``.arrow`` holds the samples, ``.json`` says to readers what they are, and
the hash of the other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longrope2.errors import ArtifactError, DamagedError
from longrope2.files.artifacts import atomic_path, sha256_of_bytes, write_text
from longrope2.files.checked import read_object

_SEAL = "arrow_sha256"
SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int64())),
        ("value_start", pa.int64()),
        ("key", pa.string()),
        ("value", pa.string()),
        ("depth", pa.float64()),
        ("record", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """One sample: prompt and value as ids.

    ``tokens`` [length], int64, have BOS first and EOS last, just before it the value: the digits to
    retrieve for ``key``. ``depth`` is the needle's place, 0 (start) to 1 (end) of the haystack;
    ``record`` its wording, positions, hash and books, as plain JSON values.
    """

    tokens: np.ndarray
    value_start: int
    key: str
    value: str
    depth: float
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def through_value(self) -> np.ndarray:
        """Ids up to the end of the value, shape [length - 1]: all that is read and scored."""
        return self.tokens[:-1]


@dataclass(frozen=True, eq=False)
class NeedleSet:
    """Samples of ``length`` tokens each; ``needles_per_haystack`` in a row share a haystack."""

    samples: list[NeedleSample]
    length: int
    needles_per_haystack: int = 1

    def __post_init__(self) -> None:
        size = self.needles_per_haystack
        if size < 1 or len(self.samples) % size:
            fault = f"{len(self.samples)} needle samples are no whole number of haystacks"
            raise ArtifactError(f"{fault} of {size}")
        for number, sample in enumerate(self.samples):
            found = len(sample.tokens)
            if found != self.length:
                raise ArtifactError(f"needle sample {number} has {found} tokens, not {self.length}")
            if not 0 < sample.value_start < self.length - 1:
                fault = f"needle sample {number} has its value at {sample.value_start} of"
                raise ArtifactError(f"{fault} {self.length}")

    @property
    def haystacks(self) -> list[list[NeedleSample]]:
        """The samples of each haystack, which begin alike; one each unless they share it."""
        size = self.needles_per_haystack
        return [self.samples[first : first + size] for first in range(0, len(self.samples), size)]

    def save(self, path: Path) -> None:
        """Write one Arrow file, atomically, and a record for readers beside it (``.json``)."""
        samples = self._as_arrow()
        record = {**self.describe(), _SEAL: sha256_of_bytes(samples)}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        write_text(path.with_suffix(".json"), text + "\n")
        with atomic_path(path) as temporary:
            temporary.write_bytes(samples)

    def _as_arrow(self) -> bytes:
        """Content of the Arrow file."""
        rows = [
            {**vars(sample), "record": json.dumps(sample.record, sort_keys=True)}
            for sample in self.samples
        ]
        facts = {
            "needle_length": str(self.length),
            "needles_per_haystack": str(self.needles_per_haystack),
        }
        schema, sink = SCHEMA.with_metadata(facts), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema))
        return sink.getvalue().to_pybytes()

    def describe(self) -> dict[str, Any]:
        """What the samples are, without their tokens; plain JSON values."""
        samples = [
            {
                "number": number,
                "key": sample.key,
                "value": sample.value,
                "depth": sample.depth,
                "value_start": sample.value_start,
                "tokens_sha256": sha256_of_bytes(sample.tokens.astype("<i8").tobytes()),
                **sample.record,
            }
            for number, sample in enumerate(self.samples)
        ]
        shared = {"needles_per_haystack": self.needles_per_haystack}
        return {"length": self.length, "num_samples": len(samples), **shared, "samples": samples}

    @classmethod
    def load(cls, path: Path) -> "NeedleSet":
        """Read a set that ``save`` wrote.

        Raises:
            ArtifactError: the file is missing, no needle set, or not as it was written.
        """
        try:
            samples = path.read_bytes()
            _refuse_changed(path, samples)
            table = pa.ipc.open_stream(samples).read_all()
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is not a needle set: {error}") from None
        if not table.schema.equals(SCHEMA) or b"needle_length" not in (table.schema.metadata or {}):
            fault = f"{path} is not a needle set: its columns are {', '.join(table.schema.names)}"
            raise ArtifactError(fault)
        samples = []
        for row in table.to_pylist():
            row |= {"tokens": np.asarray(row["tokens"]), "record": json.loads(row["record"])}
            samples.append(NeedleSample(**row))
        facts = table.schema.metadata
        # Files from before needles could share a haystack do not say how many do.
        per_haystack = int(facts.get(b"needles_per_haystack", b"1"))
        return cls(samples, int(facts[b"needle_length"]), per_haystack)


def _refuse_changed(path: Path, samples: bytes) -> None:
    """Compare the Arrow file's bytes with the hash beside them.

    Raises:
        DamagedError: they differ, or the record beside them cannot be read.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():  # as of sets of earlier versions
        return
    way_out = f"remove {path.name} and {beside.name}: the same samples are drawn again"
    written = read_object(beside, "the record of a needle set", way_out).get(_SEAL)
    if written is not None and written != sha256_of_bytes(samples):
        fault = f"{path} is not as it was written ({beside.name} beside it has another {_SEAL})"
        raise DamagedError(f"{fault}; {way_out}")
