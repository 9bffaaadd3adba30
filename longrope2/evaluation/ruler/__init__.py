"""RULER (arXiv 2404.06654): our own generators, or NVIDIA's prompts and defects from a checkout; metrics; a store."""

from longrope2.evaluation.ruler.config import RULER_TASKS, RulerConfig, RulerMode, ruler_faults
from longrope2.evaluation.ruler.haystacks import read_texts
from longrope2.evaluation.ruler.metrics import (
    ruler_score,
    string_match_all,
    string_match_part,
    suite_score,
)
from longrope2.evaluation.ruler.tasks import ruler_tasks

__all__ = [
    "RULER_TASKS",
    "RulerConfig",
    "RulerMode",
    "read_texts",
    "ruler_faults",
    "ruler_score",
    "ruler_tasks",
    "string_match_all",
    "string_match_part",
    "suite_score",
]
