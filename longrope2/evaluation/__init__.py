"""Measuring models by length: needles, text, retention, and suites answered by generation."""
