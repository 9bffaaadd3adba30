"""Rotary position embedding: periods, critical dimensions, rescaling methods, and the
``RescaleFactors`` value.

Pure maths: no files, no ranks, no transformers.
"""
