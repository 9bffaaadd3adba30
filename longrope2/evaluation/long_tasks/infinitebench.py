"""InfiniteBench: retrieval of a value by its key (KV) and multiple choice about a book (En.MC).

The templates are those of upstream's base models (the yarn-mistral set). The middle of a prompt is cut out where it does
not fit, as upstream does: En.MC is longer than 128k tokens on average, so for it the cut is part of the score, and in KV
it may take the pair asked for away, which is reported beside the score.
"""

from typing import Any

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks.config import InfiniteBenchConfig
from longrope2.evaluation.long_tasks.fitting import cut_sample
from longrope2.evaluation.long_tasks.rules import choice_score, key_value_score
from longrope2.evaluation.long_tasks.sources import check_prompts, prompt_file, python_strings, read_rows
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask, Sample

__all__ = ["infinitebench_task"]

PROMPT_FILES = ("src/prompt.py", "prompt.py")
TEMPLATE_SET = "yarn_mistral_templates"
PROMPT_HASHES = {"kv_retrieval": "afa97419dd69cd74", "longbook_choice_eng": "fddf5d8b4293a275"}
MAX_NEW_TOKENS = {"kv_retrieval": 50, "longbook_choice_eng": 40}
LETTERS = "ABCD"


def infinitebench_task(
    task: str,
    config: InfiniteBenchConfig,
    encoder: PromptEncoder,
    *,
    length: int,
    num_samples: int | None,
    key: str = "suite.long_tasks.infinitebench",
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
    path = prompt_file(f"{key}.prompts", config.prompts, PROMPT_FILES, "github.com/OpenBMB/InfiniteBench")
    prompts = python_strings(path).get(TEMPLATE_SET, {})
    check_prompts(f"{key}.prompts", path, prompts, {task: PROMPT_HASHES[task]})
    rows = read_rows(f"{key}.data", config.data, [f"{task}.jsonl"], hub_file=f"{task}.jsonl", revision=config.revision)
    make = _key_value if task == "kv_retrieval" else _choice
    try:
        samples = tuple(make(row, prompts[task], encoder, length) for row in rows[:num_samples])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{key}.data={config.data}, {task}: a row does not fit ({error}); is it InfiniteBench?"
        ) from None
    score = _key_value_score if task == "kv_retrieval" else _choice_score
    return GenerationTask("infinitebench", task, length, samples, score)


def _key_value(row: dict[str, Any], template: str, encoder: PromptEncoder, length: int) -> Sample:
    """A pair to find among many."""
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    prompt = template.format(context=row["context"], input=row["input"])
    return cut_sample(
        encoder, prompt, (answer,), max_new_tokens=MAX_NEW_TOKENS["kv_retrieval"], length=length, needle=answer
    )


def _choice(row: dict[str, Any], template: str, encoder: PromptEncoder, length: int) -> Sample:
    """A question about a book with four options."""
    options = dict(zip((f"OPTION_{letter}" for letter in LETTERS), row["options"], strict=True))
    prompt = template.format(context=row["context"], question=row.get("question") or row["input"], **options)
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    letter = LETTERS[list(row["options"]).index(answer)]
    return cut_sample(
        encoder, prompt, (answer, letter), max_new_tokens=MAX_NEW_TOKENS["longbook_choice_eng"], length=length
    )


def _key_value_score(sample: Sample, text: str) -> float:
    """The word rule."""
    return key_value_score(text, sample.answers[0])


def _choice_score(sample: Sample, text: str) -> float:
    """The cascade."""
    return choice_score(text, sample.answers)
