"""Prompts as token ids that fit: whole, cut in the middle where upstream cuts, or refused.

Shape legend: T = tokens of a prompt.

InfiniteBench: retrieval of a value by its key (KV) and multiple choice about a book (En.MC).

The templates are those of upstream's base models (the yarn-mistral set). The middle of a prompt is
cut out where it does not fit, as upstream does: En.MC is longer than 128k tokens on average, so for
it the cut is part of the score, and in KV it may take the pair asked for away, which is reported
beside the score.

LOFT's text retrieval: a corpus of passages, a few worked examples, and a query, all in one prompt.

All queries of a set share everything in front of the query, so the runner reads that once. Nothing
is ever cut: a cut corpus has lost passages that are asked for. Answers are scored by the first line
with a list of ids: recall@1, and for HotPotQA mrecall@2. A base model goes on with an example of
its own behind its answer; that is never reached.

LongBench v1: TriviaQA, TREC (in-context learning), LCC and RepoBench-P (code completion).

Prompts are cut in the middle where they do not fit, as upstream does. Most are below 8k tokens, so
on a model of that window they try the original RoPE as much as the rescaled one: every sample keeps
its token count for scores by length.

All long tasks of a configuration.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks.config import (
    InfiniteBenchConfig,
    LoftConfig,
    LongBenchConfig,
    LongTasksConfig,
)
from longrope2.evaluation.long_tasks.rules import (
    choice_score,
    class_score,
    code_line_score,
    first_line,
    key_value_score,
    listed_ids,
    mrecall,
    recall,
    token_f1,
)
from longrope2.evaluation.long_tasks.sources import (
    check_prompts,
    prompt_file,
    python_strings,
    read_json_strings,
    read_rows,
)
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask, Sample

INFINITEBENCH_PROMPT_FILES = ("src/prompt.py", "prompt.py")
TEMPLATE_SET = "yarn_mistral_templates"
INFINITEBENCH_PROMPT_HASHES = {
    "kv_retrieval": "afa97419dd69cd74",
    "longbook_choice_eng": "fddf5d8b4293a275",
}
INFINITEBENCH_MAX_NEW_TOKENS = {"kv_retrieval": 50, "longbook_choice_eng": 40}
LETTERS = "ABCD"
COMMON_FILE, RETRIEVAL_FILE = "prompts/constants/common.py", "prompts/constants/retrieval.py"
REPOSITORY = "github.com/google-deepmind/loft"
NO_TITLE = "None"  # what upstream writes for a passage without one
REMOVED_WORDS = "childhood abuse"  # upstream's loader takes it out of every passage
# Examples name their passages before the ids: upstream turns its query format round for that.
TURNED = (("ID and TITLE", "TITLE and ID"), ("ID and CONTENT", "CONTENT and ID"))
LONGBENCH_PROMPT_FILES = (
    "LongBench/config/dataset2prompt.json",
    "config/dataset2prompt.json",
    "dataset2prompt.json",
)
LONGBENCH_PROMPT_HASHES = {
    "trec": "0eff8bebdba99d91", "triviaqa": "00a802e6377e72fc",
    "lcc": "6a1f24cf0bb83cd9", "repobench-p": "ee9ec182ea5ffeb7",
}  # fmt: skip
LONGBENCH_MAX_NEW_TOKENS = {"triviaqa": 32, "trec": 64, "lcc": 64, "repobench-p": 64}


def cut_sample(
    encoder: PromptEncoder,
    prompt: str,
    answers: tuple[str, ...],
    *,
    max_new_tokens: int,
    length: int,
    needle: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Sample:
    """A prompt whose middle is cut out if it is too long: the first and the last half of the budget
    stay.

    Upstream turns both halves into text and tokenizes that anew, which may move a token or two at
    the seam; here the ids themselves are cut. BOS counts. The budget leaves room for the answer, so
    prompt and answer fit into ``length``.

    Args:
        encoder: The model's tokenizer.
        prompt: The whole prompt.
        answers: For the score.
        max_new_tokens: Tokens of the answer.
        length: Tokens that prompt and answer may take together.
        needle: Text that must be left for the question to be answerable; whether it is goes into
            the facts.
        facts: Further facts about the sample.

    Raises:
        DataError: the answer alone takes the whole length.
    """
    ids = encoder.bos_ids + encoder.encode_text(prompt)
    budget = length - max_new_tokens
    if budget < 2:
        raise DataError(
            f"suite.long_tasks.length={length} leaves no room for a prompt: an answer may take {max_new_tokens} tokens"
        )
    half = budget // 2
    kept = ids if len(ids) <= budget else [*ids[:half], *ids[len(ids) - half :]]
    known = dict(facts or {}) | {"prompt_tokens": len(kept), "tokens_cut": len(ids) - len(kept)}
    if needle is not None:
        parts = [ids] if len(kept) == len(ids) else [ids[:half], ids[len(ids) - half :]]
        known["needle_survived"] = any(needle in encoder.decode(part) for part in parts)
    return Sample(np.array(kept, dtype=np.int32), answers, max_new_tokens, known)


def whole_sample(
    encoder: PromptEncoder,
    prompt: str,
    answers: tuple[str, ...],
    *,
    max_new_tokens: int,
    length: int,
    name: str,
) -> Sample:
    """A prompt that upstream never cuts.

    Raises:
        DataError: it does not fit; says how many tokens it takes.
    """
    ids = encoder.bos_ids + encoder.encode_text(prompt)
    if len(ids) + max_new_tokens > length:
        raise DataError(
            f"{name}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed {length} tokens, and this "
            "benchmark is never cut: it would lose the passages asked for. Use a smaller size of it, or leave it out"
        )
    return Sample(
        np.array(ids, dtype=np.int32),
        answers,
        max_new_tokens,
        {"prompt_tokens": len(ids), "tokens_cut": 0},
    )


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
        task: A key of ``LONGBENCH_MAX_NEW_TOKENS``.
        config: Where data and prompts are.
        encoder: The model's tokenizer.
        length: Tokens that prompt and answer may take together.
        num_samples: Only the first so many; None for all.
        key: Where ``config`` stands, for messages.

    Raises:
        DataError: data or prompts are missing, no access, or not the published ones.
    """
    path = prompt_file(
        f"{key}.prompts",
        config.prompts,
        INFINITEBENCH_PROMPT_FILES,
        "github.com/OpenBMB/InfiniteBench",
    )
    prompts = python_strings(path).get(TEMPLATE_SET, {})
    check_prompts(f"{key}.prompts", path, prompts, {task: INFINITEBENCH_PROMPT_HASHES[task]})
    rows = read_rows(
        f"{key}.data",
        config.data,
        [f"{task}.jsonl"],
        hub_file=f"{task}.jsonl",
        revision=config.revision,
    )
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
        encoder,
        prompt,
        (answer,),
        max_new_tokens=INFINITEBENCH_MAX_NEW_TOKENS["kv_retrieval"],
        length=length,
        needle=answer,
    )


def _choice(row: dict[str, Any], template: str, encoder: PromptEncoder, length: int) -> Sample:
    """A question about a book with four options."""
    options = dict(zip((f"OPTION_{letter}" for letter in LETTERS), row["options"], strict=True))
    prompt = template.format(
        context=row["context"], question=row.get("question") or row["input"], **options
    )
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    letter = LETTERS[list(row["options"]).index(answer)]
    return cut_sample(
        encoder,
        prompt,
        (answer, letter),
        max_new_tokens=INFINITEBENCH_MAX_NEW_TOKENS["longbook_choice_eng"],
        length=length,
    )


def _key_value_score(sample: Sample, text: str) -> float:
    """The word rule."""
    return key_value_score(text, sample.answers[0])


def _choice_score(sample: Sample, text: str) -> float:
    """The cascade."""
    return choice_score(text, sample.answers)


def loft_task(
    task: str,
    config: LoftConfig,
    encoder: PromptEncoder,
    *,
    length: int,
    num_samples: int | None,
    key: str = "suite.long_tasks.loft",
) -> GenerationTask:
    """One retrieval set.

    Args:
        task: Name of the set.
        config: Where data and prompts are.
        encoder: The model's tokenizer.
        length: Tokens that prompt and answer may take together.
        num_samples: Only the first so many queries; None for all.
        key: Where ``config`` stands, for messages.

    Raises:
        DataError: data or prompts are missing or damaged, or a prompt does not fit.
    """
    prompts = _prompts(task, config, key)
    parts = {
        name: read_rows(f"{key}.data", str(config.data), _places(task, config.size, name))
        for name in ("corpus", "few_shot_queries", f"{config.split}_queries")
    }
    place, samples, queries = (
        f"{key}.data={config.data}, {task}",
        [],
        parts[f"{config.split}_queries"][:num_samples],
    )
    try:
        corpus = _corpus(parts["corpus"], place)
        numbers = {pid: str(number) for number, pid in enumerate(corpus)}
        opening = _opening(prompts, corpus, numbers, parts["few_shot_queries"])
        asked = [
            (row["query_text"].strip(), tuple(numbers[pid] for pid, _ in row["answers"]))
            for row in queries
        ]
    except KeyError as error:
        raise DataError(
            f"{place}: {error} is in no passage or row; are corpus and queries of one LOFT set?"
        ) from None
    for text, gold in asked:
        query = prompts["test"] + prompts["query"].format(query=text) + "\n"
        samples.append(
            whole_sample(
                encoder,
                opening + query,
                gold,
                max_new_tokens=config.max_new_tokens,
                length=length,
                name=f"loft/{task}",
            )
        )
    score = _two_of_several if task == "hotpotqa" else _first_found
    return GenerationTask("loft", task, length, tuple(samples), score)


def _places(task: str, size: str, name: str) -> list[str]:
    """Where a file of a set stands, by the ways in which people unpack the zips."""
    file = f"{task}/{size}/{name}.jsonl"
    return [file, f"retrieval/{file}", f"data/retrieval/{file}"]


def _prompts(task: str, config: LoftConfig, key: str) -> dict[str, str]:
    """The formats of one set, from the constants of upstream's retrieval prompts."""
    path = prompt_file(f"{key}.prompts", config.prompts, (RETRIEVAL_FILE,), REPOSITORY)
    common_path = Path(str(config.prompts)) / COMMON_FILE
    if not common_path.is_file():
        raise DataError(
            f"{key}.prompts={config.prompts} is no checkout of {REPOSITORY}: {COMMON_FILE} is missing"
        )
    common = python_strings(common_path)
    constants = python_strings(path, common)
    try:
        name = constants["PROMPT_MAPPER"].get(task, task)
        query = constants["QUERY_FORMAT_SIMPLE"][name]
        for old, new in TURNED:
            query = query.replace(old, new)
        return {
            "instruction": constants["CORPUS_INSTRUCTION"][name],
            "format": constants["FORMATTING_INSTRUCTION"],
            "passage": constants["CORPUS_FORMAT_ECHO"][name],
            "found": constants["FEW_SHOT_EXAMPLE_COT_FORMAT_SIMPLE_REVERSE"][name],
            "answer": common["FINAL_ANSWER_FORMAT"],
            "example": common["FEW_SHOT_SEPARATOR"],
            "test": common["TEST_QUERY_SEPARATOR"],
            "query": query,
        }
    except KeyError as error:
        raise DataError(
            f"{key}.prompts: {path} has no {error}; is it the retrieval prompts of {REPOSITORY}?"
        ) from None


def _corpus(rows: list[dict[str, Any]], place: str) -> dict[str, dict[str, str]]:
    """Passage id -> title and text, in the order of the file."""
    corpus = {}
    for row in rows:
        passage = row["passage_text"].strip()
        if not passage:
            raise DataError(
                f"{place}: passage {row['pid']} has no text; LOFT ships this set without, run its preprocess.py first"
            )
        title = (row.get("title_text") or "").strip() or NO_TITLE
        corpus[row["pid"]] = {
            "title": title.replace(REMOVED_WORDS, ""),
            "passage": passage.replace(REMOVED_WORDS, ""),
        }
    return corpus


def _opening(
    prompts: Mapping[str, str],
    corpus: Mapping[str, Mapping[str, str]],
    numbers: Mapping[str, str],
    examples: list[dict[str, Any]],
) -> str:
    """All that stands in front of a query: instructions, the corpus, the worked examples."""
    chunks = [prompts["instruction"], prompts["format"]]
    chunks += [
        prompts["passage"].format(pid=numbers[pid], **texts) for pid, texts in corpus.items()
    ]
    for number, row in enumerate(examples, start=1):
        gold = [pid for pid, _ in row["answers"]]
        query = prompts["query"].format(query=row["query_text"].strip())
        chunks.append(prompts["example"].format(example_id=number) + query)
        chunks += [prompts["found"].format(pid=numbers[pid], **corpus[pid]) for pid in gold]
        chunks.append(prompts["answer"].format(final_answer=[numbers[pid] for pid in gold]))
    return "".join(f"{chunk}\n" for chunk in chunks)


def _first_found(sample: Sample, text: str) -> float:
    """recall@1."""
    return recall(listed_ids(text), sample.answers, 1)


def _two_of_several(sample: Sample, text: str) -> float:
    """mrecall@2."""
    return mrecall(listed_ids(text), sample.answers, 2)


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
        task: A key of ``LONGBENCH_MAX_NEW_TOKENS``.
        config: Where data and prompts are.
        encoder: The model's tokenizer.
        length: Tokens that prompt and answer may take together.
        num_samples: Only the first so many; None for all.
        key: Where ``config`` stands, for messages.

    Raises:
        DataError: data or prompts are missing, no access, or not the published ones.
    """
    path = prompt_file(f"{key}.prompts", config.prompts, LONGBENCH_PROMPT_FILES, "github.com/THUDM/LongBench")
    prompts = read_json_strings(path)
    check_prompts(f"{key}.prompts", path, prompts, {task: LONGBENCH_PROMPT_HASHES[task]})
    names = [f"{task}.jsonl", f"data/{task}.jsonl"]
    rows = read_rows(
        f"{key}.data", config.data, names, hub_file="data.zip", revision=config.revision
    )
    samples = tuple(
        _sample(task, row, prompts[task], encoder, length, f"{key}.data={config.data}, {task}")
        for row in rows[:num_samples]
    )
    return GenerationTask("longbench", task, length, samples, SCORES[task])


def _sample(
    task: str, row: dict[str, Any], template: str, encoder: PromptEncoder, length: int, place: str
) -> Sample:
    """One row as a question."""
    try:
        prompt = template.format(context=row["context"], input=row["input"])
        answers, classes = tuple(row["answers"]), row["all_classes"]
    except KeyError as error:
        raise DataError(f"{place}: a row has no field {error}; this is not LongBench v1") from None
    facts = {"classes": list(classes)} if classes else {}
    return cut_sample(
        encoder, prompt, answers, max_new_tokens=LONGBENCH_MAX_NEW_TOKENS[task], length=length, facts=facts
    )


def _trivia(sample: Sample, text: str) -> float:
    """The best F1 over the answers."""
    return max(token_f1(first_line(text), answer) for answer in sample.answers)


def _class(sample: Sample, text: str) -> float:
    """The class-list rule."""
    return max(
        class_score(first_line(text), answer, sample.facts["classes"]) for answer in sample.answers
    )


def _code(sample: Sample, text: str) -> float:
    """Similarity of the first line of code."""
    return max(code_line_score(text, answer) for answer in sample.answers)


SCORES: dict[str, Callable[[Sample, str], float]] = {
    "triviaqa": _trivia,
    "trec": _class,
    "lcc": _code,
    "repobench-p": _code,
}


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
            longbench_task(
                task,
                config.longbench,
                encoder,
                length=length,
                num_samples=count,
                key=f"{key}.longbench",
            )
        )
    for task in config.infinitebench.tasks:
        tasks.append(
            infinitebench_task(
                task,
                config.infinitebench,
                encoder,
                length=length,
                num_samples=count,
                key=f"{key}.infinitebench",
            )
        )
    for task in config.loft.tasks:
        tasks.append(
            loft_task(
                task, config.loft, encoder, length=length, num_samples=count, key=f"{key}.loft"
            )
        )
    return tasks
