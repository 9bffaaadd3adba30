"""Settings of the long tasks: which, and where their data and prompts are."""

from dataclasses import dataclass, field

LONGBENCH_TASKS = ("triviaqa", "trec", "lcc", "repobench-p")
INFINITEBENCH_TASKS = ("kv_retrieval", "longbook_choice_eng")
LOFT_TASKS = ("arguana", "fever", "hotpotqa", "msmarco", "nq", "quora", "scifact")

LONGBENCH_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
INFINITEBENCH_REVISION = "90f0394333616266d9fe85824ceaf505093cbaa5"


@dataclass
class LongBenchConfig:
    """LongBench v1 (arXiv 2308.14508)."""

    tasks: list[str] = field(default_factory=list)
    """Out of triviaqa, trec, lcc, repobench-p; empty runs none."""
    data: str = "THUDM/LongBench"
    """Folder or zip with ``<task>.jsonl``, or the hub data set, whose ``data.zip`` holds them."""
    revision: str = LONGBENCH_REVISION
    """Commit of the hub data set."""
    prompts: str | None = None
    """Checkout of github.com/THUDM/LongBench, or its ``dataset2prompt.json``."""


@dataclass
class InfiniteBenchConfig:
    """InfiniteBench (arXiv 2402.13718)."""

    tasks: list[str] = field(default_factory=list)
    """Out of kv_retrieval, longbook_choice_eng; empty runs none."""
    data: str = "xinrongzhang2022/InfiniteBench"
    """Folder or zip with ``<task>.jsonl``, or the hub data set."""
    revision: str = INFINITEBENCH_REVISION
    """Commit of the hub data set, which was changed once."""
    prompts: str | None = None
    """Checkout of github.com/OpenBMB/InfiniteBench, or its ``src/prompt.py``."""


@dataclass
class LoftConfig:
    """Text retrieval of LOFT (arXiv 2406.13121): the whole corpus stands in the prompt."""

    tasks: list[str] = field(default_factory=list)
    """Out of arguana, fever, hotpotqa, msmarco, nq, quora, scifact; empty runs none."""
    data: str | None = None
    """Folder with ``<task>/<size>/`` (unpacked from LOFT's zips, msmarco and quora filled in by its
    preprocess.py)."""
    size: str = "128k"
    """``32k``, ``128k`` or ``1m``: the authors' token counts."""
    split: str = "test"
    """``test`` (100 queries) or ``dev`` (10)."""
    max_new_tokens: int = 512
    """Tokens of an answer: the passages found are named before the list of their ids, which alone
    is scored."""
    prompts: str | None = None
    """Checkout of github.com/google-deepmind/loft."""


@dataclass
class LongTasksConfig:
    """Long tasks by benchmark, all at ``length``."""

    length: int | None = None
    """Tokens that prompt and answer may take; null is ``target_len``."""
    num_samples: int | None = None
    """Only the first so many samples of each task; null is all."""
    longbench: LongBenchConfig = field(default_factory=LongBenchConfig)
    infinitebench: InfiniteBenchConfig = field(default_factory=InfiniteBenchConfig)
    loft: LoftConfig = field(default_factory=LoftConfig)


def long_task_faults(
    config: LongTasksConfig, target_len: int, key: str = "suite.long_tasks"
) -> list[str]:
    """What is wrong with the values, each fault naming its key below ``key``."""
    loft, length, count = config.loft, config.length, config.num_samples
    faults: dict[str, bool] = {}
    for name, chosen, known in (
        ("longbench", config.longbench, LONGBENCH_TASKS),
        ("infinitebench", config.infinitebench, INFINITEBENCH_TASKS),
        ("loft", loft, LOFT_TASKS),
    ):
        tasks, place, allowed = chosen.tasks, f"{key}.{name}", ", ".join(known)
        distinct = len(set(tasks)) == len(tasks) and set(tasks) <= set(known)
        no_prompts = bool(tasks) and chosen.prompts is None
        faults |= {
            f"{place}.tasks={tasks} must be distinct names out of {allowed}": not distinct,
            f"{place}.prompts is not set: its prompts are read from a checkout of the "
            "benchmark": no_prompts,
        }
    bad_length = length is not None and not 1 <= length <= target_len
    bad_count = count is not None and count < 1
    bad_size = loft.size not in ("32k", "128k", "1m") or loft.split not in ("test", "dev")
    no_data = bool(loft.tasks) and loft.data is None
    too_few, given = loft.max_new_tokens < 1, f"{loft.size}, {loft.split}"
    faults |= {
        f"{key}.length={length} must be from 1 to target_len={target_len}": bad_length,
        f"{key}.num_samples={count} must be at least 1, or null for all": bad_count,
        f"{key}.loft.data is not set; give the folder that LOFT's zips were unpacked into": no_data,
        f"{key}.loft.size must be 32k, 128k or 1m, and split test or dev; got {given}": bad_size,
        f"{key}.loft.max_new_tokens={loft.max_new_tokens} must be at least 1": too_few,
    }
    return [fault for fault, is_there in faults.items() if is_there]
