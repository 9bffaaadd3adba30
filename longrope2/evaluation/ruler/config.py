"""Settings of RULER: which tasks, how many samples, whose prompts, and where the texts are."""

from dataclasses import dataclass, field
from enum import Enum

MAX_NEW_TOKENS = {
    "niah_single_1": 128, "niah_single_2": 128, "niah_single_3": 128, "niah_multikey_1": 128,
    "niah_multikey_2": 128, "niah_multikey_3": 128, "niah_multivalue": 128, "niah_multiquery": 128,
    "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32,
}  # fmt: skip
RULER_TASKS = tuple(MAX_NEW_TOKENS)
_SHORTEST_LENGTH = 256


class RulerMode(Enum):
    """Whose generators."""

    fixed = "fixed"
    upstream = "upstream"


@dataclass
class RulerConfig:
    """RULER (arXiv 2404.06654): 13 tasks of retrieval, tracing, counting and question answering."""

    mode: RulerMode = RulerMode.fixed
    """``fixed``: our wording, every key once, shuffled anew in every sample, depths spread
    evenly, BOS counted. ``upstream``: what NVIDIA/RULER generates, its known defects included;
    needs ``upstream_checkout``."""
    tasks: list[str] = field(default_factory=lambda: list(RULER_TASKS))
    """Tasks to run."""
    num_samples: int = 500
    """Samples of every task and length: 500 in RULER, 100 in the LongRoPE2 paper."""
    seed: int = 42
    """Seed of everything drawn; 42 is RULER's."""
    essays: str | None = None
    """File or folder of texts to hide needles in: ``*.txt``, or RULER's
    ``PaulGrahamEssays.json``. Null: the texts of the evaluation's corpus."""
    squad: str | None = None
    """SQuAD ``dev-v2.0.json`` for qa_1, or ``hub``."""
    hotpotqa: str | None = None
    """HotpotQA ``hotpot_dev_distractor_v1.json`` for qa_2, or ``hub``."""
    upstream_checkout: str | None = None
    """Checkout of github.com/NVIDIA/RULER, for ``mode=upstream``: its prompts are not shipped
    here."""
    template: str | None = None
    """What stands around prompts with ``mode=upstream``: ``base`` (nothing), a name of RULER's
    ``scripts/data/template.py``, or ``own`` (the model's own chat template). Null: nothing for a
    model without a chat template, else RULER's that fits it, else its own."""
    wordlists: str | None = None
    """Folder with wonderwords' ``nounlist.txt``, ``adjectivelist.txt`` and ``verblist.txt``, for
    ``mode=upstream``. Null: those of the installed package."""


def ruler_faults(
    config: RulerConfig, lengths: list[int], key: str = "evaluation.ruler"
) -> list[str]:
    """What is wrong with the values, each fault naming its key below ``key``."""
    tasks, known = config.tasks, ", ".join(RULER_TASKS)
    distinct = tasks and len(set(tasks)) == len(tasks) and set(tasks) <= set(RULER_TASKS)
    long_enough = lengths and min(lengths) >= _SHORTEST_LENGTH
    no_checkout = config.mode is RulerMode.upstream and config.upstream_checkout is None
    faults = {
        f"{key}.tasks={tasks} must be distinct names out of {known}": not distinct,
        f"{key}.num_samples={config.num_samples} must be at least 1": config.num_samples < 1,
        f"{key}: lengths={lengths} must all be at least {_SHORTEST_LENGTH} tokens, "
        "and at least one": not long_enough,
        f"{key}.squad is not set, which qa_1 needs: give SQuAD's dev-v2.0.json, `hub`, "
        "or leave qa_1 out of tasks": "qa_1" in tasks and config.squad is None,
        f"{key}.hotpotqa is not set, which qa_2 needs: give HotpotQA's "
        "hotpot_dev_distractor_v1.json, `hub`, "
        "or leave qa_2 out of tasks": "qa_2" in tasks and config.hotpotqa is None,
        f"{key}.template={config.template} is for mode=upstream; mode=fixed asks without: "
        "set it to null": config.template is not None and config.mode is RulerMode.fixed,
        f"{key}.upstream_checkout is not set, which mode=upstream needs: "
        "clone github.com/NVIDIA/RULER and give its path": no_checkout,
    }
    return [fault for fault, is_there in faults.items() if is_there]
