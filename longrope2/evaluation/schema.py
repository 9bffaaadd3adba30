"""What stands in the result files of an evaluation, and the one way to write and to read them.

``evaluations.json`` (``EvaluationSummary``) holds what is measured without generating, and
``suite.json`` (``SuiteSummary``) what was answered. Lengths are tokens, shares and scores run from
0 to 1, intervals are those of 95 %, perplexities are exp(nats per token). Fields stand in the file
in the order given here; one with a default is left out where it has nothing to say.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from longrope2.corpora.run_corpus import HeldoutText
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import MANIFEST_NAME, write_text
from longrope2.files.unchanged import require_as_listed

Interval = tuple[float, float]


@dataclass(frozen=True)
class MeasuredSubject:
    """A model of ``evaluations.json``."""

    name: str
    trained: bool
    """Whether its weights were trained here; else they are the base model's."""
    method: str
    """What its factors come from, e.g. ``yarn`` or ``longrope2``."""
    critical_index: int | None
    """Cosine index from which the search chose factors freely; null for closed forms."""
    factors: tuple[float, ...]
    """Rescale factors of the long window by cosine index, dimensionless."""
    long_attention_scale: float
    """Multiplier on cos and sin in the long window, dimensionless."""
    source: dict[str, str | dict[str, str]]
    """Path and SHA-256 of the checkpoint or factors file, or a method."""

    @property
    def checkpoint(self) -> str:
        """Path of its checkpoint; empty where it has none."""
        found = self.source.get("checkpoint")
        return found.get("path", "") if isinstance(found, dict) else ""


@dataclass(frozen=True)
class DepthRow:
    """Needles of one subject at one length and depth."""

    depth: float
    """Where the needle stands: 0 is the start of the document, 1 its end."""
    num_samples: int
    num_correct: int
    """Samples whose value greedy decoding would give exactly."""
    accuracy: float
    accuracy_interval: Interval
    """Wilson's; resampled by haystack where needles share one."""
    perplexity: float
    """Over all tokens of the values."""


@dataclass(frozen=True)
class NeedleRow:
    """Needles of one subject at one length, its numbers as in ``DepthRow`` but over all depths."""

    subject: str
    length: int
    window: str
    """RoPE window that the samples are read in: ``short`` or ``long``."""
    num_samples: int
    num_correct: int
    accuracy: float
    accuracy_interval: Interval
    perplexity: float
    depths: tuple[DepthRow, ...]
    """By depth, ascending."""


@dataclass(frozen=True)
class TextRow:
    """Held-out text of one subject in windows of one length; ``num_tokens`` were scored."""

    subject: str
    length: int
    """Tokens of a window, its closing EOS counted in; in ``retention`` at most."""
    num_windows: int
    num_tokens: int
    perplexity: float


@dataclass(frozen=True)
class ContextRow(TextRow):
    """The same scored tokens after more and more context."""

    window: str
    """RoPE window that the text is read in: ``short`` or ``long``."""


@dataclass(frozen=True)
class RetentionRow(TextRow):
    """Text inside the original window."""

    ratio: float
    """Perplexity over the reference's."""


@dataclass(frozen=True)
class EvaluationSummary:
    """Content of ``evaluations.json``."""

    file_name: ClassVar[str] = "evaluations.json"
    indent: ClassVar[int] = 2
    original_len: int
    target_len: int
    reference: str
    """Name of the subject that ``retention`` is relative to."""
    subjects: tuple[MeasuredSubject, ...]
    """In the order of the tables."""
    needle: tuple[NeedleRow, ...]
    perplexity: tuple[ContextRow, ...]
    retention: tuple[RetentionRow, ...]
    text: HeldoutText | None = None
    """Which text needles and windows are of; null in files of earlier versions."""


@dataclass(frozen=True)
class SuiteSubject:
    """A model of ``suite.json``; fields as in ``MeasuredSubject``."""

    name: str
    trained: bool
    method: str
    source: dict[str, str | dict[str, str]]


@dataclass(frozen=True)
class CalibrationRow:
    """A rule of the gate and what came of it; scores in percent."""

    score: str
    """The rule's name of a score, e.g. ``lm_eval/mmlu`` or ``ruler/average/4096``."""
    low: float
    high: float
    found: float | None
    """The base model's score; null where there is none."""
    state: str
    """``passed``, ``broken``, ``not measured`` (started, unfinished), ``not in this suite``, or
    ``not tried`` where only a part of the samples was asked."""


@dataclass(frozen=True)
class Calibration:
    """The gate on the base model."""

    passed: bool
    """Whether extended models may be reported."""
    rules: tuple[CalibrationRow, ...]


@dataclass(frozen=True)
class SideScore:
    """Score of the answers of a cell that were made on one RoPE side."""

    num_samples: int
    score: float
    interval: Interval


@dataclass(frozen=True)
class Cell:
    """One subject on one task at one length: its score, or why there is none."""

    subject: str
    suite: str
    """``ruler``, ``needle_map``, ``longbench``, ``infinitebench``, ``loft`` or ``lm_eval``."""
    task: str
    length: int
    """Tokens that prompt and answer may take together; 0 in ``lm_eval``, whose tasks have none."""
    num_samples: int
    score: float | None
    """Mean over the samples; null where it was not measured, or is withheld."""
    interval: Interval | None = None
    first_100: float | None = None
    """Score of the first 100 samples, the paper's sample count; not in ``lm_eval``."""
    sides: dict[str, SideScore] | None = None
    """By RoPE side of the answer: ``short``, ``both`` (it crossed L0) or ``long``."""
    scores: tuple[float, ...] = ()
    samples: tuple[str, ...] = ()
    """First 16 hexadecimal digits of every sample's hash, for paired tests across runs."""
    facts: tuple[dict[str, Any], ...] = ()
    """What is known about every sample; not in ``lm_eval``."""
    needle_survived: float | None = None
    """Share of prompts that kept their needle when they were cut to length, where one is known."""
    num_missing: int | None = None
    """Samples without an answer; only beside a null score."""
    reason: str = ""
    """Why there is no score; only beside a null one."""

    def __post_init__(self) -> None:
        if self.score is not None and None in (self.interval, self.sides, self.scores or None):
            raise ValueError("score needs interval, sides and scores beside it")


@dataclass(frozen=True)
class Average:
    """Plain mean of one subject over the tasks of a suite at one length."""

    task: ClassVar[str] = "average"
    """What it counts as among tasks."""
    subject: str
    suite: str
    length: int
    num_tasks: int
    score: float | None
    """Null while a task has none."""
    first_100: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Protocol:
    """How a part of a suite was asked; scores are comparable where nothing differs."""

    part: str
    """``ruler``, ``needle_map``, ``loft``, ``long`` (InfiniteBench and LongBench) or ``short``."""
    facts: tuple[str, ...]
    """Wording, template, tasks, samples, data and their revisions, lengths, tokenizer."""
    differs: tuple[str, ...] = ()
    """What is not as the paper asks."""


@dataclass(frozen=True)
class EffectiveLength:
    """How far RULER's average of a subject stays above its threshold, from the shortest length."""

    subject: str
    surely: int | None = None
    """Largest length up to which the lower end of the average's interval does; null where none
    does."""
    perhaps: int | None = None
    """The same of the upper end."""
    reason: str = ""
    """Why nothing can be said."""


@dataclass(frozen=True)
class KeptRow:
    """Scores of one subject inside the original window, over the base model's."""

    subject: str
    suite: str
    num_tasks: int
    """Scores (task and length) that both have."""
    ratio: float
    """Mean score over the base model's mean score."""


@dataclass(frozen=True)
class PairedRow:
    """Paired test of two subjects, first minus second; the numbers are those of ``PairedTest``."""

    suite: str
    task: str
    length: int
    first: str
    second: str
    num_samples: int
    difference: float
    interval: Interval
    p_value: float
    method: str
    num_better: int
    num_worse: int


@dataclass(frozen=True)
class SuiteSummary:
    """Content of ``suite.json``."""

    file_name: ClassVar[str] = "suite.json"
    indent: ClassVar[int] = 1
    model: str
    """Its ``model.name``, by which the paper's values are found."""
    original_len: int
    target_len: int
    reference: str
    """Name of the base model among the subjects."""
    subjects: tuple[SuiteSubject, ...]
    calibration: Calibration
    cells: tuple[Cell, ...]
    averages: tuple[Average, ...]
    """Of RULER alone."""
    retention: tuple[KeptRow, ...]
    paired: tuple[PairedRow, ...]
    effective_lengths: tuple[EffectiveLength, ...] = ()
    """Of every subject that RULER was asked of; none in files of earlier versions."""
    protocols: tuple[Protocol, ...] = ()
    """Of every part; files of earlier versions have none, and so no verdicts."""
    text: HeldoutText | None = None
    """Which text needles stand in; null where none was asked for, and in files of earlier
    versions."""


Summary = TypeVar("Summary", EvaluationSummary, SuiteSummary)
_LEFT_OUT_WHERE_EMPTY = {
    field.name for kind in (Cell, Average) for field in fields(kind) if field.default is not MISSING
}
_EMPTY = (None, "", ())


def write_summary(folder: Path, summary: EvaluationSummary | SuiteSummary) -> None:
    """Write a summary under its own name; the product is unfinished from then on."""

    def present(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in pairs if v not in _EMPTY or k not in _LEFT_OUT_WHERE_EMPTY}

    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    plain = asdict(summary, dict_factory=present)
    write_text(folder / summary.file_name, json.dumps(plain, indent=summary.indent) + "\n")


def read_summary(kind: type[Summary], folder: Path) -> Summary | None:
    """The summary in a folder, None when there is none.

    Raises:
        ArtifactError: it is not as it was written, no JSON, or a field is missing or wrong; names
            the file and the field.
    """
    path = folder / kind.file_name
    require_as_listed(path, "bring it back, or run its stage again")
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        fault = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise ArtifactError(f"{path} is damaged ({fault}); run its stage again") from None
