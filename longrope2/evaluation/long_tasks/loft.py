"""LOFT's text retrieval: a corpus of passages, a few worked examples, and a query, all in one prompt.

All queries of a set share everything in front of the query, so the runner reads that once. Nothing is ever cut: a cut
corpus has lost passages that are asked for. Answers are scored by the first line with a list of ids: recall@1, and for
HotPotQA mrecall@2. A base model goes on with an example of its own behind its answer; that is never reached.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks.config import LoftConfig
from longrope2.evaluation.long_tasks.fitting import whole_sample
from longrope2.evaluation.long_tasks.rules import listed_ids, mrecall, recall
from longrope2.evaluation.long_tasks.sources import prompt_file, python_strings, read_rows
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask, Sample

__all__ = ["loft_task"]

COMMON_FILE, RETRIEVAL_FILE = "prompts/constants/common.py", "prompts/constants/retrieval.py"
REPOSITORY = "github.com/google-deepmind/loft"
NO_TITLE = "None"  # what upstream writes for a passage without one
REMOVED_WORDS = "childhood abuse"  # upstream's loader takes it out of every passage
# Examples name their passages before the ids: upstream turns its query format round for that.
TURNED = (("ID and TITLE", "TITLE and ID"), ("ID and CONTENT", "CONTENT and ID"))


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
    place, samples, queries = f"{key}.data={config.data}, {task}", [], parts[f"{config.split}_queries"][:num_samples]
    try:
        corpus = _corpus(parts["corpus"], place)
        numbers = {pid: str(number) for number, pid in enumerate(corpus)}
        opening = _opening(prompts, corpus, numbers, parts["few_shot_queries"])
        asked = [(row["query_text"].strip(), tuple(numbers[pid] for pid, _ in row["answers"])) for row in queries]
    except KeyError as error:
        raise DataError(f"{place}: {error} is in no passage or row; are corpus and queries of one LOFT set?") from None
    for text, gold in asked:
        query = prompts["test"] + prompts["query"].format(query=text) + "\n"
        samples.append(
            whole_sample(
                encoder, opening + query, gold, max_new_tokens=config.max_new_tokens, length=length, name=f"loft/{task}"
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
        raise DataError(f"{key}.prompts={config.prompts} is no checkout of {REPOSITORY}: {COMMON_FILE} is missing")
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
        raise DataError(f"{key}.prompts: {path} has no {error}; is it the retrieval prompts of {REPOSITORY}?") from None


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
    chunks += [prompts["passage"].format(pid=numbers[pid], **texts) for pid, texts in corpus.items()]
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
