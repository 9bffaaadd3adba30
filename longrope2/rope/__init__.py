"""Rotary position embedding: periods, critical dimensions, rescaling methods, and the ``RescaleFactors`` value.

Pure maths: no files, no ranks, no transformers.
"""

from longrope2.rope.critical import first_out_of_bound, ntk_part, satisfies_bound
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import (
    RopeGeometry,
    inverse_frequencies,
    periods,
    ten_period_index,
    theoretical_critical_index,
)
from longrope2.rope.hf_reading import UNSCALED_TYPE, config_geometry, config_rope_type
from longrope2.rope.methods import (
    CLOSED_FORMS,
    CRITICAL_INDEX_METHODS,
    RopeMethod,
    closed_form_factors,
    critical_index_factors,
)

__all__ = [
    "CLOSED_FORMS",
    "CRITICAL_INDEX_METHODS",
    "UNSCALED_TYPE",
    "RescaleFactors",
    "RopeGeometry",
    "RopeMethod",
    "Window",
    "closed_form_factors",
    "config_geometry",
    "config_rope_type",
    "critical_index_factors",
    "first_out_of_bound",
    "inverse_frequencies",
    "ntk_part",
    "periods",
    "satisfies_bound",
    "ten_period_index",
    "theoretical_critical_index",
]
