"""The report's figures of a training, those a W&B workspace shows: from ``metrics.jsonl`` and the segments' manifest."""

from collections.abc import Mapping
from typing import Any

from longrope2.evaluation.report_data import RunRecord
from longrope2.evaluation.report_html import image
from longrope2.evaluation.report_plots import losses_figure, mix_figure, series_figure

__all__ = ["mix_images", "training_images"]

# Metrics with their names, vertical axis, logarithmic, text for who cannot see it.
SERIES: tuple[tuple[dict[str, str], str, bool, str], ...] = (
    ({"train/learning_rate": "learning rate"}, "learning rate", False, "Learning rate by tokens"),
    ({"train/grad_norm": "gradient norm"}, "gradient norm before clipping", True, "Gradient norm by tokens"),
    ({"perf/tokens_per_second_per_gpu": "speed"}, "tokens/s per process", False, "Tokens per second and process by tokens"),
    ({"perf/mfu": "MFU"}, "model FLOPs utilisation", False, "Model FLOPs utilisation by tokens"),
    ({"perf/micro_step_seconds_short": "short window", "perf/micro_step_seconds_long": "long window"},
     "seconds of a micro-step", False, "Seconds of a micro-step of each window by tokens"),
    ({"perf/memory_peak_gib": "memory"}, "peak memory, GiB", False, "Peak memory of the first process by tokens"),
)  # fmt: skip


def training_images(record: RunRecord) -> str:
    """Loss by window, learning rate, gradient norm, speed, utilisation and memory; what was not recorded has no figure."""
    records = record.training_metrics
    images = [image(losses_figure(records), "Training loss of the short and the long window by tokens")]
    for keys, label, log_y, alternative in SERIES:
        figure = series_figure(records, keys, label, log_y=log_y)
        images += [] if figure is None else [image(figure, alternative)]
    return "".join(images)


def mix_images(record: RunRecord) -> str:
    """Tokens by source and window; empty before packing."""
    manifest = record.stages["segments"].manifest
    counted: dict[str, Any] = manifest.counts.get("tokens", {}) if manifest else {}
    tokens = {source: windows for source, windows in counted.items() if isinstance(windows, Mapping)}
    return image(mix_figure(tokens), "Tokens of the training mix by source and window") if tokens else ""
