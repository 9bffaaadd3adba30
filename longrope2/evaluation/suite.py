"""Suites: which benchmarks an evaluation runs, and the values that the base model must reproduce first."""

from dataclasses import dataclass, field

from longrope2.evaluation.long_tasks.config import (
    INFINITEBENCH_TASKS,
    LOFT_TASKS,
    LONGBENCH_TASKS,
    LongTasksConfig,
    long_task_faults,
)
from longrope2.evaluation.needle_map import NeedleMapConfig, needle_map_faults
from longrope2.evaluation.ruler.config import RULER_TASKS, RulerConfig, ruler_faults
from longrope2.evaluation.short_tasks_config import LM_EVAL_SUITE, ShortTasksConfig, short_task_faults

__all__ = ["CalibrationConfig", "CalibrationRule", "SuiteConfig", "calibration_faults", "suite_faults"]

TASKS_BY_SUITE = {
    "ruler": (*RULER_TASKS, "average"), "needle_map": ("needle_map",), "longbench": LONGBENCH_TASKS,
    "infinitebench": INFINITEBENCH_TASKS, "loft": LOFT_TASKS,
}  # fmt: skip
"""Scores by length; those of ``lm_eval`` are lm-eval's own tasks and have no length."""


@dataclass
class CalibrationRule:
    """One score that the base model must reach before scores of extended ones are reported."""

    score: str = ""
    """``lm_eval/<task>`` or ``<suite>/<task>/<length>``, e.g. ``lm_eval/hellaswag`` or ``ruler/niah_single_1/4096``."""
    low: float = 0.0
    """Lowest score allowed, 0 to 100."""
    high: float = 100.0
    """Highest score allowed: far above the published value, the harness measures something else."""


@dataclass
class CalibrationConfig:
    """The gate on the base model."""

    rules: list[CalibrationRule] = field(default_factory=list)
    """Rules on scores that the suite measures; others are left aside and said to be."""
    required: bool = True
    """False reports extended models even if the base model breaks a rule, with a remark."""


@dataclass
class SuiteConfig:
    """What is run."""

    measures: bool = True
    """Needle perplexity, text perplexity and retention, as ``evaluation`` sets them."""
    lengths: list[int] | None = None
    """Lengths of RULER and the needle map in tokens; null is ``evaluation.lengths``."""
    base_beyond_window: bool = True
    """Whether the reference subject is asked beyond ``model.original_len`` too, where it is out of its depth."""
    ruler: RulerConfig | None = None
    needle_map: NeedleMapConfig | None = None
    long_tasks: LongTasksConfig = field(default_factory=LongTasksConfig)
    short_tasks: ShortTasksConfig = field(default_factory=ShortTasksConfig)

    @property
    def generates(self) -> bool:
        """Whether any part asks for answers."""
        long_tasks = self.long_tasks
        tasks = long_tasks.longbench.tasks + long_tasks.infinitebench.tasks + long_tasks.loft.tasks
        return self.ruler is not None or self.needle_map is not None or bool(tasks)


def suite_faults(suite: SuiteConfig, lengths: list[int], original_len: int, target_len: int) -> list[str]:
    """What is wrong with a suite, each fault naming its key.

    Args:
        suite: The suite.
        lengths: Lengths of RULER and the needle map, as they will be used.
        original_len: L0.
        target_len: L.
    """
    faults = []
    if not suite.measures and not suite.generates and not suite.short_tasks.tasks:
        faults.append("suite runs nothing: set suite.measures=true, or choose suite=paper or another one")
    if suite.ruler is not None or suite.needle_map is not None:
        if any(not 1 <= length <= target_len for length in lengths) or len(set(lengths)) < len(lengths):
            faults.append(f"suite.lengths={lengths} must be distinct lengths of at most target_len={target_len}")
    if suite.ruler is not None:
        faults += ruler_faults(suite.ruler, lengths, "suite.ruler")
    if suite.needle_map is not None:
        faults += needle_map_faults(suite.needle_map, lengths, "suite.needle_map")
    faults += long_task_faults(suite.long_tasks, target_len)
    return faults + short_task_faults(suite.short_tasks)


def calibration_faults(config: CalibrationConfig) -> list[str]:
    """Rules without a range, or on a score that no suite could ever give: they would never be broken."""
    faults = []
    for index, rule in enumerate(config.rules):
        if not rule.score or not 0 <= rule.low < rule.high <= 100:
            faults.append(
                f"calibration.rules[{index}]: score={rule.score!r} needs low={rule.low} below high={rule.high}, both 0 to 100"
            )
        elif not _is_a_score(rule.score):
            faults.append(
                f"calibration.rules[{index}]: no suite gives a score {rule.score!r}; write {LM_EVAL_SUITE}/TASK, or "
                f"SUITE/TASK/LENGTH with one of {', '.join(TASKS_BY_SUITE)} and one of its tasks"
            )
    return faults


def _is_a_score(name: str) -> bool:
    """Whether a name has the form of a score, with a suite and a task that exist."""
    suite, _, rest = name.partition("/")
    task, slash, length = rest.partition("/")
    if suite == LM_EVAL_SUITE:
        return bool(task) and not slash
    return task in TASKS_BY_SUITE.get(suite, ()) and length.isdecimal() and int(length) > 0
