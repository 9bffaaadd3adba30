"""What the figures of a run do not show, said plainly and worked out from the run itself.

The report's figures of a training, those a W&B workspace shows: from ``metrics.jsonl`` and the
segments' manifest.
"""

from collections.abc import Mapping
from typing import Any

from longrope2.report.data import RunRecord
from longrope2.report.html import image
from longrope2.report.plots import losses_figure, mix_figure, series_figure

RETRIEVAL_SOURCE = "retrieval"
# Metrics with their names, vertical axis, logarithmic, text for who cannot see it.
SERIES: tuple[tuple[dict[str, str], str, bool, str], ...] = (
    ({"train/learning_rate": "learning rate"}, "learning rate", False, "Learning rate by tokens"),
    (
        {"train/grad_norm": "gradient norm"},
        "gradient norm before clipping",
        True,
        "Gradient norm by tokens",
    ),
    (
        {"perf/tokens_per_second_per_gpu": "speed"},
        "tokens/s per process",
        False,
        "Tokens per second and process by tokens",
    ),
    ({"perf/mfu": "MFU"}, "model FLOPs utilisation", False, "Model FLOPs utilisation by tokens"),
    (
        {
            "perf/micro_step_seconds_short": "short window",
            "perf/micro_step_seconds_long": "long window",
        },
        "seconds of a micro-step",
        False,
        "Seconds of a micro-step of each window by tokens",
    ),
    (
        {"perf/memory_peak_gib": "memory"},
        "peak memory, GiB",
        False,
        "Peak memory of the first process by tokens",
    ),
)


def limits(record: RunRecord) -> list[str]:
    """One statement per limit, plain text."""
    statements = []
    if record.evaluation is not None:
        statements += [
            _sample_size(record),
            _method(record),
            *_trained_elsewhere(record),
            *_by_construction(record),
        ]
    statements += [*_retrieval_in_training(record), *_shared_text(record)]
    return [
        *statements,
        "Every training was run once, with one seed: differences between trained models include its luck.",
        "The figures hold for this model, this text and these lengths; a larger model may order them otherwise.",
    ]


def _sample_size(record: RunRecord) -> str:
    """How wide an interval is at worst."""
    assert record.evaluation is not None
    num_samples = record.evaluation["needle"][0]["num_samples"]
    return (
        f"{num_samples} needle samples per length: near 50 % the 95 % interval is about "
        f"{100 * 0.98 / num_samples**0.5:.0f} points either way. All models see the same samples."
    )


def _method(record: RunRecord) -> str:
    """How values and text were scored."""
    assert record.evaluation is not None
    tokens = record.evaluation["perplexity"][0]["num_tokens"]
    return (
        "A needle counts as retrieved when greedy decoding would give exactly its value; this is read off one forward "
        f"pass. Text perplexity scores the same {tokens:,} tokens at every length, with more and more text before them."
    )


def _by_construction(record: RunRecord) -> list[str]:
    """Untrained subjects are the base model in the short window."""
    assert record.evaluation is not None
    names = [
        subject["name"]
        for subject in record.evaluation["subjects"]
        if not subject["trained"] and subject["name"] != record.evaluation["reference"]
    ]
    if not names:
        return []
    return [
        f"Inside the original window the untrained models ({', '.join(names)}) are the base model by construction, "
        "because the window switches; only the trained ones can gain or lose there."
    ]


def _trained_elsewhere(record: RunRecord) -> list[str]:
    """Trained subjects whose checkpoint stands in another run."""
    assert record.evaluation is not None
    paths = [
        f"{subject['name']} ({subject['source']['checkpoint']['path']})"
        for subject in record.evaluation["subjects"]
        if subject["trained"]
        and record.folder.name not in subject["source"]["checkpoint"]["path"].split("/")
    ]
    if not paths:
        return []
    return [f"Trained in other runs, whose configuration stands there: {', '.join(paths)}."]


def _retrieval_in_training(record: RunRecord) -> list[str]:
    """Needle documents in the training mix make the needle test a practised task."""
    manifest = record.stages["segments"].manifest
    if manifest is None:
        return []
    tokens = manifest.counts.get("tokens", {})
    shares = []
    for window in ("long", "short"):
        total = sum(by_window.get(window, 0) for by_window in tokens.values())
        retrieval = tokens.get(RETRIEVAL_SOURCE, {}).get(window, 0)
        if retrieval:
            share = f"{100 * retrieval / total:.0f} %"
            shares.append(f"{retrieval:,} of {total:,} tokens of the {window} segments ({share})")
    if not shares:
        return []
    return [
        f"The training data contain retrieval documents in the wording of the needles: {', '.join(shares)}. Keys, "
        "values and texts are drawn separately, but the needle test is a task the trained models have practised: it "
        "shows reach across the window, not general skill."
    ]


def _shared_text(record: RunRecord) -> list[str]:
    """Search and evaluation draw on the same held-out documents."""
    factors, evaluations = record.stages["factors"].manifest, record.stages["evaluations"].manifest
    if factors is None or evaluations is None:
        return []
    return [
        "The factors were searched on needles hidden in the same held-out documents that evaluation uses, with keys, "
        "values and places drawn separately "
        f"(seeds {factors.seeds.get('seed')} and {evaluations.seeds.get('needle')}). "
        "None of these documents is in the training segments."
    ]


def training_images(record: RunRecord) -> str:
    """Loss by window, learning rate, gradient norm, speed, utilisation and memory; what was not recorded has no figure."""
    records = record.training_metrics
    images = [
        image(losses_figure(records), "Training loss of the short and the long window by tokens")
    ]
    for keys, label, log_y, alternative in SERIES:
        figure = series_figure(records, keys, label, log_y=log_y)
        images += [] if figure is None else [image(figure, alternative)]
    return "".join(images)


def mix_images(record: RunRecord) -> str:
    """Tokens by source and window; empty before packing."""
    manifest = record.stages["segments"].manifest
    counted: dict[str, Any] = manifest.counts.get("tokens", {}) if manifest else {}
    tokens = {
        source: windows for source, windows in counted.items() if isinstance(windows, Mapping)
    }
    return (
        image(mix_figure(tokens), "Tokens of the training mix by source and window")
        if tokens
        else ""
    )
