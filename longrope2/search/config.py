"""Settings of the factor search, and the rules that need nothing else to be checked."""

from dataclasses import dataclass, field
from enum import StrEnum

from longrope2.config import StageConfig
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.haystacks import Haystack
from longrope2.corpora.needle_wording import Wording
from longrope2.parallel.dims import ParallelConfig
from longrope2.tracking.metrics import TrackingConfig

# Where ``search.crossovers`` is null.
_PARENTS_A_CROSSOVER = 8


class Algorithm(StrEnum):
    """Which search is run."""

    longrope2 = "longrope2"
    """Critical index, and factors from it up within the bound [LongRoPE2, Algorithms 1, 2]."""
    halving = "halving"
    """Successive halving over a family of six numbers that holds every closed form (our own)."""
    longrope = "longrope"
    """First generation: every factor from 1 up, no bound, no critical index [arXiv 2402.13753]."""


class Objective(StrEnum):
    """What a candidate is judged by."""

    needle = "needle"
    """Perplexity of the value tokens of needle samples [LongRoPE2, sec. 3.2]."""
    perplexity = "perplexity"
    """Of every token of long documents: the paper's ablation, and the first generation's."""


class Pruning(StrEnum):
    """When the evaluation of a candidate is given up."""

    exact = "exact"
    """Once its loss so far is above that of the worst candidate kept: losses are never negative."""
    racing = "racing"
    """Also when it is behind on the samples so far; one that would have caught up is lost."""
    none = "none"
    """Never."""


class SearchedDims(StrEnum):
    """Which factors the search chooses freely."""

    tail = "tail"
    """From the critical index up; those below follow from the factor there by NTK scaling."""
    all = "all"
    """Every factor: the paper's ablation."""


@dataclass
class SearchConfig:
    """The evolutionary search of LongRoPE2 [arXiv 2502.20082, Algorithms 1 and 2]."""

    algorithm: Algorithm = Algorithm.longrope2
    """``longrope2`` (the method); ``halving`` and ``longrope`` with the settings of
    ``search=halving`` and ``search=longrope``."""
    objective: Objective = Objective.needle
    """``needle`` (the method) or ``perplexity`` (ablation)."""
    dims: SearchedDims = SearchedDims.tail
    """``tail`` (the method) or ``all`` (ablation)."""
    critical: int | None = None
    """Critical cosine index; null searches from the ten-period one to the theoretical."""
    short_window_of: str | None = None
    """Factors file of an extended model's long window: searches the short window's (LongRoPE
    rescales that too) on plain perplexity at the original length; the result has both."""
    population: int = 64
    """Distinct candidates before the first mutation, >= 1."""
    iterations: int = 40
    """Rounds of mutation after the first population, >= 0."""
    parents: int = 32
    """Best candidates kept in each round; 1 .. population."""
    mutations: int | None = None
    """New candidates in each round, of parents in order of rank; null gives one per parent."""
    crossovers: int | None = 0
    """Candidates of each round that mix two parents with one critical index; 0 in the paper. null
    gives an eighth as many as parents, by which mutations are fewer if they are null too."""
    mutation_probability: float = 0.3
    """Expected share of the free factors that a mutation changes, in (0, 1]."""
    critical_move_probability: float = 0.0
    """Chance of a mutation to move the critical index by one, in [0, 1]; 0 in the paper."""
    highest_ratio: float = 2.0
    """Largest factor over s = target_len / original_len; LongRoPE2 2, LongRoPE 1.25."""
    grid: float = 0.01
    """Step between the factors that can be chosen; 1 / grid must be a whole number."""
    highest_attention_scale: float | None = 1.0
    """Largest attention scale of the long window that is tried, 1 to 2; 1 (the paper) fixes it at
    1, null allows twice what YaRN adds, 1 + 0.2 ln s."""
    num_samples: int = 10
    """Samples of each length that every candidate is judged by, >= 1."""
    lengths: list[float] = field(default_factory=lambda: [1.0])
    """Lengths of the samples over the target length, in (0, 1], 1 among them; all count alike."""
    depths: list[float] = field(default_factory=lambda: [0.0])
    """Where the needle stands, used in turn, one or more: 0 the start of the document (the paper),
    1 its end."""
    needles_per_haystack: int = 1
    """Needles hidden in every sample and asked for one by one, >= 1. 1 is the paper. More cost
    little, as their haystack is read once for all; losses of one haystack count as one sample."""
    haystack: Haystack = Haystack.books
    """``books`` (held-out text, the paper) or ``noise`` (RULER's repeated sentences)."""
    wording: Wording = Wording.auto
    """``paper`` (its Appendix C), ``short`` (the miniature's), or ``auto``: short below an original
    window of 2,048 tokens."""
    clip_losses: bool = False
    """True counts no token's loss above that of guessing digits: how sure a wrong answer is does
    not rank candidates (needle objective)."""
    confidence: float = 0.95
    """``halving``: a candidate is dropped when it is behind the best with this confidence."""
    fresh_samples: int = 32
    """Fresh samples with the needle at the start, and as many at spread depths, that the result
    is compared with every closed form on: half of all choose, half report. Even and at least 8;
    0 leaves the comparison out, and the factors say so."""
    num_keys: int | None = None
    """Distinct needle keys, used in turn (the released data has one); null: one for each sample."""
    batch_size: int | None = None
    """Samples (``halving``: or candidates) in one forward pass; null: on a GPU as many as its
    memory holds, else 1."""
    pruning: Pruning = Pruning.exact
    """``exact`` stops a candidate once it cannot be kept any more: the same result, sooner.
    ``racing`` also stops those behind so far: cheaper, may differ. ``none`` evaluates all."""
    racing_samples: int = 2
    """``racing``: samples that every candidate is judged by at least, >= 1."""
    racing_margin: float = 0.02
    """``racing``: a candidate stops when its loss exceeds that of the worst one kept before, on
    the same samples, by more than this share, >= 0."""
    max_needle_ppl_at_original: float = 3.0
    """A needle search is refused above this perplexity in the original window."""
    projected_gpus: int | None = None
    """GPUs that the printed time is projected to; null is those of this machine that the search
    uses, and no time is printed where it has none."""
    projected_tflops: float = 125.0
    """Sustained TFLOP/s of one of them; the default is 40 % of an A100's 312 in bf16."""
    min_needle_loss_gain: float = 0.5
    """Nats per token: a needle search is refused if the needle lowers the value's loss by less."""
    min_needle_loss_gain_at_target: float | None = 0.5
    """The same at the target length under the best starting candidate: below, the objective cannot
    rank candidates; null does not ask."""


@dataclass
class SearchRoot(StageConfig):
    """Configuration of the search stage."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """The evolutionary search."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes that share the candidates; ``parallel.sequence`` times ``parallel.context`` of them
    share every sample."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""
    corpus: CorpusConfig | None = None
    """Whose held-out text the samples are made of; null: the corpus of the run's own segments, so
    a run without segments must be given one."""

    @property
    def text(self) -> CorpusConfig:
        """The corpus, once ``check`` has settled it."""
        assert self.corpus is not None
        return self.corpus


def most_candidates(search: SearchConfig) -> int:
    """Candidates of a search that finds a new one in every draw."""
    return search.population + search.iterations * sum(new_candidates(search, search.parents))


def new_candidates(search: SearchConfig, num_parents: int) -> tuple[int, int]:
    """Mutations and crossovers of a round."""
    crossovers, num_mutations = search.crossovers, num_parents
    if crossovers is None:
        crossovers = num_parents // _PARENTS_A_CROSSOVER
        num_mutations -= crossovers
    return (num_mutations if search.mutations is None else search.mutations), crossovers


def search_faults(search: SearchConfig) -> list[str]:
    """Faults of the settings by themselves, each naming its key and what is allowed."""
    positive = ("population", "parents", "num_samples", "needles_per_haystack")
    least = dict.fromkeys((*positive, "racing_samples", "highest_ratio"), 1)
    least |= dict.fromkeys(("iterations", "racing_margin"), 0)
    num_keys, size = 1 if search.num_keys is None else search.num_keys, search.population
    rules = [(key, getattr(search, key) >= least[key], f"at least {least[key]}") for key in least]
    rules += [
        ("parents", search.parents <= size, f"at most search.population={size}"),
        ("mutations", (search.mutations or 0) >= 0, "null (one per parent) or at least 0"),
        ("crossovers", (search.crossovers or 0) >= 0, "null (an eighth of parents) or at least 0"),
        ("num_keys", num_keys >= 1, "null (a key for every sample) or at least 1"),
        (
            "batch_size",
            search.batch_size is None or search.batch_size >= 1,
            "null (as many as fit) or at least 1",
        ),
        (
            "fresh_samples",
            search.fresh_samples == 0
            or (search.fresh_samples >= 8 and search.fresh_samples % 2 == 0),
            "0, or even and at least 8: one half chooses, one reports",
        ),
        ("confidence", 0.5 < search.confidence < 1, "above 0.5 and below 1"),
        (
            "highest_attention_scale",
            1 <= (search.highest_attention_scale or 1) <= 2,
            "null (1 + 0.2 ln s) or from 1 to 2",
        ),
        ("mutation_probability", 0 < search.mutation_probability <= 1, "above 0 and at most 1"),
        ("critical_move_probability", 0 <= search.critical_move_probability <= 1, "from 0 to 1"),
        (
            "projected_gpus",
            search.projected_gpus is None or search.projected_gpus >= 1,
            "null (this machine's) or at least 1",
        ),
        ("projected_tflops", search.projected_tflops > 0, "above 0"),
        ("max_needle_ppl_at_original", search.max_needle_ppl_at_original > 1, "above 1"),
    ]
    faults = [
        f"search.{key}={getattr(search, key)}: must be {allowed}"
        for key, fits, allowed in rules
        if not fits
    ]
    if not 0 < search.grid <= 1 or abs(1 / search.grid - round(1 / search.grid)) > 1e-6:
        fault = f"search.grid={search.grid}: 1 / grid must be a whole number, e.g. 0.01 or 0.1"
        faults.append(fault)
    if not search.depths or not all(0 <= depth <= 1 for depth in search.depths):
        faults.append(f"search.depths={list(search.depths)}: give one or more numbers from 0 to 1")
    if not search.lengths or not all(0 < length <= 1 for length in search.lengths):
        allowed = "give one or more shares of the target length, above 0 and at most 1"
        faults.append(f"search.lengths={list(search.lengths)}: {allowed}")
    elif 1.0 not in search.lengths or len(set(search.lengths)) < len(search.lengths):
        faults.append(f"search.lengths={list(search.lengths)}: 1 must be among them, none twice")
    return faults + _contradictions(search)


def _contradictions(search: SearchConfig) -> list[str]:
    faults = []
    is_longrope = search.algorithm is Algorithm.longrope
    if search.iterations and search.mutations == 0 and search.crossovers == 0:
        both = "search.mutations=0 and search.crossovers=0"
        faults.append(f"{both}: a round would give no new candidate; raise one")
    rescales_short = is_longrope and search.objective is Objective.perplexity
    if search.short_window_of is not None and not rescales_short:
        only = "search.short_window_of: only LongRoPE rescales the short window"
        faults.append(f"{only}; use search=longrope with it")
    is_halving = search.algorithm is Algorithm.halving
    if is_halving and (search.critical is not None or search.dims is SearchedDims.all):
        given = "search.critical and search.dims=all belong to search.algorithm=longrope2"
        faults.append(f"{given}; search.algorithm=halving has neither")
    faults += _unused(search)
    if search.needles_per_haystack > 1:
        given = f"search.needles_per_haystack={search.needles_per_haystack}"
        if search.objective is Objective.perplexity:
            faults.append(f"{given}: search.objective=perplexity hides none; leave it 1")
        if (search.num_keys or search.needles_per_haystack) < search.needles_per_haystack:
            fault = f"{given}: needs as many keys, search.num_keys is {search.num_keys}"
            faults.append(f"{fault}; set it to null or raise it")
    if search.clip_losses and search.objective is Objective.perplexity:
        fault = "search.clip_losses=true: the level of guessing is known for needle values only"
        faults.append(f"{fault}; set search.clip_losses=false or search.objective=needle")
    if search.short_window_of is not None and search.highest_attention_scale != 1:
        fault = f"search.highest_attention_scale={search.highest_attention_scale}"
        only = "search.short_window_of searches the short window, which has none; leave it 1"
        faults.append(f"{fault}: {only}")
    if is_longrope and search.dims is not SearchedDims.all:
        given = f"search.dims={search.dims.value}"
        faults.append(f"{given}: search.algorithm=longrope searches all; use search=longrope")
    if is_longrope and (search.critical is not None or search.critical_move_probability):
        fault = "search.critical and search.critical_move_probability: search.algorithm=longrope"
        faults.append(f"{fault} has no critical dimension; leave them null and 0")
    return faults


def _unused(search: SearchConfig) -> list[str]:
    """Keys that were set and that the chosen algorithm has no use for."""
    is_halving = search.algorithm is Algorithm.halving
    unused = _ONLY_EVOLUTION if is_halving else _ONLY_HALVING
    return [
        f"search.{key}={getattr(search, key)}: search.algorithm={search.algorithm.value} has no "
        "use for it; leave it out"
        for key in unused
        if getattr(search, key) != getattr(_DEFAULTS, key)
    ]


_ONLY_HALVING = ("confidence",)
_ONLY_EVOLUTION = (
    *("crossovers", "mutation_probability", "critical_move_probability", "highest_ratio"),
    *("grid", "pruning", "racing_samples", "racing_margin"),
)
_DEFAULTS = SearchConfig()
