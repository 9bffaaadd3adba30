"""Settings of short tasks: which, with how many worked examples, and which of the harness's numbers counts.

The paper (Table 4) names tasks but no shot counts. The harness is calibrated on the original models first: what
reproduces their published scores is what conf/suite/paper.yaml freezes.
"""

import importlib.metadata
from dataclasses import dataclass, field

from longrope2.errors import ConfigError

__all__ = [
    "LM_EVAL_SUITE",
    "ShortTaskConfig",
    "ShortTasksConfig",
    "lm_eval_version",
    "require_lm_eval",
    "short_task_faults",
]

LM_EVAL_SUITE = "lm_eval"
"""The suite that short tasks' scores belong to."""
INSTALL = "pip install 'longrope2[lm-eval]'"


@dataclass
class ShortTaskConfig:
    """One task of lm-eval."""

    name: str = ""
    """Its name in our tables."""
    task: str = ""
    """Its name, or that of a group of tasks, in lm-eval."""
    metric: str = "acc,none"
    """Metric and filter, e.g. ``acc_norm,none`` or ``exact_match,flexible-extract``."""
    num_fewshot: int | None = None
    """Worked examples in front of each question; null is the task's own."""


@dataclass
class ShortTasksConfig:
    """Short tasks, all read with the RoPE side that each sequence's own length asks for."""

    tasks: list[ShortTaskConfig] = field(default_factory=list)
    include_path: str | None = None
    """Folder with task files of your own for lm-eval."""
    limit: int | None = None
    """Only the first so many questions of each task; null is all."""


def short_task_faults(config: ShortTasksConfig, key: str = "suite.short_tasks") -> list[str]:
    """What is wrong with the values, each fault naming its key."""
    faults = []
    names = [task.name for task in config.tasks]
    for index, task in enumerate(config.tasks):
        place = f"{key}.tasks[{index}]"
        if not task.name or not task.task or names.count(task.name) > 1:
            faults.append(f"{place}: name={task.name!r} and task={task.task!r} must be given, every name once")
        if task.metric.count(",") != 1:
            faults.append(f"{place}.metric={task.metric!r} must be METRIC,FILTER as lm-eval prints it, e.g. acc,none")
        if task.num_fewshot is not None and task.num_fewshot < 0:
            faults.append(f"{place}.num_fewshot={task.num_fewshot} must be 0 or more, or null")
    if config.limit is not None and config.limit < 1:
        faults.append(f"{key}.limit={config.limit} must be at least 1, or null for all")
    if config.tasks and lm_eval_version() is None:
        faults.append(f"{key}.tasks needs lm-eval, which is not installed: {INSTALL}")
    return faults


def lm_eval_version() -> str | None:
    """Installed version of lm-eval."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    if lm_eval_version() is None:
        raise ConfigError([f"lm-eval is not installed: {INSTALL}"])
