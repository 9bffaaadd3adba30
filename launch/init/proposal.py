"""What an experiment should say for a model, documents and a machine, each value with its reason.

Nothing here is tuned: learning rates lie between the two that this project has used, sizes follow
from what there is, and the paper's recipe is the upper limit of each.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import psutil
import torch

from launch.init.needles import NeedleTrial, try_needles
from launch.init.survey import DocumentFacts, InitRoot, ModelFacts
from longrope2.config import ModelConfig, RunConfig
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.losses import named_files
from longrope2.errors import ConfigError, DataError
from longrope2.model.shape import Workload
from longrope2.parallel.dims import head_faults
from longrope2.planning.choice import choose_layout
from longrope2.planning.hardware import HardwareConfig, Machine, find_gpu, make_machine
from longrope2.planning.memory import Layout, Recompute, ZeroBuffers, predict_memory

# The paper's step, and the number of steps below which a step is made smaller.
_MOST_SEGMENTS, _WANTED_STEPS = 64, 100
# Of what is packed: below this a window kind is made up from the other.
_LEAST_SHARE, _SPLIT_SHARE = 0.1, 0.3
_HELDOUT_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
# Haystacks are halved, and joined from documents with a start and an end of their own.
_HAYSTACKS = 2.5
_SCORED_TOKENS, _MOST_WINDOWS, _MOST_SHORT_WINDOWS, _LEAST_WINDOWS = 64, 16, 128, 4
# Parameters and learning rates of the paper's LLaMA3-8B and of the miniature.
_PAPER, _MINIATURE = (8.03e9, 2e-5), (1.1e6, 1e-3)
_USABLE_MEMORY = 0.7


@dataclass(frozen=True)
class Value:
    """A key of the experiment."""

    value: Any
    reason: str = ""


@dataclass
class Proposal:
    """An experiment: groups and keys in the order in which they are written."""

    choices: dict[str, Value] = field(default_factory=dict)
    """Group -> member."""
    keys: dict[str, Value] = field(default_factory=dict)
    """Dotted key -> value."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know of it, each with a remedy."""

    def keep_given(self, section: str, given: Any, default: Any) -> None:
        """Keys of a section that the user set and that are not said yet."""
        for name, value in vars(given).items():
            key, plain = f"{section}.{name}", value.value if isinstance(value, Enum) else value
            if key not in self.keys and value != getattr(default, name):
                self.keys[key] = Value(plain, "as given")


@dataclass(frozen=True)
class Mix:
    """What packing will find, in tokens of the whole corpus."""

    short: int
    long: int
    retrieval: int
    splits: bool
    """Whether long documents are cut into short ones."""

    def segments(self, target_len: int) -> tuple[int, int]:
        """Short and long segments: whole ones, one less each for what fills none."""
        return self.short // target_len, (self.long + self.retrieval) // target_len


def propose(config: InitRoot, model: ModelFacts, documents: DocumentFacts) -> Proposal:
    """Values that work together.

    Raises:
        DataError: the documents are too few for any training.
        ConfigError: no layout of the machine can hold the training.
    """
    made = Proposal()
    config.corpus.heldout_fraction = share = _heldout_share(config, documents)
    mix = _mix(config, documents, share, made)
    layout, segments = _layout(config, model, mix)
    steps = _steps(mix, config.target_len, layout, segments)
    _say_model(made, config, model)
    _say_documents(made, config, documents, share=share, mix=mix, layout=layout)
    _say_training(made, config, model, layout=layout, segments=segments, steps=steps)
    _say_search(made, config, try_needles(config, model))
    _say_evaluation(made, config, documents.heldout(share))
    return made


def _room(tokens_D: np.ndarray, length: int) -> int:
    """Places in documents at which ``_SCORED_TOKENS`` can be scored behind ``length`` tokens."""
    room_D = (tokens_D - length + 1) // _SCORED_TOKENS + 1
    return int(room_D[tokens_D >= length].sum())


def _heldout_share(config: InitRoot, documents: DocumentFacts) -> float:
    """The smallest share that search and evaluation can work with.

    Raises:
        DataError: no share holds out enough.
    """
    target, asked = config.target_len, config.corpus.heldout_fraction
    for share in (asked, *(share for share in _HELDOUT_SHARES if share > asked)):
        held = documents.heldout(share)
        windows = held.sum() // config.model.original_len
        if held.sum() >= _HAYSTACKS * target and windows >= _LEAST_WINDOWS:
            return share
    need, there = math.ceil(_HAYSTACKS * target), int(documents.tokens_D.sum())
    raise DataError(
        f"corpus.folder={config.corpus.folder} holds {there:,} tokens in "
        f"{len(documents.tokens_D):,} documents; half of them held out are less than the {need:,} "
        f"that search and evaluation need at target_len={target}; give more text, or a smaller "
        "target_len"
    )


def _mix(config: InitRoot, documents: DocumentFacts, share: float, made: Proposal) -> Mix:
    """Short and long tokens for packing, made up where a kind is missing.

    Raises:
        DataError: less than two segments of text.
    """
    original, target = config.model.original_len, config.target_len
    tokens_D = documents.train(share)
    is_short_D = tokens_D <= original
    short, long = (
        int(tokens_D[kind].sum() * documents.scale) for kind in (is_short_D, ~is_short_D)
    )
    total = short + long
    if total < 4 * target:
        raise DataError(
            f"corpus.folder={config.corpus.folder}: {total:,} tokens are left to train on, less "
            f"than 4 segments of target_len={target}; give more text, or a smaller target_len"
        )
    fits = f"of at most model.original_len={original} tokens"
    if short < max(_LEAST_SHARE * total, 2 * target):
        made.warnings.append(
            f"{np.count_nonzero(is_short_D):,} of {len(tokens_D):,} documents are short, {fits}: "
            f"long ones are cut for the short window (short_overlong=split, {_SPLIT_SHARE:.0%} of "
            "the tokens); more short text would serve it better"
        )
        cut = round(_SPLIT_SHARE * total)
        return Mix(cut, total - cut, retrieval=0, splits=True)
    if long < max(_LEAST_SHARE * total, 2 * target):
        made_up = round(total / 2)
        made.warnings.append(
            f"{np.count_nonzero(~is_short_D):,} of {len(tokens_D):,} documents are long, above "
            f"model.original_len={original} tokens: {made_up:,} tokens of generated retrieval "
            "documents fill the long window (quotas.retrieval.long); long text would serve it "
            "better"
        )
        return Mix(short, long, retrieval=made_up, splits=False)
    return Mix(short, long, retrieval=0, splits=False)


def _layout(config: InitRoot, model: ModelFacts, mix: Mix) -> tuple[Layout, int]:
    """How processes work together, and the segments of a step.

    Raises:
        ConfigError: no layout holds the training in memory.
    """
    target, per_kind = config.target_len, mix.segments(config.target_len)
    wanted = max(1, min(_MOST_SEGMENTS, sum(per_kind) // _WANTED_STEPS))
    hardware, processes = _machine(config)
    # Each kind must fill a group of the data-parallel size.
    most = max(1, min(per_kind))
    if hardware is not None:
        for segments in _step_sizes(wanted, hardware.num_gpus, most):
            work = Workload(target, segments * target, sum(per_kind) * target, 0.7, target / 2)
            best = choose_layout(model.shape, work, hardware, ZeroBuffers(), (1,)).best
            if best is not None and best.layout.data <= most:
                return best.layout, segments
        raise ConfigError([_no_room(config, f"{hardware.num_gpus} {hardware.name}")])
    is_gpu = torch.cuda.is_available()
    for layout in _layouts_of(processes, model, target, prefers_sequence=is_gpu, bf16=is_gpu):
        segments = -(-wanted // layout.data) * layout.data
        work = Workload(target, segments * target, sum(per_kind) * target, 0.7, target / 2)
        if layout.data <= most and (is_gpu or _fits_here(model, work, layout)):
            return layout, segments
    raise ConfigError([_no_room(config, f"{processes} processes of this machine")])


def _machine(config: InitRoot) -> tuple[Machine | None, int]:
    """A machine that the planner knows, and the number of processes."""
    hardware, processes = config.hardware, config.processes
    if hardware is not None:
        return make_machine(hardware, processes), processes or hardware.num_gpus
    gpus = torch.cuda.device_count()
    kind = find_gpu(torch.cuda.get_device_name(0)) if gpus else None
    if kind is None:
        return None, processes or gpus or 1
    here = HardwareConfig(gpu=kind, num_gpus=processes or gpus, gpus_per_node=gpus)
    return make_machine(here), processes or gpus


def _step_sizes(wanted: int, processes: int, most: int) -> list[int]:
    """Segments of a step to try: multiples of the possible data-parallel sizes."""
    sizes = [n for n in range(1, processes + 1) if processes % n == 0 and n <= most]
    return sorted({-(-wanted // data) * data for data in sizes}, reverse=True)


def _layouts_of(
    processes: int, model: ModelFacts, target: int, *, prefers_sequence: bool, bf16: bool
) -> Iterable[Layout]:
    """Allowed layouts, by preference: CPUs share no segment unless they must."""
    shape = model.shape
    sizes = [n for n in range(1, processes + 1) if processes % n == 0 and target % n == 0]
    allowed = [n for n in sizes if not head_faults(n, shape.num_heads, shape.num_kv_heads)]
    for recompute in (Recompute.none, Recompute.dense, Recompute.full):
        for sequence in sorted(allowed, reverse=prefers_sequence):
            yield Layout(processes // sequence, sequence, recompute, bf16=bf16)


def _fits_here(model: ModelFacts, work: Workload, layout: Layout) -> bool:
    """Whether all processes find room in this machine's memory."""
    room = _USABLE_MEMORY * psutil.virtual_memory().available
    return predict_memory(model.shape, work, layout).peak * layout.num_processes <= room


def _no_room(config: InitRoot, machine: str) -> str:
    return (
        f"no layout of {machine} can train this model at target_len={config.target_len} on these "
        "documents (memory, or too few segments for so many processes); give fewer processes=N, "
        "a smaller target_len, more text, or another machine, e.g. hardware=h200_64; "
        "`python -m launch.plan` says what a machine holds"
    )


def _steps(mix: Mix, target: int, layout: Layout, segments: int) -> int:
    """Steps of one pass."""
    groups = sum(count // layout.data for count in mix.segments(target))
    return max(1, groups * layout.data // segments)


def _say_model(made: Proposal, config: InitRoot, model: ModelFacts) -> None:
    shape, keys = model.shape, made.keys
    made.choices["model"] = Value("custom")
    heads = f"{shape.num_heads} query and {shape.num_kv_heads} key/value heads"
    size = f"{shape.parameters / 1e6:,.1f} M parameters, {heads} of {shape.head_dim} channels"
    keys["run.name"] = Value(config.run.name, "folder of all products, below run.root")
    made.keep_given("run", config.run, RunConfig())
    if config.seed:
        keys["seed"] = Value(config.seed, "as given")
    keys["model.name"] = Value(config.model.name)
    keys["model.path"] = Value(config.model.path, size)
    keys["model.original_len"] = Value(model.window, f"window, {model.window_source}")
    start = "BOS" if model.encoder.start_ids else "nothing"
    keys["model.document_start"] = Value(
        config.model.document_start.value,
        f"this tokenizer puts {start} in front of a text; a document ends with EOS",
    )
    made.keep_given("model", config.model, ModelConfig())
    keys["target_len"] = Value(
        config.target_len, f"as asked for: {config.target_len // model.window} times the window"
    )


def _say_documents(
    made: Proposal,
    config: InitRoot,
    documents: DocumentFacts,
    *,
    share: float,
    mix: Mix,
    layout: Layout,
) -> None:
    tokens_D, keys, original = documents.tokens_D, made.keys, config.model.original_len
    made.choices["corpus"] = Value("folder")
    quarters = np.percentile(tokens_D, [0, 25, 50, 75, 100]).round().astype(int)
    files = ", ".join(f"{count} {ending}" for ending, count in sorted(documents.endings.items()))
    whole = "" if documents.scale == 1 else f", of which 1 / {documents.scale:.3g} was read"
    keys["corpus.folder"] = Value(
        config.corpus.folder,
        f"files: {files}{whole}; {len(tokens_D):,} documents read, {tokens_D.sum():,} tokens: "
        f"shortest {quarters[0]:,}, quarters {quarters[1]:,} / {quarters[2]:,} / {quarters[3]:,}, "
        f"longest {quarters[4]:,}; {np.mean(tokens_D <= original):.0%} of the documents and "
        f"{tokens_D[tokens_D <= original].sum() / tokens_D.sum():.0%} of the tokens fit the window",
    )
    if endings := config.corpus.more_text_endings:
        keys["corpus.more_text_endings"] = Value(endings, "plain text too, a document a file")
    if documents.ignored:
        counts = ", ".join(f"{count} {ending}" for ending, count in documents.ignored.items())
        made.warnings.append(
            f"files that are not read: {counts}; those that are plain text can be, with "
            "corpus.more_text_endings=[.ENDING]"
        )
    made.warnings += _left_out(documents)
    held = documents.heldout(share)
    keys["corpus.heldout_fraction"] = Value(
        share,
        f"for search and evaluation: {len(held):,} documents, {held.sum():,} tokens, at least "
        f"{_HAYSTACKS:g} times target_len",
    )
    made.keep_given("corpus", config.corpus, CorpusConfig(name="folder", kind=CorpusKind.folder))
    if mix.splits:
        keys["short_overlong"] = Value("split", "too few documents fit the window")
        keys["quotas.folder"] = Value(
            {"short": mix.short, "long": mix.long}, "of the tokens that are there"
        )
    if mix.retrieval:
        keys["quotas.retrieval"] = Value(
            {"short": 0, "long": mix.retrieval}, "too few documents are longer than the window"
        )
    if original >= 200_000:
        keys["documents.max_tokens"] = Value(2 * config.target_len, "above the window")
    sequence = layout.sequence
    keys["align"] = Value(
        sequence if config.target_len // sequence >= original else 1,
        "parallel.sequence: short documents end inside a process's share",
    )


def _left_out(documents: DocumentFacts) -> list[str]:
    """What of the folder no stage will read, besides other endings; lines of the proposal."""
    lines = []
    if aside := documents.aside:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(aside.items()))
        lines.append(f"not read either: {counts}")
    if losses := documents.losses:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(losses.items()))
        lines.append(f"records that cannot be used: {counts}")
    damaged = named_files(losses.files, "data_prep.pack names all of them")
    return lines + [f"damaged: {line}" for line in damaged]


def _say_training(
    made: Proposal,
    config: InitRoot,
    model: ModelFacts,
    *,
    layout: Layout,
    segments: int,
    steps: int,
) -> None:
    keys, shape, target = made.keys, model.shape, config.target_len
    made.choices["training"] = Value("paper")
    made.choices["parallel"] = Value("single")
    allowed = [
        n
        for n in range(1, shape.num_heads + 1)
        if not head_faults(n, shape.num_heads, shape.num_kv_heads)
    ]
    where = "this machine" if config.hardware is None else f"hardware {config.hardware.gpu}"
    keys["parallel.processes"] = Value(layout.num_processes, f"of {where}")
    keys["parallel.sequence"] = Value(
        layout.sequence,
        f"processes that share a segment; the heads allow {', '.join(map(str, allowed))}",
    )
    keys["training.tokens"] = Value(
        None, f"one pass, about {steps:,} steps; more tokens than that are further passes"
    )
    keys["training.global_batch_tokens"] = Value(
        segments * target,
        f"{segments} segments a step: about {_WANTED_STEPS} steps a pass or more where the "
        f"documents allow it, at most the paper's {_MOST_SEGMENTS} segments",
    )
    keys["training.same_kind_segments"] = Value(layout.data, "the data-parallel size")
    keys["training.recompute"] = Value(
        layout.recompute.value, "the cheapest that fits into memory, by the planner"
    )
    if layout.offload:
        keys["training.offload_activations"] = Value(True, "or it does not fit")
    keys["training.learning_rate"] = Value(
        learning_rate(shape.parameters),
        "by the number of parameters, on the line between the paper's 2e-5 (8 B) and the "
        "miniature's 1e-3 (1.1 M); not tuned",
    )
    keys["training.warmup_steps"] = Value(min(20, steps // 10), "a tenth of the run, at most 20")
    keys["training.checkpoint_steps"] = Value(max(1, min(200, steps // 4)), "at least three")


def learning_rate(parameters: int) -> float:
    """Peak learning rate by the number of parameters, two digits: a power law through two points.

    From the paper's 2e-5 at 8.03 B [LongRoPE2, section 4.1] to the miniature's 1e-3 at 1.1 M; no
    more than the latter.
    """
    power = math.log(_MINIATURE[1] / _PAPER[1]) / math.log(_PAPER[0] / _MINIATURE[0])
    found = min(_MINIATURE[1], _PAPER[1] * (_PAPER[0] / parameters) ** power)
    return float(f"{found:.1e}")


def _say_search(made: Proposal, config: InitRoot, trial: NeedleTrial) -> None:
    keys, measured = made.keys, "the base model, closed forms, what was found, the result"
    if config.hardware is not None or torch.cuda.is_available():
        made.choices["search"] = Value("paper", "the paper's own")
        made.choices["evaluation"] = Value("own", measured)
    else:
        made.choices["search"] = Value(
            "halving", "this project's own, a tenth of the cost of search=paper: there is no GPU"
        )
        made.choices["evaluation"] = Value("own_small", measured)
        keys["export.variants"] = Value(
            ["long_only", "short_only"],
            "what search=halving finds has an attention scale of its own: one window a folder",
        )
    if trial.fault is not None:
        made.warnings.append(
            f"{trial.fault}: the search goes by the perplexity of text (search.objective), which "
            "says less about retrieval; a model that finds needles in its own window can do better"
        )
        keys["search.objective"] = Value("perplexity", "the model finds no needles, as tried")
        keys["search.clip_losses"] = Value(False, "of needles alone")
        return
    tried = "the model finds needles in its own window, as tried"
    if not trial.was_made:
        tried = "not tried, it would take long; search refuses a model that finds no needles"
    keys["search.objective"] = Value("needle", tried)


def _say_evaluation(made: Proposal, config: InitRoot, held_D: np.ndarray) -> None:
    keys, target, original = made.keys, config.target_len, config.model.original_len
    doublings = range(math.ceil(math.log2(target / original)))
    lengths = [*(original * 2**n for n in doublings), target]
    reached = [length for length in lengths if _room(held_D, length) >= 1]
    if reached != lengths:
        reached = reached or [_shorter(config, int(held_D.max()))]
        made.warnings.append(
            f"the longest held-out document has {held_D.max():,} tokens: text and needles are "
            f"evaluated at {reached} tokens, not up to target_len={target} (evaluation.lengths); "
            "longer documents would show more"
        )
    places = min(_MOST_WINDOWS, _room(held_D, reached[-1]))
    keys["evaluation.lengths"] = Value(reached, "lengths that held-out documents reach")
    keys["evaluation.perplexity.num_windows"] = Value(places, "places that the documents have")
    keys["evaluation.retention.num_windows"] = Value(
        min(_MOST_SHORT_WINDOWS, int(held_D.sum() // original)), "windows that the documents fill"
    )


def _shorter(config: InitRoot, longest: int) -> int:
    """A length for documents that are all shorter than the window.

    Raises:
        DataError: there is none at which text can be scored.
    """
    if longest < 2 * _SCORED_TOKENS:
        raise DataError(
            f"corpus.folder={config.corpus.folder}: the longest held-out document has {longest} "
            f"tokens, and evaluation needs one of {2 * _SCORED_TOKENS}; give longer documents"
        )
    return 2 ** int(math.log2(longest))


def nested(keys: Mapping[str, Value]) -> dict[str, Any]:
    """Dotted keys as a tree whose leaves are values."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return tree
