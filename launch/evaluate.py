"""``python -m launch.evaluate``: compare models by what ``suite=`` names; by default needles,
perplexity and retention.

Every finished measurement is a line of ``4_evaluations/results.jsonl`` and every answer a line of
``answers/``, so the same command resumes after a kill and a second run measures only what is new.
Needles and text come from the held-out split of the corpus. Questions are spread over torchrun's
ranks, and over Slurm arrays with ``evaluation.shard=i/n``; the shard that ends last sums up.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from longrope2.command import run_command
from longrope2.config import claim_folder, compose, to_plain
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.errors import ConfigError
from longrope2.evaluation.config import check, evaluated_lengths, suite_lengths, use_checkpoint
from longrope2.evaluation.results import Measurement
from longrope2.evaluation.run import EvaluateCommand, build_tasks, measure, own_shard, run_suite
from longrope2.evaluation.subjects import Subject, resolve_subjects
from longrope2.evaluation.summary import comparison_table, summarize
from longrope2.files.artifacts import (
    MANIFEST_NAME,
    Manifest,
    product_folder,
    read_manifest,
    write_manifest,
    write_text,
)
from longrope2.model.folder import model_identity
from longrope2.model.loading import load_tokenizer
from longrope2.report.paper import paper_text
from longrope2.tracking.metrics import MetricsLog

EVALUATIONS_FILE = "evaluations.json"
# Results are told apart by what they were measured on, so these may change from run to run.
CHANGEABLE = (
    "dry_run",
    "tracking",
    "evaluation",
    "corpus",
    "seed",
    "suite",
    "calibration",
    "checkpoint",
)


def main() -> None:
    """Compose, check, plan, measure, ask, summarise."""
    config = compose(EvaluateCommand, "evaluate", sys.argv[1:])
    use_checkpoint(config)
    base_folder = check(config)
    check_seed(config)
    shard = own_shard(config)
    subjects = resolve_subjects(config, base_folder)
    if shard.index == 0:
        print(describe(config, subjects))
    if config.dry_run:
        return
    folder = product_folder(config.run.folder, "evaluations")
    asks = config.suite.generates or bool(config.suite.short_tasks.tasks)
    measures = config.suite.measures and shard.index == 0
    tasks, needle_sets = build_tasks(config, base_folder) if measures else ([], [])
    # Later shards leave the folder's configuration and the metrics to the first.
    own_folder = folder if shard.index == 0 else folder / f"shard_{shard.index + 1}"
    claim_folder(own_folder, config, changeable=CHANGEABLE)
    for needle_set in needle_sets:
        needle_set.save(folder / "needles" / f"{needle_set.length}.arrow")
    tracking = MetricsLog(
        own_folder, config.tracking, config.run.name, "evaluate", to_plain(config)
    )
    with tracking:
        measurements = measure(config, subjects, tasks, folder, tracking) if measures else []
        if measures:
            _summarize(config, subjects, measurements, folder)
        if asks:
            texts = [document.text for document in heldout_documents(config.corpus)]
            tokenizer = load_tokenizer(base_folder)
            found = run_suite(config, subjects, tokenizer, texts, folder, tracking)
            if found is None:
                return
            Console(width=160).print(paper_text(found), markup=False, highlight=False)
    if asks or measures:
        _write_manifest(config, base_folder, subjects, measurements, folder)
        print(f"evaluations in {folder}")


def _summarize(
    config: EvaluateCommand, subjects: list[Subject], measurements: list[Measurement], folder: Path
) -> None:
    """Write and show what was measured without generating."""
    summary = summarize(subjects, measurements, config.evaluation.reference)
    write_text(folder / EVALUATIONS_FILE, json.dumps(summary, indent=2) + "\n")
    Console().print(comparison_table(summary))


def check_seed(config: EvaluateCommand) -> None:
    """Refuse to evaluate on the keys and values that the run's factors were fitted to.

    Raises:
        ConfigError: the needle seed is the search's.
    """
    factors_folder = product_folder(config.run.folder, "factors")
    if not (factors_folder / MANIFEST_NAME).is_file():
        return
    if read_manifest(factors_folder, "factors").seeds.get("seed") == config.evaluation.needle.seed:
        raise ConfigError(
            [
                f"evaluation.needle.seed={config.evaluation.needle.seed} is the seed of the needles that the factors in "
                f"{factors_folder} were searched on; give another one"
            ]
        )


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
    suite = config.suite
    if not suite.measures:
        lines = lines[:1]
    if suite.ruler is not None:
        lines.append(
            f"ruler      {len(suite.ruler.tasks)} tasks x {suite.ruler.num_samples} samples, "
            f"{suite.ruler.mode.value}, at {', '.join(map(str, suite_lengths(config)))}"
        )
    if suite.needle_map is not None:
        lines.append(
            f"needle map {len(suite.needle_map.depths)} depths x {suite.needle_map.repeats}, "
            f"{suite.needle_map.haystack.value}, at {', '.join(map(str, suite_lengths(config)))}"
        )
    long_tasks = suite.long_tasks
    names = [*long_tasks.longbench.tasks, *long_tasks.infinitebench.tasks, *long_tasks.loft.tasks]
    lines += [f"long tasks {', '.join(names)}"] if names else []
    short_names = [task.name for task in suite.short_tasks.tasks]
    lines += [f"short      {', '.join(short_names)}"] if short_names else []
    lines += [
        f"subject    {s.name}: {s.factors.method}{', trained' if s.trained else ''}"
        for s in subjects
    ]
    return "\n".join(lines)


def _write_manifest(
    config: EvaluateCommand,
    base_folder: Path,
    subjects: list[Subject],
    measurements: list[Measurement],
    folder: Path,
) -> None:
    """Mark the evaluation as finished."""
    inputs = {
        "model": model_identity(base_folder),
        "corpus": build_corpus(config.corpus).describe(),
        "subjects": {subject.name: subject.source for subject in subjects},
    }
    seeds = {"seed": config.seed, "needle": config.evaluation.needle.seed}
    counts = {"num_subjects": len(subjects), "num_measurements": len(measurements)}
    write_manifest(
        folder,
        Manifest("evaluations", inputs=inputs, config=to_plain(config), seeds=seeds, counts=counts),
    )


if __name__ == "__main__":
    run_command(main)
