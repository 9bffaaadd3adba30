"""Rotary position embedding: periods, critical dimensions, rescaling methods, and the ``RescaleFactors`` value.

Pure maths: no files, no ranks, no transformers.
"""

from longrope2.rope.critical import ntk_part, satisfies_bound
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import (
    RopeGeometry,
    inverse_frequencies,
    periods,
    ten_period_index,
    theoretical_critical_index,
)
from longrope2.rope.methods import RopeMethod, closed_form_factors

__all__ = [
    "RescaleFactors",
    "RopeGeometry",
    "RopeMethod",
    "Window",
    "closed_form_factors",
    "inverse_frequencies",
    "ntk_part",
    "periods",
    "satisfies_bound",
    "ten_period_index",
    "theoretical_critical_index",
]
