"""The on-disk contract between packing and everything that reads tokens: segments, their order, needle sets."""

from longrope2.segments.format import Segment, SegmentStore, segment_schema, token_type
from longrope2.segments.needle_set import NeedleSample, NeedleSet
from longrope2.segments.rules import SegmentRules, check_at_start, check_segment, rules_of
from longrope2.segments.schedule import MicroStep, StepSchedule

__all__ = [
    "MicroStep",
    "NeedleSample",
    "NeedleSet",
    "Segment",
    "SegmentRules",
    "SegmentStore",
    "StepSchedule",
    "check_at_start",
    "check_segment",
    "rules_of",
    "segment_schema",
    "token_type",
]
