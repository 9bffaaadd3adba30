"""All long tasks of a configuration: rows and templates become prompts that fit, with their scores.

- LongBench v1: TriviaQA, TREC (in-context learning), LCC and RepoBench-P (code completion). The
  middle of a prompt is cut out where it does not fit, as upstream does. Most are below 8k tokens,
  so they try the original RoPE as much as the rescaled one: every sample keeps its token count.
- InfiniteBench: retrieval of a value by its key (KV) and multiple choice about a book (En.MC), with
  upstream's templates for base models (the yarn-mistral set). Cut likewise: En.MC is longer than
  128k tokens on average, so for it the cut is part of the score, and in KV it may take the pair
  asked for away, which is reported beside the score.
- LOFT's text retrieval: a corpus of passages, a few worked examples, and a query. All queries of a
  set share everything in front of the query, which is read once. Nothing is ever cut: passages
  would be lost that are asked for. Answers are scored by the first line with a list of ids:
  recall@1, and for HotPotQA mrecall@2. What a base model adds behind its answer is not reached.

Shape legend: T = tokens of a prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks import config as settings
from longrope2.evaluation.long_tasks import rules, sources
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.samples import GenerationTask, Sample

_LONGBENCH_PROMPT_FILES = [
    f"{at}dataset2prompt.json" for at in ("LongBench/config/", "config/", "")
]
LONGBENCH_PROMPT_HASHES = {
    "trec": "0eff8bebdba99d91", "triviaqa": "00a802e6377e72fc",
    "lcc": "6a1f24cf0bb83cd9", "repobench-p": "ee9ec182ea5ffeb7",
}  # fmt: skip
_LONGBENCH_MAX_NEW_TOKENS = {"triviaqa": 32, "trec": 64, "lcc": 64, "repobench-p": 64}
_INFINITEBENCH_PROMPT_FILES = ("src/prompt.py", "prompt.py")
_INFINITEBENCH_TEMPLATE_SET = "yarn_mistral_templates"
INFINITEBENCH_PROMPT_HASHES = {
    "kv_retrieval": "afa97419dd69cd74", "longbook_choice_eng": "fddf5d8b4293a275",
}  # fmt: skip
_INFINITEBENCH_MAX_NEW_TOKENS = {"kv_retrieval": 50, "longbook_choice_eng": 40}
_LOFT_REPOSITORY = "github.com/google-deepmind/loft"
_LOFT_COMMON_FILE = "prompts/constants/common.py"
_LOFT_RETRIEVAL_FILE = "prompts/constants/retrieval.py"
# What upstream writes for a passage without a title, and what its loader takes out of every one.
_LOFT_NO_TITLE, _LOFT_REMOVED_WORDS = "None", "childhood abuse"
# Examples name their passages before the ids: upstream turns its query format round for that.
_LOFT_TURNED = (("ID and TITLE", "TITLE and ID"), ("ID and CONTENT", "CONTENT and ID"))

# By the task alone: no name is in two benchmarks.
_SCORES: dict[str, Callable[[Sample, str], float]] = {
    "triviaqa": lambda sample, text: _best(rules.token_f1, sample, rules.first_line(text)),
    "trec": lambda sample, text: _best(
        partial(rules.class_score, classes=sample.facts["classes"]), sample, rules.first_line(text)
    ),
    "lcc": lambda sample, text: _best(rules.code_line_score, sample, text),
    "repobench-p": lambda sample, text: _best(rules.code_line_score, sample, text),
    "kv_retrieval": lambda sample, text: rules.key_value_score(text, sample.answers[0]),
    "longbook_choice_eng": lambda sample, text: rules.choice_score(text, sample.answers),
    **dict.fromkeys(
        settings.LOFT_TASKS, lambda sample, text: _found(rules.recall, sample, text, 1)
    ),
    "hotpotqa": lambda sample, text: _found(rules.mrecall, sample, text, 2),
}


def long_tasks(
    config: settings.LongTasksConfig,
    encoder: PromptEncoder,
    target_len: int,
    key: str = "suite.long_tasks",
) -> list[GenerationTask]:
    """The tasks asked for, benchmark by benchmark; ``key`` is where ``config`` stands.

    All have ``target_len`` tokens for prompt and answer, unless ``config`` names fewer.

    Raises:
        DataError: data or prompts are missing, no access, or not the published ones; or a prompt
            that may not be cut does not fit.
    """
    length, tasks, bench = config.length or target_len, [], config.infinitebench
    fit = _Fit(encoder, length)
    for suite, names, make in (
        ("longbench", config.longbench.tasks, partial(_longbench, config.longbench)),
        ("infinitebench", bench.tasks, partial(_infinitebench, bench)),
        ("loft", config.loft.tasks, partial(_loft, config.loft)),
    ):
        for name in names:
            samples = make(name, fit, config.num_samples, f"{key}.{suite}")
            tasks.append(
                GenerationTask(suite, name, length, samples=tuple(samples), score=_SCORES[name])
            )
    return tasks


def _best(rule: Callable[[str, str], float], sample: Sample, text: str) -> float:
    return max(rule(text, answer) for answer in sample.answers)


def _found(rule: Callable[..., float], sample: Sample, text: str, k: int) -> float:
    return rule(rules.listed_ids(text), sample.answers, k)


@dataclass(frozen=True)
class _Fit:
    """Prompts as token ids that fit into ``length`` together with their answers; BOS counts."""

    encoder: PromptEncoder
    length: int

    def cut(
        self,
        prompt: str,
        answers: tuple[str, ...],
        max_new_tokens: int,
        needle: str | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Sample:
        """A prompt that keeps the first and the last half of the budget where it is too long.

        Upstream tokenizes both halves anew, which may move a token or two at the seam; here the ids
        themselves are cut. Whether ``needle``, which the answer needs, is left goes into the facts.

        Raises:
            DataError: the answer alone takes the whole length.
        """
        ids = self.encoder.bos_ids + self.encoder.encode_text(prompt)
        budget = self.length - max_new_tokens
        if budget < 2:
            fault = f"suite.long_tasks.length={self.length} leaves no room for a prompt"
            raise DataError(f"{fault}: an answer may take {max_new_tokens} tokens")
        half = budget // 2
        parts = [ids] if len(ids) <= budget else [ids[:half], ids[len(ids) - half :]]
        kept = [token_id for part in parts for token_id in part]
        known = (facts or {}) | {"prompt_tokens": len(kept), "tokens_cut": len(ids) - len(kept)}
        if needle is not None:
            decoded = [self.encoder.decode(part) for part in parts]
            known["needle_survived"] = any(needle in text for text in decoded)
        return Sample(np.array(kept, dtype=np.int32), answers, max_new_tokens, known)

    def whole(
        self, prompt: str, answers: tuple[str, ...], max_new_tokens: int, name: str
    ) -> Sample:
        """A prompt that upstream never cuts.

        Raises:
            DataError: it does not fit; says how many tokens it takes.
        """
        ids = self.encoder.bos_ids + self.encoder.encode_text(prompt)
        if len(ids) + max_new_tokens > self.length:
            fault = f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed"
            raise DataError(
                f"{name}: {fault} {self.length} tokens, and this benchmark is never cut: it would "
                "lose the passages asked for. Use a smaller size of it, or leave it out"
            )
        facts = {"prompt_tokens": len(ids), "tokens_cut": 0}
        return Sample(np.array(ids, dtype=np.int32), answers, max_new_tokens, facts)


def _longbench(
    config: settings.LongBenchConfig, task: str, fit: _Fit, num_samples: int | None, key: str
) -> list[Sample]:
    place, repository = f"{key}.prompts", "github.com/THUDM/LongBench"
    path = sources.prompt_file(place, config.prompts, _LONGBENCH_PROMPT_FILES, repository)
    prompts = sources.read_json_strings(path)
    sources.check_prompts(place, path, prompts, {task: LONGBENCH_PROMPT_HASHES[task]})
    names = [f"{task}.jsonl", f"data/{task}.jsonl"]
    hub = {"hub_file": "data.zip", "revision": config.revision}
    rows = sources.read_rows(f"{key}.data", config.data, names, **hub)
    new_tokens, samples = _LONGBENCH_MAX_NEW_TOKENS[task], []
    for row in rows[:num_samples]:
        try:
            prompt = prompts[task].format(context=row["context"], input=row["input"])
            answers, classes = tuple(row["answers"]), row["all_classes"]
        except KeyError as error:
            fault = f"{key}.data={config.data}, {task}: a row has no field {error}"
            raise DataError(f"{fault}; this is not LongBench v1") from None
        facts = {"classes": list(classes)} if classes else {}
        samples.append(fit.cut(prompt, answers, new_tokens, facts=facts))
    return samples


def _infinitebench(
    config: settings.InfiniteBenchConfig, task: str, fit: _Fit, num_samples: int | None, key: str
) -> list[Sample]:
    place, repository = f"{key}.prompts", "github.com/OpenBMB/InfiniteBench"
    path = sources.prompt_file(place, config.prompts, _INFINITEBENCH_PROMPT_FILES, repository)
    prompts = sources.python_strings(path).get(_INFINITEBENCH_TEMPLATE_SET, {})
    sources.check_prompts(place, path, prompts, {task: INFINITEBENCH_PROMPT_HASHES[task]})
    file, hub = f"{task}.jsonl", {"hub_file": f"{task}.jsonl", "revision": config.revision}
    rows = sources.read_rows(f"{key}.data", config.data, [file], **hub)
    make = _key_value if task == "kv_retrieval" else _choice
    try:
        return [make(row, prompts[task], fit) for row in rows[:num_samples]]
    except (KeyError, ValueError) as error:
        fault = f"{key}.data={config.data}, {task}: a row does not fit ({error})"
        raise DataError(f"{fault}; is it InfiniteBench?") from None


def _key_value(row: dict[str, Any], template: str, fit: _Fit) -> Sample:
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    prompt = template.format(context=row["context"], input=row["input"])
    new_tokens = _INFINITEBENCH_MAX_NEW_TOKENS["kv_retrieval"]
    return fit.cut(prompt, (answer,), new_tokens, needle=answer)


def _choice(row: dict[str, Any], template: str, fit: _Fit) -> Sample:
    names = [f"OPTION_{letter}" for letter in rules.CHOICES]
    options = dict(zip(names, row["options"], strict=True))
    question = row.get("question") or row["input"]
    prompt = template.format(context=row["context"], question=question, **options)
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    letter = rules.CHOICES[list(row["options"]).index(answer)]
    return fit.cut(prompt, (answer, letter), _INFINITEBENCH_MAX_NEW_TOKENS["longbook_choice_eng"])


def _loft(
    config: settings.LoftConfig, task: str, fit: _Fit, num_samples: int | None, key: str
) -> list[Sample]:
    prompts = _loft_prompts(task, config, key)
    place, asked = f"{key}.data={config.data}, {task}", f"{config.split}_queries"
    rows = {}
    for name in ("corpus", "few_shot_queries", asked):
        file = f"{task}/{config.size}/{name}.jsonl"
        # The ways in which people unpack the zips.
        names = [file, f"retrieval/{file}", f"data/retrieval/{file}"]
        rows[name] = sources.read_rows(f"{key}.data", str(config.data), names)
    try:
        corpus = _loft_corpus(rows["corpus"], place)
        numbers = {pid: str(number) for number, pid in enumerate(corpus)}
        opening = _loft_opening(prompts, corpus, numbers, rows["few_shot_queries"])
        samples = []
        for row in rows[asked][:num_samples]:
            query = prompts["query"].format(query=row["query_text"].strip())
            prompt = opening + prompts["test"] + query + "\n"
            gold = tuple(numbers[pid] for pid, _ in row["answers"])
            samples.append(fit.whole(prompt, gold, config.max_new_tokens, f"loft/{task}"))
        return samples
    except KeyError as error:
        fault = f"{place}: {error} is in no passage or row"
        raise DataError(f"{fault}; are corpus and queries of one LOFT set?") from None


def _loft_prompts(task: str, config: settings.LoftConfig, key: str) -> dict[str, str]:
    """The formats of one set, from the constants of upstream's retrieval prompts."""
    place, given = f"{key}.prompts", config.prompts
    path = sources.prompt_file(place, given, (_LOFT_RETRIEVAL_FILE,), _LOFT_REPOSITORY)
    common_path = Path(str(given)) / _LOFT_COMMON_FILE
    if not common_path.is_file():
        fault = f"{place}={given} is no checkout of {_LOFT_REPOSITORY}"
        raise DataError(f"{fault}: {_LOFT_COMMON_FILE} is missing")
    common = sources.python_strings(common_path)
    constants = sources.python_strings(path, common)
    try:
        name = constants["PROMPT_MAPPER"].get(task, task)
        query = constants["QUERY_FORMAT_SIMPLE"][name]
        for old, new in _LOFT_TURNED:
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
        fault = f"{place}: {path} has no {error}"
        raise DataError(f"{fault}; is it the retrieval prompts of {_LOFT_REPOSITORY}?") from None


def _loft_corpus(rows: list[dict[str, Any]], place: str) -> dict[str, dict[str, str]]:
    """Passage id -> title and text, in the order of the file."""
    corpus = {}
    for row in rows:
        passage = row["passage_text"].strip()
        if not passage:
            fault = f"{place}: passage {row['pid']} has no text"
            raise DataError(f"{fault}; LOFT ships this set without, run its preprocess.py first")
        title = (row.get("title_text") or "").strip() or _LOFT_NO_TITLE
        texts = {"title": title, "passage": passage}
        corpus[row["pid"]] = {k: v.replace(_LOFT_REMOVED_WORDS, "") for k, v in texts.items()}
    return corpus


def _loft_opening(
    prompts: Mapping[str, str],
    corpus: Mapping[str, Mapping[str, str]],
    numbers: Mapping[str, str],
    examples: list[dict[str, Any]],
) -> str:
    """All that stands in front of a query: instructions, the corpus, the worked examples."""
    passage, found = prompts["passage"], prompts["found"]
    chunks = [prompts["instruction"], prompts["format"]]
    chunks += [passage.format(pid=numbers[pid], **texts) for pid, texts in corpus.items()]
    for number, row in enumerate(examples, start=1):
        gold = [pid for pid, _ in row["answers"]]
        query = prompts["query"].format(query=row["query_text"].strip())
        chunks.append(prompts["example"].format(example_id=number) + query)
        chunks += [found.format(pid=numbers[pid], **corpus[pid]) for pid in gold]
        chunks.append(prompts["answer"].format(final_answer=[numbers[pid] for pid in gold]))
    return "".join(f"{chunk}\n" for chunk in chunks)
