"""The part of ``launch.evaluate`` that measures without generating: needles, text by length, short-window retention."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.corpora import CorpusConfig, heldout_documents
from data_prep.needles import build_needle_set
from data_prep.tokenization import DocumentTokenizer
from longrope2.evaluation import (
    RESULTS_FILE,
    EvaluateRoot,
    Measurement,
    ResultsLog,
    Subject,
    Task,
    context_windows,
    evaluated_lengths,
    measure_all,
    metric_values,
    needle_task,
    perplexity_task,
    retention_task,
    short_windows,
)
from longrope2.model import load_tokenizer
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking import MetricsLog


@dataclass
class EvaluateCommand(EvaluateRoot):
    """Configuration of the command: the evaluation and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def build_tasks(config: EvaluateCommand, base_folder: Path) -> tuple[list[Task], list[NeedleSet]]:
    """Tasks on needles and text windows, the same for every subject, and the needle samples themselves.

    Raises:
        DataError: the held-out text is too little for what is asked.
    """
    evaluation, original_len = config.evaluation, config.model.original_len
    books, tokenizer = heldout_documents(config.corpus), load_tokenizer(base_folder)
    documents = DocumentTokenizer(tokenizer).encode_documents([book.text for book in books])
    lengths, batch_tokens = evaluated_lengths(config), evaluation.batch_tokens
    needle, text = evaluation.needle, evaluation.perplexity
    num_samples = len(needle.depths) * needle.samples_per_depth
    needle_sets = [
        build_needle_set(
            tokenizer, books, length=length, depths=needle.depths, num_samples=num_samples, seed=needle.seed
        )
        for length in lengths
    ]
    windows = context_windows(
        documents, lengths, num_windows=text.num_windows, num_scored=text.scored_tokens, seed=config.seed
    )
    short = short_windows(documents, original_len, num_windows=evaluation.retention.num_windows, seed=config.seed)
    tasks = [needle_task(needle_set, original_len, batch_tokens) for needle_set in needle_sets]
    tasks += [perplexity_task(windows[length], text.scored_tokens, original_len, batch_tokens) for length in lengths]
    return [*tasks, retention_task(short, original_len, batch_tokens)], needle_sets


def measure(
    config: EvaluateCommand, subjects: list[Subject], tasks: list[Task], folder: Path, tracking: MetricsLog
) -> list[Measurement]:
    """All measurements, with a progress bar weighted by tokens and with metrics as they come."""
    columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    measurements = []
    results = ResultsLog(folder / RESULTS_FILE)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(subjects) * len(tasks))
        for measurement in measure_all(subjects, tasks, results):
            tracking.log(metric_values(measurement))
            measurements.append(measurement)
            done = f"{measurement.subject} {measurement.suite} {measurement.length}"
            progress.update(bar, advance=1, description=done)
    return measurements
