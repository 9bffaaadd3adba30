"""Long tasks of the paper's Table 3: LongBench, InfiniteBench and LOFT, with upstream's prompts, cuts and scores."""

from longrope2.evaluation.long_tasks.build import long_tasks
from longrope2.evaluation.long_tasks.config import LongTasksConfig, long_task_faults

__all__ = ["LongTasksConfig", "long_task_faults", "long_tasks"]
