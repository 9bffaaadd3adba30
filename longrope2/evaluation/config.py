"""Settings of an evaluation: who is compared, by which suite, at which lengths, on how much.

The paper (Table 4) names short tasks but no shot counts. The harness is calibrated on the original
models first: what reproduces their published scores is what conf/suite/paper.yaml freezes.
"""

import importlib.metadata
import re
from dataclasses import dataclass, field
from pathlib import Path

from longrope2.config import MISSING, StageConfig, target_faults
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.haystacks import Haystack
from longrope2.corpora.needle_wording import Wording
from longrope2.corpora.run_corpus import corpus_of_run, missing_corpus
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.errors import ConfigError
from longrope2.evaluation.long_tasks import config as long
from longrope2.evaluation.needle_map import NeedleMapConfig, needle_map_faults
from longrope2.evaluation.ruler.config import RULER_TASKS, RulerConfig, ruler_faults
from longrope2.model.factors_source import RopeConfig
from longrope2.model.folder import given_folder
from longrope2.rope.methods import RopeMethod
from longrope2.tracking.metrics import TrackingConfig

LM_EVAL_SUITE = "lm_eval"
"""The suite that short tasks' scores belong to."""
INSTALL = "pip install '.[lm-eval]'"
_TASKS_BY_SUITE = {
    "ruler": (*RULER_TASKS, "average"), "needle_map": ("needle_map",),
    "longbench": long.LONGBENCH_TASKS, "infinitebench": long.INFINITEBENCH_TASKS,
    "loft": long.LOFT_TASKS,
}  # fmt: skip
"""Scores by length; those of ``lm_eval`` are lm-eval's own tasks and have no length."""
_SUBJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass
class ShortTaskConfig:
    """One task of lm-eval."""

    name: str = ""
    """Its name in our tables."""
    task: str = ""
    """Its name, or that of a group of tasks, in lm-eval."""
    metric: str = "acc,none"
    """Metric and filter, e.g. ``acc_norm,none`` or ``exact_match,flexible-extract``."""
    num_fewshot: int | None = None
    """Worked examples in front of each question; null is the task's own."""


@dataclass
class ShortTasksConfig:
    """Short tasks, all read with the RoPE side that each sequence's own length asks for."""

    tasks: list[ShortTaskConfig] = field(default_factory=list)
    """Tasks to run; none by default."""
    include_path: str | None = None
    """Folder with task files of your own for lm-eval."""
    data: str | None = None
    """Folder with the benchmarks' own files, for machines without access to the hub; what it must
    hold stands in ``short_task_files.py`` and is named where it is missing. Null: the hub, at
    commits that are named there too."""
    limit: int | None = None
    """Only the first so many questions of each task; null is all. The gate is not tried then."""


def short_task_faults(config: ShortTasksConfig) -> list[str]:
    """What is wrong with the values, each fault naming its key."""
    faults, key, names = [], "suite.short_tasks", [task.name for task in config.tasks]
    for index, task in enumerate(config.tasks):
        place = f"{key}.tasks[{index}]"
        if not task.name or not task.task or names.count(task.name) > 1:
            given = f"name={task.name!r} and task={task.task!r}"
            faults.append(f"{place}: {given} must be given, every name once")
        if task.metric.count(",") != 1:
            allowed = "METRIC,FILTER as lm-eval prints it, e.g. acc,none"
            faults.append(f"{place}.metric={task.metric!r} must be {allowed}")
        if task.num_fewshot is not None and task.num_fewshot < 0:
            faults.append(f"{place}.num_fewshot={task.num_fewshot} must be 0 or more, or null")
    if config.data is not None and not Path(config.data).is_dir():
        faults.append(f"{key}.data={config.data} is no folder; null reads the hub")
    if config.limit is not None and config.limit < 1:
        faults.append(f"{key}.limit={config.limit} must be at least 1, or null for all")
    if config.tasks and lm_eval_version() is None:
        faults.append(f"{key}.tasks needs lm-eval, which is not installed: {INSTALL}")
    return faults


def lm_eval_version() -> str | None:
    """Installed version of lm-eval."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    if lm_eval_version() is None:
        raise ConfigError([f"lm-eval is not installed: {INSTALL}"])


@dataclass
class CalibrationRule:
    """One score that the base model must reach before scores of extended ones are reported."""

    score: str = ""
    """``lm_eval/<task>`` or ``<suite>/<task>/<length>``, e.g. ``lm_eval/hellaswag`` or
    ``ruler/niah_single_1/4096``."""
    low: float = 0.0
    """Lowest score allowed, 0 to 100."""
    high: float = 100.0
    """Highest score allowed: far above the published value, the harness measures something else."""


@dataclass
class CalibrationConfig:
    """The gate on the base model."""

    rules: list[CalibrationRule] = field(default_factory=list)
    """Rules on scores that the suite measures; others are left aside and said to be."""
    required: bool = True
    """False reports extended models even if the base model breaks a rule, with a remark."""


@dataclass
class SuiteConfig:
    """What is run."""

    measures: bool = True
    """Needle perplexity, text perplexity and retention, as ``evaluation`` sets them."""
    lengths: list[int] | None = None
    """Lengths of RULER and the needle map in tokens; null is ``evaluation.lengths``."""
    base_beyond_window: bool = True
    """Whether the reference subject is asked beyond ``model.original_len`` too, where it is out of
    its depth."""
    ruler: RulerConfig | None = None
    needle_map: NeedleMapConfig | None = None
    long_tasks: long.LongTasksConfig = field(default_factory=long.LongTasksConfig)
    short_tasks: ShortTasksConfig = field(default_factory=ShortTasksConfig)

    @property
    def long_task_names(self) -> list[str]:
        """All long tasks."""
        groups = self.long_tasks
        return [*groups.longbench.tasks, *groups.infinitebench.tasks, *groups.loft.tasks]

    @property
    def limited(self) -> frozenset[str]:
        """Suites of which only a part of the samples is asked, but for RULER and the needle map."""
        parts = {LM_EVAL_SUITE} if self.short_tasks.limit is not None else set()
        if self.long_tasks.num_samples is not None:
            parts |= {"longbench", "infinitebench", "loft"}
        return frozenset(parts)

    @property
    def generates(self) -> bool:
        """Whether any part asks for answers."""
        return bool(self.ruler or self.needle_map or self.long_task_names)


def _suite_faults(suite: SuiteConfig, lengths: list[int], target_len: int) -> list[str]:
    """What is wrong with a suite, each fault naming its key; ``lengths`` as they will be used."""
    faults = []
    if not suite.measures and not suite.generates and not suite.short_tasks.tasks:
        way_out = "set suite.measures=true, or choose suite=paper or another one"
        faults.append(f"suite runs nothing: {way_out}")
    if suite.ruler is not None or suite.needle_map is not None:
        out_of_range = any(not 1 <= length <= target_len for length in lengths)
        if out_of_range or len(set(lengths)) < len(lengths):
            allowed = f"distinct lengths of at most target_len={target_len}"
            faults.append(f"suite.lengths={lengths} must be {allowed}")
    if suite.ruler is not None:
        faults += ruler_faults(suite.ruler, lengths, "suite.ruler")
    if suite.needle_map is not None:
        faults += needle_map_faults(suite.needle_map, lengths, "suite.needle_map")
    faults += long.long_task_faults(suite.long_tasks, target_len)
    return faults + short_task_faults(suite.short_tasks)


def calibration_faults(config: CalibrationConfig) -> list[str]:
    """Rules without a range, or on a score that no suite gives: they would never be broken."""
    faults = []
    for index, rule in enumerate(config.rules):
        key = f"calibration.rules[{index}]"
        if not rule.score or not 0 <= rule.low < rule.high <= 100:
            bounds = f"low={rule.low} below high={rule.high}, both 0 to 100"
            faults.append(f"{key}: score={rule.score!r} needs {bounds}")
        elif not _is_a_score(rule.score):
            form = f"{LM_EVAL_SUITE}/TASK, or SUITE/TASK/LENGTH with one of"
            known = f"{', '.join(_TASKS_BY_SUITE)} and one of its tasks"
            faults.append(f"{key}: no suite gives a score {rule.score!r}; write {form} {known}")
    return faults


def _is_a_score(name: str) -> bool:
    """Whether a name has the form of a score, with a suite and a task that exist."""
    suite, _, rest = name.partition("/")
    task, slash, length = rest.partition("/")
    if suite == LM_EVAL_SUITE:
        return bool(task) and not slash
    return task in _TASKS_BY_SUITE.get(suite, ()) and length.isdecimal() and int(length) > 0


@dataclass
class SubjectConfig:
    """One model to evaluate: the base weights with some RoPE rescaling, or a trained checkpoint."""

    name: str = MISSING
    """Row of the tables; letters, digits and ``_ . + -``."""
    rope: RopeConfig | None = None
    """Rescaling of the base model, untrained. Exactly one of ``rope`` and ``checkpoint`` is
    given."""
    checkpoint: str | None = None
    """Folder of a finished checkpoint (``.../3_checkpoints/final``) or of an export, which brings
    its own factors."""


@dataclass
class NeedleConfig:
    """Retrieval of a needle: exact match and perplexity of its value, by length and depth."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the needle stands: 0 is the start of the document, 1 its end."""
    samples_per_depth: int = 10
    """Samples of every length and depth (the paper's heat map has 10)."""
    haystack: Haystack = Haystack.books
    """``books`` (held-out text) or ``noise`` (RULER's repeated sentences): retrieval alone."""
    needles_per_haystack: int = 1
    """Needles hidden in one haystack and asked for one by one; must divide the samples of a length.
    1 is the paper. More cost little, as the haystack is read once for all; intervals then count
    haystacks."""
    seed: int = 7001
    """Seed of keys, values and haystacks; must differ from the search's."""
    wording: Wording = Wording.auto
    """``paper`` (the prompt of its Appendix C), ``short`` (fits a window of 128 tokens), or
    ``auto``: ``paper`` for models with an original window of at least 2,048 tokens, else
    ``short``."""


@dataclass
class PerplexityConfig:
    """Perplexity of the same held-out tokens by the length of the context before them."""

    num_windows: int = 16
    """Places in the text; each is scored at every length."""
    scored_tokens: int = 64
    """Tokens scored at each place, at the end of the window; at least two below the shortest
    length."""


@dataclass
class RetentionConfig:
    """Perplexity of held-out text inside the original window, against the base model's."""

    num_windows: int = 128
    """Windows of at most ``model.original_len`` tokens."""


@dataclass
class EvaluationConfig:
    """What is measured, and of whom."""

    subjects: list[SubjectConfig] = field(default_factory=list)
    """Models to compare, in the order of the tables."""
    reference: str = "base"
    """Subject that retention is relative to: the unscaled base model."""
    lengths: list[int] | None = None
    """Lengths in tokens; null is ``model.original_len`` doubled up to ``target_len``."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    batch_tokens: int = 8192
    """Tokens of one forward pass; a longer sample goes alone. Changes speed and memory only."""
    prefill_chunk: int = 2048
    """Tokens of a prompt that are read at a time before an answer; bounds the memory of
    activations."""
    decode_rows: int = 1
    """Answers decoded together. 1 gives the same answers whatever else is asked, bit for bit,
    and reads what prompts have in common once; more is faster on a GPU where answers are short
    of work, and may turn a tie."""
    shard: str = "1/1"
    """``i/n``: this process answers every n-th request, from the i-th on (Slurm arrays). Ranks
    of torchrun split a shard again. The run is summed up by the shard that finishes last."""
    workers: int = 0
    """Processes that generate samples; 0 works in this one. Changes no sample."""
    sample_cache: str = "runs/.samples"
    """Folder of generated samples, shared by all runs."""


@dataclass
class EvaluateRoot(StageConfig):
    """Configuration of ``launch.evaluate``."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    checkpoint: str | None = None
    """Folder of a finished checkpoint, or of an export, to evaluate beside the base model, instead
    of ``evaluation.subjects``."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    corpus: CorpusConfig | None = None
    """Where the held-out text comes from; null: the corpus of the run's own segments, so a run
    without segments must be given one."""

    @property
    def reads_text(self) -> bool:
        """Whether anything that is asked is made of held-out text; long and short tasks are not."""
        suite = self.suite
        return suite.measures or suite.ruler is not None or suite.needle_map is not None

    @property
    def text(self) -> CorpusConfig:
        """The corpus, once ``check`` has settled it."""
        assert self.corpus is not None
        return self.corpus


def evaluated_lengths(config: EvaluateRoot) -> list[int]:
    """Lengths in tokens, ascending: those given, or L0, 2 L0, 4 L0, ... up to and including L."""
    if config.evaluation.lengths is not None:
        return sorted(config.evaluation.lengths)
    lengths = [config.model.original_len]
    while lengths[-1] * 2 < config.target_len:
        lengths.append(lengths[-1] * 2)
    return [*lengths, config.target_len] if config.target_len > lengths[-1] else lengths


def suite_lengths(config: EvaluateRoot) -> list[int]:
    """Lengths of RULER and the needle map in tokens, ascending."""
    given = config.suite.lengths
    return evaluated_lengths(config) if given is None else sorted(given)


def use_checkpoint(config: EvaluateRoot) -> None:
    """Replace the subjects by the base model and ``checkpoint``, where one is given."""
    if config.checkpoint is not None:
        unscaled, name = RopeConfig(method=RopeMethod.none), config.evaluation.reference
        config.evaluation.subjects = [
            SubjectConfig(name=name, rope=unscaled),
            SubjectConfig(name="extended", checkpoint=config.checkpoint),
        ]


def check(config: EvaluateRoot) -> Path:
    """Every rule that crosses fields of an evaluation, before anything is read or written.

    Takes the corpus of the run's segments where none is given.

    Returns:
        The base model's local folder.

    Raises:
        ConfigError: all faults together, each naming its key.
        ArtifactError: the base model cannot be found.
        DataError: its tokenizer cannot be used.
    """
    if faults := settings_faults(config):
        raise ConfigError(faults)
    if config.reads_text and not _may_lack_corpus(config):
        config.corpus = corpus_of_run(config.corpus, config.run.folder)
    base_folder = given_folder(config.model, config.target_len)
    load_document_tokenizer(base_folder, config.model.document_start)
    return base_folder


def settings_faults(config: EvaluateRoot) -> list[str]:
    """Faults of the settings by themselves, and of the corpus that the run has or is given."""
    faults = [
        *_subject_faults(config.evaluation),
        *_range_faults(config.evaluation),
        *_length_faults(config),
        *_suite_faults(config.suite, suite_lengths(config), config.target_len),
        *calibration_faults(config.calibration),
    ]
    if config.reads_text and not _may_lack_corpus(config):
        try:
            corpus_of_run(config.corpus, config.run.folder)
        except ConfigError as error:
            faults += error.faults
    return faults


def _may_lack_corpus(config: EvaluateRoot) -> bool:
    """A dry run before packing names the corpus among what is missing."""
    return config.dry_run and missing_corpus(config.corpus, config.run.folder) is not None


def _subject_faults(evaluation: EvaluationConfig) -> list[str]:
    """Subjects that are missing, doubled, or name no model or two."""
    names, faults = [subject.name for subject in evaluation.subjects], []
    if not names:
        way_out = "list at least one {name, rope} or {name, checkpoint}"
        faults.append(f"evaluation.subjects is empty; {way_out}")
    elif evaluation.reference not in names:
        fault = f"evaluation.reference={evaluation.reference} is not among the subjects"
        faults.append(f"{fault}: {', '.join(names)}")
    for index, subject in enumerate(evaluation.subjects):
        key, name = f"evaluation.subjects[{index}]", subject.name
        if not _SUBJECT_NAME.fullmatch(name):
            faults.append(f"{key}.name={name!r} may hold letters, digits and _ . + - only")
        if name in names[:index]:
            faults.append(f"{key}.name={name} is used twice; give every subject its own name")
        if (subject.rope is None) == (subject.checkpoint is None):
            given = "both rope and checkpoint" if subject.rope else "neither rope nor checkpoint"
            faults.append(f"{key} ({name}) has {given}; give exactly one of them")
    return faults


def _range_faults(evaluation: EvaluationConfig) -> list[str]:
    positive = {
        "needle.samples_per_depth": evaluation.needle.samples_per_depth,
        "perplexity.num_windows": evaluation.perplexity.num_windows,
        "perplexity.scored_tokens": evaluation.perplexity.scored_tokens,
        "retention.num_windows": evaluation.retention.num_windows,
        "batch_tokens": evaluation.batch_tokens,
        "prefill_chunk": evaluation.prefill_chunk,
        "decode_rows": evaluation.decode_rows,
    }
    faults = [f"evaluation.{k}={v} must be at least 1" for k, v in positive.items() if v < 1]
    if evaluation.workers < 0:
        faults.append(f"evaluation.workers={evaluation.workers} must be at least 0")
    depths = evaluation.needle.depths
    if not depths or any(not 0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        allowed = "distinct numbers from 0 to 1, at least one"
        faults.append(f"evaluation.needle.depths={depths} must be {allowed}")
    num_samples, shared = len(depths) * evaluation.needle.samples_per_depth, evaluation.needle
    if shared.needles_per_haystack < 1 or num_samples % shared.needles_per_haystack:
        given = f"evaluation.needle.needles_per_haystack={shared.needles_per_haystack}"
        fault = f"{given} must be at least 1 and divide the {num_samples} samples of a length"
        faults.append(f"{fault} (evaluation.needle.depths times samples_per_depth)")
    return faults


def _length_faults(config: EvaluateRoot) -> list[str]:
    target = config.target_len
    if faults := target_faults(config.model, target):
        return faults
    lengths, scored = evaluated_lengths(config), config.evaluation.perplexity.scored_tokens
    out_of_range = any(not 2 <= length <= target for length in lengths)
    if not lengths or len(set(lengths)) < len(lengths) or out_of_range:
        allowed = f"distinct lengths from 2 to target_len={target}"
        return [f"evaluation.lengths={lengths} must be {allowed}"]
    if scored > lengths[0] - 2:
        allowed = f"at least 2 below the shortest length evaluated, {lengths[0]}"
        return [f"evaluation.perplexity.scored_tokens={scored} must be {allowed}"]
    return []
