"""How each part of a suite is asked, and what in it is not as the paper asks (arXiv 2502.20082).

A score says something beside another one only if both were asked alike: the same wording inside the
same template, the same tasks on the same items. That is part of the result. What differs is named,
and where something does, there is no verdict. The paper says nothing of RULER's wording, of
templates, shot counts and revisions: RULER's own generators, the templates that RULER has for a
model, the settings of ``suite=short`` and the data of today stand for it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope2.evaluation.config import (
    EvaluateRoot,
    ShortTasksConfig,
    lm_eval_version,
    suite_lengths,
)
from longrope2.evaluation.long_tasks import config as long
from longrope2.evaluation.needle_map import MapHaystack, NeedleMapConfig
from longrope2.evaluation.ruler import qa
from longrope2.evaluation.ruler.config import RULER_TASKS, RulerConfig, RulerMode
from longrope2.evaluation.ruler.template import BASE, choose_template
from longrope2.evaluation.schema import Protocol
from longrope2.evaluation.short_task_files import TRUTHFULQA_LISTS, TRUTHFULQA_TABLE
from longrope2.files.artifacts import sha256_of_bytes

LONG_SUITES = ("longbench", "infinitebench")
_LONG_TASKS = (*long.INFINITEBENCH_TASKS, *long.LONGBENCH_TASKS)
# lm-eval's task, its metric and the number of worked examples, by our name: those of suite=short.
SHORT_TASKS: dict[str, tuple[str, str, int]] = {
    "mmlu": ("mmlu", "acc,none", 5),
    "mmlu_pro": ("mmlu_pro", "exact_match,custom-extract", 5),
    "hellaswag": ("hellaswag", "acc_norm,none", 10),
    "truthfulqa": ("truthfulqa_mc2", "acc,none", 0),
    "gsm8k": ("gsm8k_cot", "exact_match,flexible-extract", 8),
}
_HASH_DIGITS = 8


def protocols(config: EvaluateRoot, tokenizer: Any) -> tuple[Protocol, ...]:
    """That of every part which a suite asks by generation or through lm-eval.

    Raises:
        DataError: RULER's checkout or a file of questions cannot be read.
        ConfigError: a template that there is not.
    """
    suite, lengths, found = config.suite, suite_lengths(config), []
    if suite.ruler is not None:
        found.append(_ruler(suite.ruler, lengths, tokenizer))
    if suite.needle_map is not None:
        found.append(_needle_map(suite.needle_map, lengths))
    groups, length = suite.long_tasks, suite.long_tasks.length or config.target_len
    if groups.loft.tasks:
        found.append(_loft(groups, length))
    if groups.longbench.tasks or groups.infinitebench.tasks:
        found.append(_long(groups, length))
    if suite.short_tasks.tasks:
        found.append(_short(suite.short_tasks))
    label = _tokenizer_label(tokenizer)
    return tuple(replace(protocol, facts=(*protocol.facts, label)) for protocol in found)


def basis_of(protocol: Protocol) -> str:
    """Comparable or not, why not, and how it is asked, on one line."""
    judged = "comparable with the paper"
    if protocol.differs:
        judged = f"not comparable with the paper ({'; '.join(protocol.differs)})"
    return f"{judged}: {', '.join(protocol.facts)}"


def _tokenizer_label(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return f"tokenizer {sha256_of_bytes(identity.encode())[:_HASH_DIGITS]} of {len(tokenizer):,}"


def _ruler(config: RulerConfig, lengths: Sequence[int], tokenizer: Any) -> Protocol:
    upstream = config.mode is RulerMode.upstream
    differs = []
    if not upstream:
        differs.append("our own wording (RULER's is suite.ruler.mode=upstream)")
    template = choose_template(config, tokenizer) if upstream else None
    if template is not None and template.name == BASE and getattr(tokenizer, "chat_template", None):
        differs.append("a chat model asked without its template (suite.ruler.template=base)")
    if len(config.tasks) < len(RULER_TASKS):
        differs.append(f"{len(config.tasks)} of RULER's {len(RULER_TASKS)} tasks")
    if upstream and config.essays is not None:
        differs.append(f"essays of {config.essays}, not of the checkout")
    sources, other_data = _questions(config)
    facts = [
        "RULER's wording" if upstream else "our own wording",
        template.label if template is not None else "no chat template",
        f"{len(config.tasks)} tasks",
        f"{config.num_samples} samples each",
        f"seed {config.seed}",
        *sources,
        _lengths_label(lengths),
    ]
    return Protocol("ruler", tuple(facts), tuple(differs + other_data))


def _questions(config: RulerConfig) -> tuple[list[str], list[str]]:
    """Which questions qa_1 and qa_2 have, and which of them are not the official files'."""
    facts, differs = [], []
    for task, name, source, hub in (
        ("qa_1", "SQuAD", config.squad, qa.SQUAD_HUB),
        ("qa_2", "HotpotQA", config.hotpotqa, qa.HOTPOTQA_HUB),
    ):
        if task not in config.tasks:
            continue
        if source == qa.HUB:
            facts.append(f"{name} {hub}@{qa.HUB_REVISIONS[hub][:_HASH_DIGITS]}")
            continue
        found = qa.read_questions(task, config)
        facts.append(f"{name} of {len(found.questions):,} questions, {found.sha256[:_HASH_DIGITS]}")
        if len(found.questions) != qa.NUM_QUESTIONS[task]:
            official = f"{qa.NUM_QUESTIONS[task]:,}"
            differs.append(f"{name} of {len(found.questions):,} questions instead of {official}")
    return facts, differs


def _needle_map(config: NeedleMapConfig, lengths: Sequence[int]) -> Protocol:
    differs = ["our own wording, and the paper's Figure 6 prints no numbers"]
    if config.haystack is not MapHaystack.essay:
        differs.append("needles in noise instead of text")
    papers = NeedleMapConfig()
    if (len(config.depths), config.repeats) != (len(papers.depths), papers.repeats):
        differs.append(f"{config.repeats} needles at {len(config.depths)} depths instead of 10, 11")
    facts = ["our own wording", f"{config.repeats} needles at {len(config.depths)} depths"]
    facts += [f"in {config.haystack.value}", _lengths_label(lengths)]
    return Protocol("needle_map", tuple(facts), tuple(differs))


def _loft(groups: long.LongTasksConfig, length: int) -> Protocol:
    config, differs = groups.loft, _subset(groups, groups.loft.tasks, long.LOFT_TASKS, "LOFT's")
    papers = long.LoftConfig()
    if (config.size, config.split) != (papers.size, papers.split):
        asked = f"size {config.size}, split {config.split}"
        differs.append(f"{asked} instead of {papers.size}, {papers.split}")
    facts = ["LOFT's prompts", f"{len(config.tasks)} sets, size {config.size}, {config.split}"]
    facts.append(f"answers of {config.max_new_tokens} tokens")
    facts.append(f"at {length:,} tokens")
    return Protocol("loft", tuple(facts), tuple(differs))


def _long(groups: long.LongTasksConfig, length: int) -> Protocol:
    tasks = [*groups.infinitebench.tasks, *groups.longbench.tasks]
    differs = _subset(groups, tasks, _LONG_TASKS, "the paper's")
    facts = [f"{', '.join(tasks)}, upstream's prompts, cut in the middle at {length:,} tokens"]
    for name, chosen, revision in (
        ("InfiniteBench", groups.infinitebench, long.INFINITEBENCH_REVISION),
        ("LongBench", groups.longbench, long.LONGBENCH_REVISION),
    ):
        if not chosen.tasks:
            continue
        if Path(chosen.data).exists():
            facts.append(f"{name} of {chosen.data}")
            continue
        facts.append(f"{name}@{chosen.revision[:_HASH_DIGITS]}")
        if chosen.revision != revision:
            differs.append(f"{name} of another revision than {revision[:_HASH_DIGITS]}")
    return Protocol("long", tuple(facts), tuple(differs))


def _subset(
    groups: long.LongTasksConfig, tasks: Sequence[str], papers: Sequence[str], whose: str
) -> list[str]:
    """What is left out of a group of long tasks."""
    differs = []
    if len(tasks) < len(papers):
        differs.append(f"{len(tasks)} of {whose} {len(papers)} tasks")
    if groups.num_samples is not None:
        differs.append(f"the first {groups.num_samples} samples of each task alone")
    return differs


def _short(config: ShortTasksConfig) -> Protocol:
    differs = []
    named = {task.name: (task.task, task.metric, task.num_fewshot) for task in config.tasks}
    if missing := [name for name in SHORT_TASKS if name not in named]:
        differs.append(f"without {', '.join(missing)}")
    for name, found in named.items():
        if name in SHORT_TASKS and found != SHORT_TASKS[name]:
            asked, usual = (" ".join(map(str, one)) for one in (found, SHORT_TASKS[name]))
            differs.append(f"{name} by {asked} shots instead of {usual}")
    if config.limit is not None:
        differs.append(f"the first {config.limit} questions of each task alone")
    shots = ", ".join(f"{name} {shots}" for name, (_, _, shots) in named.items())
    source = "hub data at named commits" if config.data is None else f"files of {config.data}"
    facts = [f"lm-eval {lm_eval_version()}", f"shots: {shots}", source]
    if config.data is not None and "truthfulqa" in named:
        lists, table = (Path(config.data) / name for name in (TRUTHFULQA_LISTS, TRUTHFULQA_TABLE))
        if table.is_file() and not lists.is_file():
            differs.append(f"truthfulqa's lists made of {TRUTHFULQA_TABLE}")
    if config.include_path is not None:
        facts.append(f"tasks of {config.include_path}")
        differs.append("task files of suite.short_tasks.include_path")
    return Protocol("short", tuple(facts), tuple(differs))


def _lengths_label(lengths: Sequence[int]) -> str:
    return f"at {', '.join(f'{length:,}' for length in lengths)} tokens"
