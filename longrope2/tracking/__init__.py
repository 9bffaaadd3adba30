"""Metrics to Weights & Biases and JSON lines."""
