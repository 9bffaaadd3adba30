"""Finished measurements and answers on disk, one JSON line each: nothing is done twice.

A line is found by a fingerprint of everything its values depend on (weights, RoPE tables of the
windows used, data), not by the subject's name: changed weights or samples are measured anew, and
subjects that are the same model for a measurement (below L0, say) share it.

Every shard appends its answers to a file of its own and reads those of all when it starts, so
shards never wait for each other and a later run may have more or fewer of them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.append_log import AppendLog, read_log

RESULTS_FILE = "results.jsonl"
_WAY_OUT = "wait for it, or give each process its own evaluation.shard"
IN_USE = f"is being written by another process; {_WAY_OUT}"


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
        self._log = AppendLog(path, durable=True, sealed=True)
        found = _parsed(
            path, Measurement, "a measurement", "remove the file to measure everything anew"
        )
        self._values = {measurement.fingerprint: measurement.values for measurement in found}
        self._lines = {(measurement.subject, measurement.fingerprint) for measurement in found}

    def find(self, fingerprint: str) -> dict[str, Any] | None:
        """Values measured before for the same fingerprint."""
        return self._values.get(fingerprint)

    def measured(
        self, subject: str, suite: str, length: int, fingerprint: str, measure: Callable[[], Any]
    ) -> Measurement:
        """The measurement with the values known for a fingerprint, or made now and kept."""
        values = self.find(fingerprint)
        if values is None:
            values = measure()
        found = Measurement(subject, suite, length, fingerprint=fingerprint, values=values)
        self.append(found)
        return found

    def append(self, measurement: Measurement) -> None:
        """Add one line and force it to disk; a line that is there already is not repeated."""
        line = measurement.subject, measurement.fingerprint
        if line not in self._lines:
            self._log.append(asdict(measurement))
            self._values[measurement.fingerprint] = measurement.values
            self._lines.add(line)


def _parsed(path: Path, kind: Callable[..., Any], what: str, way_out: str) -> list[Any]:
    """The lines of a log, each as a ``kind``, which ``what`` names."""
    found = []
    for number, fields in enumerate(read_log(path), start=1):
        try:
            found.append(kind(**fields))
        except TypeError as error:
            fault = f"{path}, line {number} is not {what} ({error})"
            raise ArtifactError(f"{fault}; {way_out}") from None
    return found


@dataclass(frozen=True)
class Shard:
    """Which requests one process answers: those whose number is ``index`` modulo ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From ``i/n`` with i from 1 to n.

        Raises:
            ConfigError: anything else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError([f"evaluation.shard={text} must be i/n with i from 1 to n, e.g. 3/8"])
        return cls(int(found[1]) - 1, int(found[2]))

    def within(self, rank: int, world_size: int) -> "Shard":
        """This shard split again among the ranks of one launch."""
        return Shard(self.index * world_size + rank, self.count * world_size)

    @property
    def file_name(self) -> str:
        """File that the shard appends to."""
        part = "" if self.count == 1 else f"-{self.index + 1}-of-{self.count}"
        return f"answers{part}.jsonl"


@dataclass(frozen=True)
class Answer:
    """What one model answered to one sample."""

    key: str
    """Fingerprint of weights, RoPE tables, dtype and sample."""
    subject: str
    """Subject it was computed for; others may share it."""
    suite: str
    task: str
    length: int
    sample_sha256: str
    text: str
    token_ids: tuple[int, ...]
    """New tokens, the end-of-text token included where there was one."""
    num_short: int
    """New tokens predicted by a forward pass with the original RoPE."""
    num_long: int
    """New tokens predicted with the rescaled RoPE."""

    def __post_init__(self) -> None:
        """Ids read from JSON are a list."""
        object.__setattr__(self, "token_ids", tuple(self.token_ids))

    @property
    def side(self) -> str:
        """RoPE side or sides of the answer: ``short``, ``long``, or ``both`` when it crossed L0."""
        if self.num_short and self.num_long:
            return "both"
        return "long" if self.num_long else "short"


class AnswersLog:
    """Answers of all shards in memory, and this shard's file to append to; use it in ``with``."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        """Open the shard's file, mend its end, read every file.

        Raises:
            ArtifactError: another process has the shard's file open, or a file is damaged.
        """
        self.folder = folder
        self._log = AppendLog(folder / shard.file_name, durable=True, sealed=True, in_use=IN_USE)
        try:
            self._answers = read_answers(folder)
        except BaseException:
            self._log.close()
            raise

    def find(self, key: str) -> Answer | None:
        """The answer known under a fingerprint."""
        return self._answers.get(key)

    def append(self, answers: Iterable[Answer]) -> None:
        """Add lines and force them to disk."""
        added = list(answers)
        self._log.append(*map(asdict, added))
        self._answers.update({answer.key: answer for answer in added})

    def reread(self) -> None:
        """Take in what other shards have written meanwhile."""
        self._answers.update(read_answers(self.folder))

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._log.close()

    def __enter__(self) -> "AnswersLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_answers(folder: Path) -> dict[str, Answer]:
    """Fingerprint -> answer over the files of all shards.

    Raises:
        ArtifactError: a whole line is no answer; names file and line.
    """
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        lines = _parsed(path, Answer, "an answer", "remove the line to have it answered anew")
        answers |= {answer.key: answer for answer in lines}
    return answers
