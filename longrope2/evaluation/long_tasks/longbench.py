"""LongBench v1: TriviaQA, TREC (in-context learning), LCC and RepoBench-P (code completion).

Prompts are cut in the middle where they do not fit, as upstream does. Most are below 8k tokens, so on a model of that
window they try the original RoPE as much as the rescaled one: every sample keeps its token count for scores by length.
"""

from collections.abc import Callable
from typing import Any

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks.config import LongBenchConfig
from longrope2.evaluation.long_tasks.fitting import cut_sample
from longrope2.evaluation.long_tasks.rules import class_score, code_line_score, first_line, token_f1
from longrope2.evaluation.long_tasks.sources import check_prompts, prompt_file, read_json_strings, read_rows
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask, Sample

__all__ = ["longbench_task"]

PROMPT_FILES = ("LongBench/config/dataset2prompt.json", "config/dataset2prompt.json", "dataset2prompt.json")
PROMPT_HASHES = {
    "trec": "0eff8bebdba99d91", "triviaqa": "00a802e6377e72fc",
    "lcc": "6a1f24cf0bb83cd9", "repobench-p": "ee9ec182ea5ffeb7",
}  # fmt: skip
MAX_NEW_TOKENS = {"triviaqa": 32, "trec": 64, "lcc": 64, "repobench-p": 64}


def longbench_task(
    task: str,
    config: LongBenchConfig,
    encoder: PromptEncoder,
    *,
    length: int,
    num_samples: int | None,
    key: str = "suite.long_tasks.longbench",
) -> GenerationTask:
    """One task.

    Args:
        task: A key of ``MAX_NEW_TOKENS``.
        config: Where data and prompts are.
        encoder: The model's tokenizer.
        length: Tokens that prompt and answer may take together.
        num_samples: Only the first so many; None for all.
        key: Where ``config`` stands, for messages.

    Raises:
        DataError: data or prompts are missing, no access, or not the published ones.
    """
    path = prompt_file(f"{key}.prompts", config.prompts, PROMPT_FILES, "github.com/THUDM/LongBench")
    prompts = read_json_strings(path)
    check_prompts(f"{key}.prompts", path, prompts, {task: PROMPT_HASHES[task]})
    names = [f"{task}.jsonl", f"data/{task}.jsonl"]
    rows = read_rows(f"{key}.data", config.data, names, hub_file="data.zip", revision=config.revision)
    samples = tuple(
        _sample(task, row, prompts[task], encoder, length, f"{key}.data={config.data}, {task}")
        for row in rows[:num_samples]
    )
    return GenerationTask("longbench", task, length, samples, SCORES[task])


def _sample(task: str, row: dict[str, Any], template: str, encoder: PromptEncoder, length: int, place: str) -> Sample:
    """One row as a question."""
    try:
        prompt = template.format(context=row["context"], input=row["input"])
        answers, classes = tuple(row["answers"]), row["all_classes"]
    except KeyError as error:
        raise DataError(f"{place}: a row has no field {error}; this is not LongBench v1") from None
    facts = {"classes": list(classes)} if classes else {}
    return cut_sample(encoder, prompt, answers, max_new_tokens=MAX_NEW_TOKENS[task], length=length, facts=facts)


def _trivia(sample: Sample, text: str) -> float:
    """The best F1 over the answers."""
    return max(token_f1(first_line(text), answer) for answer in sample.answers)


def _class(sample: Sample, text: str) -> float:
    """The class-list rule."""
    return max(class_score(first_line(text), answer, sample.facts["classes"]) for answer in sample.answers)


def _code(sample: Sample, text: str) -> float:
    """Similarity of the first line of code."""
    return max(code_line_score(text, answer) for answer in sample.answers)


SCORES: dict[str, Callable[[Sample, str], float]] = {
    "triviaqa": _trivia, "trec": _class, "lcc": _code, "repobench-p": _code,
}  # fmt: skip
