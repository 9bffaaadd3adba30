"""A run's figures of its training, and what its figures do not show, worked out from the run."""

import html
from typing import Any

from longrope2.evaluation.schema import EvaluationSummary
from longrope2.report.data import RunRecord
from longrope2.report.html import image
from longrope2.report.plots import (
    LEAST_TO_SMOOTH,
    Scale,
    Series,
    document_lengths_figure,
    mix_figure,
    series_figure,
)
from longrope2.report.text import text_statements

RETRIEVAL_SOURCE = "retrieval"
SERIES = (
    Series({"train/loss_short": "short window", "train/loss_long": "long window"},
           "loss, nats per token", Scale.by_range,
           "Training and held-out loss of the short and the long window by tokens",
           is_noisy=True,
           points={"train/heldout_loss_short": "short, held out",
                   "train/heldout_loss_long": "long, held out"}),
    Series({"train/learning_rate": "learning rate"},
           "learning rate", Scale.from_zero, "Learning rate by tokens"),
    Series({"train/grad_norm": "gradient norm"},
           "gradient norm before clipping", Scale.log, "Gradient norm by tokens", is_noisy=True),
    Series({"perf/tokens_per_second_per_gpu": "speed"},
           "tokens/s per process", Scale.from_zero, "Tokens per second and process by tokens",
           is_noisy=True),
    Series({"perf/mfu": "MFU"},
           "model FLOPs utilisation", Scale.from_zero, "Model FLOPs utilisation by tokens",
           is_noisy=True),
    Series({"perf/micro_step_seconds_short": "short window",
            "perf/micro_step_seconds_long": "long window"},
           "seconds of a micro-step", Scale.from_zero,
           "Seconds of a micro-step of each window by tokens", is_noisy=True),
    Series({"perf/memory_peak_gib": "memory"},
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


def training_html(record: RunRecord) -> str:
    """The figures of ``SERIES`` (what was not recorded has none) and what is to be known of them.

    For a training that has records.
    """
    records, images = record.training_metrics, ""
    resumed_at = _resumed_at_tokens(record)
    for series in SERIES:
        figure = series_figure(records, series, resumed_at)
        images += "" if figure is None else image(figure, series.alternative)
    num_steps = sum(found["step"] > 0 for found in records)
    notes = [f"{num_steps} records, {records[-1]['train/tokens']:,} tokens."]
    if corpus := record.corpus_of("checkpoints"):
        notes.append(f"Text: corpus {corpus}.")
    if not record.stages["checkpoints"].manifest:
        notes.append("The training is not finished.")
    if steps := record.resumed_after_steps:
        after = "step" if len(steps) == 1 else "steps"
        counted = ", ".join(f"{step:,}" for step in steps)
        notes.append(f"Interrupted and resumed after {after} {counted} (dotted).")
    if num_steps >= LEAST_TO_SMOOTH:
        notes.append("Thick lines are running means over a twentieth of the run.")
    notes += _heldout_sentences(records)
    note = html.escape(" ".join(notes))
    return f"<div class=figures>{images}</div><p class=note>{note}</p>"


def _resumed_at_tokens(record: RunRecord) -> list[int]:
    """Where the training went on after an interruption; all steps have as many tokens."""
    last = record.training_metrics[-1]
    tokens_per_step = last["train/tokens"] // max(1, last["step"])
    return [step * tokens_per_step for step in record.resumed_after_steps]


def _heldout_sentences(records: list[dict[str, Any]]) -> list[str]:
    """Loss on held-out text: at first, at its lowest, at last."""
    sentences = []
    for window in ("short", "long"):
        key = f"train/heldout_loss_{window}"
        if measured := [found for found in records if key in found]:
            first, last = measured[0], measured[-1]
            lowest = min(measured, key=lambda found: found[key])
            sentences.append(
                f"Loss on held-out text, {window} window: {first[key]:.3f} after step "
                f"{first['step']:,}, lowest {lowest[key]:.3f} after step {lowest['step']:,}, "
                f"{last[key]:.3f} after step {last['step']:,}."
            )
    if sentences:
        sentences.append("Held-out text is of documents of that corpus that are in no segment.")
    return sentences


def mix_html(record: RunRecord) -> str:
    """What was packed: tokens by source and window, documents by length; empty before packing."""
    if not record.mix_tokens:
        return ""
    alternative = "Tokens of the training mix by source and window"
    images = image(mix_figure(record.mix_tokens), alternative)
    if (lengths := record.document_lengths) is not None:
        alternative = "Documents read and packed by their length in tokens"
        images += image(document_lengths_figure(lengths), alternative)
    shown = f"<div class=figures>{images}</div>"
    if (corpus := record.corpus_of("segments")) is None:
        return shown
    return f"{shown}<p class=note>Packed from corpus {html.escape(corpus)}.</p>"
