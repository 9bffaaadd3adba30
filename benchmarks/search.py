"""``python -m benchmarks.search``: what searches of the miniature are worth on held-out samples.

Target windows of 4, 8 and 16 times the original one, several seeds each. Contestants: the search in
the paper's space as it was before its mutation was mended (each factor drawn between unchanged
neighbours, flat starts; kept here alone), as it is now, successive halving, and every closed form.
Each cell prints the loss of needle values on fresh samples, of other texts and keys, at the target
length, against the tokens that the search has read. ``--budget`` is the share of the paper's 1,344
candidates on 10 samples that the searches in its space get; halving has its own preset.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, stdev

from longrope2.config import compose
from longrope2.rope.factors import RescaleFactors
from longrope2.search import evolution as evolution_module
from longrope2.search.config import SearchRoot
from longrope2.search.confirm import Kind, contestants
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.halving import Halving
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses
from longrope2.search.prepare import PreparedSearch, check, prepare
from longrope2.search.space import Candidate, SearchSpace
from longrope2.search.workers import Workers

_PAPER_CANDIDATES, _PAPER_SAMPLES, _POPULATION, _PARENTS = 1344, 10, 64, 32


@dataclass(frozen=True)
class Entry:
    """One contestant in one cell."""

    target: int
    seed: int
    name: str
    tokens: int
    seconds: float
    own_nats: float | None
    fresh_nats: float
    fresh_error: float
    attention_scale: float


def between_neighbours(
    space: SearchSpace, parent: Candidate, share: float, rng: Random
) -> Candidate:
    """The mutation as it was: changed factors drawn between the unchanged ones on either side."""
    steps = list(parent.steps)
    places = [place for place in range(len(steps)) if rng.random() < share]
    first = space.first_free(parent.critical_index)
    for run in _runs(places):
        before, behind = run[0] - 1, run[-1] + 1
        least = space.least_step(first, parent.critical_index)
        low = steps[before] if before >= 0 else least
        high = parent.steps[behind] if behind < len(steps) else space.highest_step
        for place, step in zip(run, sorted(rng.randint(low, high) for _ in run), strict=True):
            steps[place] = max(step, space.least_step(first + place, parent.critical_index))
    return replace(parent, steps=tuple(steps))


def _runs(places: list[int]) -> list[list[int]]:
    """Neighbouring places together."""
    runs = [places[:1]] if places else []
    for before, place in pairwise(places):
        if place == before + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def flat_start(space: SearchSpace, number: int, rng: Random) -> Candidate:
    """The starts as they were: flat in every lap."""
    step = rng.randint(space.lowest_step, space.highest_step)
    indices = space.critical_indices
    return space.line(indices[number % len(indices)], step, step)


@contextmanager
def operators_before() -> Iterator[None]:
    """The evolution with its operators as they were."""
    now = evolution_module.mutate, evolution_module._start
    evolution_module.mutate, evolution_module._start = between_neighbours, flat_start
    try:
        yield
    finally:
        evolution_module.mutate, evolution_module._start = now


def prepared_search(target: int, seed: int, *overrides: str) -> PreparedSearch:
    """Samples and model of one cell; the fresh samples depend on target and seed alone."""
    given = ["model=tiny", f"target_len={target}", "corpus=sample", f"seed={seed}", *overrides]
    config = compose(SearchRoot, "search", given)
    return prepare(config, *check(config), Path(tempfile.mkdtemp()), Workers())


def evolved(prepared: PreparedSearch, folder: Path) -> tuple[RescaleFactors, float, Journal]:
    """The search in the paper's space: best factors, their loss on the own samples, its journal."""
    losses = prepared.losses
    with Journal(folder, {}) as journal:
        evaluator = Evaluator(losses, journal, num_scored_tokens=losses.num_scored_tokens)
        given = (prepared.space, prepared.config.search, evaluator)
        evolution = Evolution(*given, seed=prepared.config.seed)
        for _ in evolution.steps():
            pass
    best = evolution.best
    nats = best.loss_sum / losses.num_scored_tokens
    return prepared.space.to_factors(best.candidate), nats, journal


def halved(prepared: PreparedSearch, folder: Path) -> tuple[RescaleFactors, float, Journal]:
    """Successive halving: the same."""
    config, space = prepared.config, prepared.space
    with Journal(folder, {}) as journal:
        given = (space.geometry, space.target_len, config.search)
        halving = Halving(*given, losses=prepared.losses, journal=journal, seed=config.seed)
        for _ in halving.steps():
            pass
    best = halving.kept[0]
    return halving.factors(best), math.log(halving.value(best)), journal


def fresh_loss(fresh: SampleLosses, factors: RescaleFactors) -> tuple[float, float]:
    """Mean nats per scored token on all fresh samples, and its standard error."""
    samples = range(fresh.num_samples)
    nats = [fresh.rows([(factors, n)])[0] / fresh.samples[n].num_scored for n in samples]
    return fmean(nats), stdev(nats) / math.sqrt(len(nats))


def tokens_read(prepared: PreparedSearch, journal: Journal, by_sample: bool) -> int:
    """Tokens of all forward passes of a search."""
    losses = prepared.losses
    return sum(
        count * len(losses.samples[batch if by_sample else losses.batches[batch].start].tokens)
        for batch, count in journal.num_losses_by_batch.items()
    )


def cell(target: int, seed: int, budget: float, num_fresh: int) -> list[Entry]:
    """All contestants at one target with one seed."""
    iterations = round((budget * _PAPER_CANDIDATES - _POPULATION) / _PARENTS)
    unasked = ("search.min_needle_loss_gain_at_target=null", f"search.fresh_samples={num_fresh}")
    sized = (f"search.iterations={max(iterations, 0)}", f"search.num_samples={_PAPER_SAMPLES}")
    paper = prepared_search(target, seed, "search=paper", *sized, *unasked)
    family = prepared_search(target, seed, "search=halving", *unasked)
    fresh = paper.fresh
    assert fresh is not None
    entries = []

    def enter(name: str, factors: RescaleFactors, tokens: int = 0, seconds: float = 0.0,
              own: float | None = None) -> None:  # fmt: skip
        loss, error = fresh_loss(fresh, factors)
        scale = factors.long_attention_scale
        entries.append(Entry(target, seed, name, tokens, seconds, own, loss, error, scale))

    def searched(name: str, prepared: PreparedSearch) -> None:
        started = time.perf_counter()
        is_halving = prepared is family
        with tempfile.TemporaryDirectory() as scratch:
            run = halved if is_halving else evolved
            factors, own, journal = run(prepared, Path(scratch))
        tokens = tokens_read(prepared, journal, by_sample=is_halving)
        enter(name, factors, tokens, time.perf_counter() - started, own)

    with operators_before():
        searched("paper's space, before", paper)
    searched("paper's space", paper)
    searched("halving", family)
    for contestant in contestants([], paper.space.geometry, target):
        if contestant.kind is Kind.closed_form and not contestant.name.startswith("flat"):
            enter(contestant.name, contestant.factors)
    return entries


def main() -> None:
    """Print a line for every contestant of every cell as soon as the cell is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=0.1, help="share of the paper's budget")
    parser.add_argument("--fresh", type=int, default=16, help="fresh samples at the start, and"
                        " as many at spread depths")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON lines to add the entries to")
    given = parser.parse_args()
    full = _PAPER_CANDIDATES * _PAPER_SAMPLES
    for target in given.targets:
        for seed in given.seeds:
            entries = cell(target, seed, given.budget, given.fresh)
            print(f"\n{target} tokens, seed {seed}; the paper's budget is {full * target:,} tokens")
            print(f"{'':28}{'tokens':>12}{'of paper':>10}{'own nats':>10}{'fresh nats':>16}")
            for entry in sorted(entries, key=lambda e: e.fresh_nats):
                own = "" if entry.own_nats is None else f"{entry.own_nats:.3f}"
                print(
                    f"{entry.name:28}{entry.tokens:>12,}{entry.tokens / full / target:>10.2%}"
                    f"{own:>10}{entry.fresh_nats:>10.3f} ±{entry.fresh_error:.3f}"
                )
            if given.out is not None:
                lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(lines)


if __name__ == "__main__":
    main()
