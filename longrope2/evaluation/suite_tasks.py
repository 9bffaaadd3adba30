"""The generation tasks of a suite, and who is asked which."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrope2.evaluation.long_tasks import long_tasks
from longrope2.evaluation.needle_map import needle_map_tasks
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.ruler.tasks import ruler_tasks
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.subjects import Subject
from longrope2.evaluation.suite import SuiteConfig

__all__ = ["asked_of", "suite_tasks"]


def suite_tasks(
    suite: SuiteConfig,
    tokenizer: Any,
    haystacks: Sequence[str],
    lengths: Sequence[int],
    target_len: int,
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> list[GenerationTask]:
    """RULER, the needle map and the long tasks of a suite.

    Args:
        suite: What is run.
        tokenizer: Of the base model, and so of all subjects.
        haystacks: Texts to hide needles in.
        lengths: Of RULER and the needle map, in tokens.
        target_len: L, the length of the long tasks.
        cache_folder: Where generated samples are kept.
        workers: Processes that generate samples; changes no sample.
        progress: Called with a task's name and a number of samples as they are made.

    Raises:
        UserError: settings, texts, data or prompts that cannot be used.
    """
    options: dict[str, Any] = {"cache_folder": cache_folder, "workers": workers, "progress": progress}
    tasks: list[GenerationTask] = []
    if suite.needle_map is not None:
        tasks += needle_map_tasks(suite.needle_map, tokenizer, haystacks, lengths, **options)
    if suite.ruler is not None:
        tasks += ruler_tasks(suite.ruler, tokenizer, haystacks, lengths, **options)
    return tasks + long_tasks(suite.long_tasks, PromptEncoder(tokenizer), target_len)


def asked_of(
    subject: Subject, tasks: Sequence[GenerationTask], suite: SuiteConfig, reference: str
) -> list[GenerationTask]:
    """The tasks put to a subject: all, or for the base model perhaps only those inside its window."""
    if subject.name != reference or suite.base_beyond_window:
        return list(tasks)
    return [task for task in tasks if task.length <= subject.factors.geometry.original_len]
