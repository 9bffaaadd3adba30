"""A run's figures of its training, and what its figures do not show, worked out from the run."""

from longrope2.evaluation.schema import EvaluationSummary
from longrope2.report.data import RunRecord
from longrope2.report.html import image
from longrope2.report.plots import Scale, mix_figure, series_figure
from longrope2.report.text import text_statements

RETRIEVAL_SOURCE = "retrieval"
# Metrics with their names, vertical axis and its scale, text for who cannot see it.
SERIES: tuple[tuple[dict[str, str], str, Scale, str], ...] = (
    ({"train/loss_short": "short window", "train/loss_long": "long window"},
     "loss, nats per token", Scale.linear,
     "Training loss of the short and the long window by tokens"),
    ({"train/learning_rate": "learning rate"},
     "learning rate", Scale.from_zero, "Learning rate by tokens"),
    ({"train/grad_norm": "gradient norm"},
     "gradient norm before clipping", Scale.log, "Gradient norm by tokens"),
    ({"perf/tokens_per_second_per_gpu": "speed"},
     "tokens/s per process", Scale.from_zero, "Tokens per second and process by tokens"),
    ({"perf/mfu": "MFU"},
     "model FLOPs utilisation", Scale.from_zero, "Model FLOPs utilisation by tokens"),
    ({"perf/micro_step_seconds_short": "short window",
      "perf/micro_step_seconds_long": "long window"},
     "seconds of a micro-step", Scale.from_zero,
     "Seconds of a micro-step of each window by tokens"),
    ({"perf/memory_peak_gib": "memory"},
     "peak memory, GiB", Scale.from_zero, "Peak memory of the first process by tokens"),
)  # fmt: skip


def limits(record: RunRecord) -> list[str]:
    """One statement per limit, plain text."""
    measured = [] if record.evaluation is None else _of_evaluation(record.evaluation, record)
    return [
        *measured,
        *(f"The {p} were made in another run: {run}." for p, run in record.taken_from.items()),
        *_retrieval_in_training(record),
        *text_statements(record),
        *_missing_halves(record),
        "Every training was run once, with one seed: differences between trained models include "
        "its luck.",
        "The figures hold for this model, this text and these lengths; a larger model may order "
        "them otherwise.",
    ]


def _of_evaluation(summary: EvaluationSummary, record: RunRecord) -> list[str]:
    """How wide intervals are at worst, how samples were scored, what was trained where."""
    num_samples = summary.needle[0].num_samples
    statements = [
        f"{num_samples} needle samples per length: near 50 % the 95 % interval is about "
        f"{100 * 0.98 / num_samples**0.5:.0f} points either way. All models see the same samples.",
        "A needle counts as retrieved when greedy decoding would give exactly its value; this is "
        "read off one forward pass. Text perplexity scores the same "
        f"{summary.perplexity[0].num_tokens:,} tokens at every length, with more and more text "
        "before them.",
    ]
    trained, run = (subject for subject in summary.subjects if subject.trained), record.folder.name
    others = [f"{s.name} ({s.checkpoint})" for s in trained if run not in s.checkpoint.split("/")]
    if others:
        known = ", ".join(others)
        statements.append(f"Trained in other runs, whose configuration stands there: {known}.")
    untrained = [s.name for s in summary.subjects if not s.trained and s.name != summary.reference]
    if untrained:
        statements.append(
            f"Inside the original window the untrained models ({', '.join(untrained)}) are the "
            "base model by construction, because the window switches; only the trained ones can "
            "gain or lose there."
        )
    return statements


def _retrieval_in_training(record: RunRecord) -> list[str]:
    """Needle documents in the training mix make the needle test a practised task."""
    tokens, shares = record.mix_tokens, []
    for window in ("long", "short"):
        total = sum(by_window.get(window, 0) for by_window in tokens.values())
        retrieval = tokens.get(RETRIEVAL_SOURCE, {}).get(window, 0)
        if retrieval:
            share = f"{100 * retrieval / total:.0f} %"
            shares.append(f"{retrieval:,} of {total:,} tokens of the {window} segments ({share})")
    if not shares:
        return []
    return [
        "The training data contain retrieval documents in the wording of the needles: "
        f"{', '.join(shares)}. Keys, values and texts are drawn separately, but the needle test is "
        "a task the trained models have practised: it shows reach across the window, not general "
        "skill."
    ]


def _missing_halves(record: RunRecord) -> list[str]:
    """A window that no segment was packed for is not trained."""
    manifest = record.stages["segments"].manifest
    if manifest is None or manifest.details.get("target_len") == manifest.details.get(
        "original_len", ""
    ):  # pre-training has one window
        return []
    return [
        f"The run's segments hold no {window} ones: its {window} window was not trained."
        for window in ("short", "long")
        if manifest.counts.get(f"num_{window}_segments") == 0
    ]


def training_images(record: RunRecord) -> str:
    """The figures of ``SERIES``; what was not recorded has none."""
    images = ""
    for keys, label, scale, alternative in SERIES:
        figure = series_figure(record.training_metrics, keys, label, scale)
        images += "" if figure is None else image(figure, alternative)
    return images


def mix_images(record: RunRecord) -> str:
    """Tokens by source and window; empty before packing."""
    alternative = "Tokens of the training mix by source and window"
    return image(mix_figure(record.mix_tokens), alternative) if record.mix_tokens else ""
