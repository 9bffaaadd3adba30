"""All long tasks of a configuration."""

from longrope2.evaluation.long_tasks.config import LongTasksConfig
from longrope2.evaluation.long_tasks.infinitebench import infinitebench_task
from longrope2.evaluation.long_tasks.loft import loft_task
from longrope2.evaluation.long_tasks.longbench import longbench_task
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask

__all__ = ["long_tasks"]


def long_tasks(
    config: LongTasksConfig, encoder: PromptEncoder, target_len: int, key: str = "suite.long_tasks"
) -> list[GenerationTask]:
    """The tasks asked for, benchmark by benchmark.

    Args:
        config: Which, and where they are.
        encoder: The model's tokenizer.
        target_len: L, the length of all tasks unless the configuration names a smaller one.
        key: Where ``config`` stands, for messages.

    Raises:
        DataError: data or prompts are missing, no access, or not the published ones.
    """
    length, count = config.length or target_len, config.num_samples
    tasks = []
    for task in config.longbench.tasks:
        tasks.append(
            longbench_task(task, config.longbench, encoder, length=length, num_samples=count, key=f"{key}.longbench")
        )
    for task in config.infinitebench.tasks:
        tasks.append(
            infinitebench_task(
                task, config.infinitebench, encoder, length=length, num_samples=count, key=f"{key}.infinitebench"
            )
        )
    for task in config.loft.tasks:
        tasks.append(loft_task(task, config.loft, encoder, length=length, num_samples=count, key=f"{key}.loft"))
    return tasks
