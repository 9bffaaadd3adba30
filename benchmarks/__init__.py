"""Measurements: ratios of two ways to do the same thing, taken side by side in one run."""
