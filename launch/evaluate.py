"""``python -m launch.evaluate``: compare models by needle retrieval, perplexity by length, and short-window retention.

Every finished measurement is a line of ``4_evaluations/results.jsonl``, so the same command resumes after a kill and a
second run measures only what is new. Needles and text come from the held-out split of the corpus.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.corpora import CorpusConfig, build_corpus, heldout_documents
from data_prep.needles import build_needle_set
from data_prep.tokenization import DocumentTokenizer
from longrope2.artifacts import (
    MANIFEST_NAME,
    Manifest,
    model_identity,
    product_folder,
    read_manifest,
    write_manifest,
    write_text,
)
from longrope2.command import run_command
from longrope2.config import claim_folder, compose, to_plain
from longrope2.errors import ConfigError
from longrope2.evaluation import (
    RESULTS_FILE,
    EvaluateRoot,
    Measurement,
    ResultsLog,
    Subject,
    Task,
    check,
    comparison_table,
    context_windows,
    evaluated_lengths,
    measure_all,
    metric_values,
    needle_task,
    perplexity_task,
    resolve_subjects,
    retention_task,
    short_windows,
    summarize,
)
from longrope2.model import load_tokenizer
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking import MetricsLog

EVALUATIONS_FILE = "evaluations.json"
# Results are told apart by what they were measured on, so these may change from run to run.
CHANGEABLE = ("dry_run", "tracking", "evaluation", "corpus", "seed")


@dataclass
class EvaluateCommand(EvaluateRoot):
    """Configuration of the command: the evaluation and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def main() -> None:
    """Compose, check, plan, measure, summarise."""
    config = compose(EvaluateCommand, "evaluate", sys.argv[1:])
    base_folder = check(config)
    check_seed(config)
    subjects = resolve_subjects(config, base_folder)
    print(describe(config, subjects))
    if config.dry_run:
        return
    folder = product_folder(config.run.folder, "evaluations")
    tasks, needle_sets = build_tasks(config, base_folder)
    claim_folder(folder, config, changeable=CHANGEABLE)
    for needle_set in needle_sets:
        needle_set.save(folder / "needles" / f"{needle_set.length}.arrow")
    measurements = _measure(config, subjects, tasks, folder)
    summary = summarize(subjects, measurements, config.evaluation.reference)
    write_text(folder / EVALUATIONS_FILE, json.dumps(summary, indent=2) + "\n")
    _write_manifest(config, base_folder, subjects, measurements, folder)
    Console().print(comparison_table(summary))
    print(f"evaluations in {folder}")


def check_seed(config: EvaluateCommand) -> None:
    """Refuse to evaluate on the keys and values that the run's factors were fitted to.

    Raises:
        ConfigError: the needle seed is the search's.
    """
    factors_folder = product_folder(config.run.folder, "factors")
    if not (factors_folder / MANIFEST_NAME).is_file():
        return
    if read_manifest(factors_folder, "factors").seeds.get("seed") == config.evaluation.needle.seed:
        raise ConfigError([
            f"evaluation.needle.seed={config.evaluation.needle.seed} is the seed of the needles that the factors in "
            f"{factors_folder} were searched on; give another one"
        ])  # fmt: skip


def describe(config: EvaluateCommand, subjects: list[Subject]) -> str:
    """The plan in a few lines."""
    evaluation = config.evaluation
    num_samples = len(evaluation.needle.depths) * evaluation.needle.samples_per_depth
    lines = [
        f"model      {config.model.name}, window {config.model.original_len} -> {config.target_len}",
        f"lengths    {', '.join(map(str, evaluated_lengths(config)))}",
        f"needles    {num_samples} samples per length at depths {', '.join(map(str, evaluation.needle.depths))}",
        f"text       {evaluation.perplexity.num_windows} windows per length, {evaluation.retention.num_windows} short "
        f"ones; held out of corpus {config.corpus.name}",
    ]
    lines += [f"subject    {s.name}: {s.factors.method}{', trained' if s.trained else ''}" for s in subjects]
    return "\n".join(lines)


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


def _measure(config: EvaluateCommand, subjects: list[Subject], tasks: list[Task], folder: Path) -> list[Measurement]:
    """All measurements, with a progress bar weighted by tokens and with metrics as they come."""
    columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    measurements = []
    results = ResultsLog(folder / RESULTS_FILE)
    tracking = MetricsLog(folder, config.tracking, config.run.name, "evaluate", to_plain(config))
    with tracking, Progress(*columns) as progress:
        bar = progress.add_task("", total=len(subjects) * len(tasks))
        for measurement in measure_all(subjects, tasks, results):
            tracking.log(metric_values(measurement))
            measurements.append(measurement)
            done = f"{measurement.subject} {measurement.suite} {measurement.length}"
            progress.update(bar, advance=1, description=done)
    return measurements


def _write_manifest(
    config: EvaluateCommand, base_folder: Path, subjects: list[Subject], measurements: list[Measurement], folder: Path
) -> None:
    """Mark the evaluation as finished."""
    inputs = {
        "model": model_identity(base_folder),
        "corpus": build_corpus(config.corpus).describe(),
        "subjects": {subject.name: subject.source for subject in subjects},
    }
    seeds = {"seed": config.seed, "needle": config.evaluation.needle.seed}
    counts = {"num_subjects": len(subjects), "num_measurements": len(measurements)}
    write_manifest(folder, Manifest("evaluations", inputs=inputs, config=to_plain(config), seeds=seeds, counts=counts))


if __name__ == "__main__":
    run_command(main)
