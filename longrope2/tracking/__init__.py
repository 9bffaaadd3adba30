"""Metrics to Weights & Biases and JSON lines."""

from longrope2.tracking.metrics import METRICS_FILE, MetricsLog, TrackingConfig, WandbMode, read_metrics, resolve_mode

__all__ = ["METRICS_FILE", "MetricsLog", "TrackingConfig", "WandbMode", "read_metrics", "resolve_mode"]
