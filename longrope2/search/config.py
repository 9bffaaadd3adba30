"""Settings of the factor search, and the rules that need nothing else to be checked."""

from dataclasses import dataclass, field
from enum import StrEnum


class Algorithm(StrEnum):
    """Which search is run."""

    longrope2 = "longrope2"
    """Critical index and factors from it up, never below the out-of-distribution bound [LongRoPE2,
    Algorithms 1, 2]."""
    longrope = "longrope"
    """Every factor from 1 up, no bound and no critical index [LongRoPE, arXiv 2402.13753], the
    first generation."""


class Objective(StrEnum):
    """What a candidate is judged by."""

    needle = "needle"
    """Perplexity of the value tokens of needle samples [LongRoPE2, sec. 3.2]."""
    perplexity = "perplexity"
    """Perplexity of every token of long documents: the paper's ablation, and the first-generation
    objective."""


class Pruning(StrEnum):
    """When the evaluation of a candidate is given up."""

    exact = "exact"
    """As soon as its loss so far is above that of the worst candidate that would be kept: losses
    are never negative."""
    racing = "racing"
    """Also when it is behind on the samples so far; a candidate that would have caught up is
    lost."""
    none = "none"
    """Never."""


class SearchedDims(StrEnum):
    """Which factors the search chooses freely."""

    tail = "tail"
    """From the critical index up; below it NTK scaling follows from the factor at the critical
    index."""
    all = "all"
    """Every factor: the paper's ablation."""


@dataclass
class SearchConfig:
    """The evolutionary search of LongRoPE2 [arXiv 2502.20082, Algorithms 1 and 2]."""

    algorithm: Algorithm = Algorithm.longrope2
    """``longrope2`` (the method) or ``longrope`` (first generation; use ``search=longrope`` for all
    of its settings)."""
    objective: Objective = Objective.needle
    """``needle`` (the method) or ``perplexity`` (ablation)."""
    dims: SearchedDims = SearchedDims.tail
    """``tail`` (the method) or ``all`` (ablation)."""
    critical: int | None = None
    """Critical dimension as a cosine index; null searches it between the ten-period and the
    theoretical index."""
    short_window_of: str | None = None
    """Factors file of an extended model's long window: searches the factors of its short window
    (LongRoPE rescales that too), on plain perplexity of samples of the original length; the
    result holds both."""
    population: int = 64
    """Distinct candidates before the first mutation, >= 1."""
    iterations: int = 40
    """Rounds of mutation after the first population, >= 0."""
    parents: int = 32
    """Best candidates kept in each round, each of which gives one new candidate; 1 ..
    population."""
    mutations: int | None = None
    """Mutated candidates in each round, their parents taken in order of rank; null gives one per
    parent."""
    crossovers: int = 0
    """Candidates in each round that mix the factors of two parents with the same critical index; 0
    in the paper."""
    mutation_probability: float = 0.3
    """Chance of each free factor to change in a mutation, in (0, 1]."""
    critical_move_probability: float = 0.0
    """Chance of a mutation to move the critical index by one, in [0, 1]; 0 in the paper."""
    highest_ratio: float = 2.0
    """Largest factor over s = target_len / original_len; LongRoPE2 2, LongRoPE 1.25."""
    grid: float = 0.01
    """Step between the factors that can be chosen; 1 / grid must be a whole number."""
    num_samples: int = 10
    """Samples of the target length that every candidate is judged by, >= 1."""
    depths: list[float] = field(default_factory=lambda: [0.0])
    """Where the needle stands, used in turn: 0 is the start of the document (the paper), 1 its
    end."""
    num_keys: int | None = None
    """Distinct needle keys, used in turn; null gives every sample a key of its own (the released
    data has one)."""
    batch_size: int = 1
    """Samples in one forward pass, >= 1."""
    pruning: Pruning = Pruning.exact
    """``exact`` stops a candidate once it cannot be kept any more: the same result, sooner.
    ``racing`` also stops those that fall behind on the samples so far: cheaper, and the result
    may differ. ``none`` evaluates everything."""
    racing_samples: int = 2
    """``racing``: samples that every candidate is judged by at least, >= 1."""
    racing_margin: float = 0.02
    """``racing``: a candidate stops when its loss on the samples so far exceeds that of the
    worst kept candidate of the last round, on the same samples, by more than this share, >=
    0."""
    max_needle_ppl_at_original: float = 3.0
    """Refuse a needle search when the needle perplexity inside the original window is above this
    (10 is guessing)."""
    projected_gpus: int = 8
    """GPUs that the printed cost is projected to."""
    projected_tflops: float = 125.0
    """Sustained TFLOP/s of one of them; the default is 40 % of an A100's 312 in bf16."""
    min_needle_loss_gain: float = 0.5
    """Refuse a needle search when the needle lowers the loss of the value by less than this, nats
    per token."""


def search_faults(config: SearchConfig) -> list[str]:
    """Faults of the settings by themselves, each naming its key and what is allowed."""
    at_least = {
        "population": 1,
        "iterations": 0,
        "parents": 1,
        "num_samples": 1,
        "batch_size": 1,
        "crossovers": 0,
        "projected_gpus": 1,
        "racing_samples": 1,
    }
    faults = [
        f"search.{key}={value}: must be at least {least}"
        for key, least in at_least.items()
        if (value := getattr(config, key)) < least
    ]
    if config.parents > config.population:
        faults.append(
            f"search.parents={config.parents}: must be at most search.population={config.population}"
        )
    if config.mutations is not None and config.mutations < 0:
        faults.append(
            f"search.mutations={config.mutations}: must be null (one per parent) or at least 0"
        )
    if config.iterations and config.mutations == 0 and config.crossovers == 0:
        faults.append(
            "search.mutations=0 and search.crossovers=0: a round would give no new candidate; raise one"
        )
    if not 0 <= config.critical_move_probability <= 1:
        faults.append(
            f"search.critical_move_probability={config.critical_move_probability}: must be from 0 to 1"
        )
    if config.num_keys is not None and config.num_keys < 1:
        faults.append(
            f"search.num_keys={config.num_keys}: must be null (a key for every sample) or at least 1"
        )
    if not config.racing_margin >= 0:
        faults.append(f"search.racing_margin={config.racing_margin}: must be at least 0")
    if not config.projected_tflops > 0:
        faults.append(f"search.projected_tflops={config.projected_tflops}: must be above 0")
    if not config.highest_ratio >= 1:
        faults.append(f"search.highest_ratio={config.highest_ratio}: must be at least 1")
    if config.short_window_of is not None and (
        config.algorithm is not Algorithm.longrope or config.objective is not Objective.perplexity
    ):
        faults.append(
            "search.short_window_of: only LongRoPE rescales the short window; use search=longrope with it"
        )
    if config.algorithm is Algorithm.longrope:
        faults += _longrope_faults(config)
    if not 0 < config.mutation_probability <= 1:
        faults.append(
            f"search.mutation_probability={config.mutation_probability}: must be above 0 and at most 1"
        )
    if not 0 < config.grid <= 1 or abs(1 / config.grid - round(1 / config.grid)) > 1e-6:
        faults.append(
            f"search.grid={config.grid}: 1 / grid must be a whole number, e.g. 0.01 or 0.1"
        )
    if not config.depths or not all(0 <= depth <= 1 for depth in config.depths):
        faults.append(f"search.depths={list(config.depths)}: give one or more numbers from 0 to 1")
    if not config.max_needle_ppl_at_original > 1:
        faults.append(
            f"search.max_needle_ppl_at_original={config.max_needle_ppl_at_original}: must be above 1"
        )
    return faults


def _longrope_faults(config: SearchConfig) -> list[str]:
    """Settings of LongRoPE2 that have no meaning in the first-generation search."""
    faults = []
    if config.dims is not SearchedDims.all:
        faults.append(
            f"search.dims={config.dims.value}: search.algorithm=longrope searches all; use search=longrope"
        )
    if config.critical is not None or config.critical_move_probability:
        faults.append(
            "search.critical and search.critical_move_probability: search.algorithm=longrope has no critical "
            "dimension; leave them null and 0"
        )
    return faults
