"""``python -m benchmarks.search``: a search on the miniature, ours against a straightforward one.

Straightforward: every candidate on every sample, logits of all positions, every layer whole. Ours:
exact early termination with the hardest sample first, and only what the losses need in the last
layer and the LM head. Both run the same evolution on the same samples in one process and must end
with the same factors; rounds alternate, so that a noisy machine touches both alike. A third
contestant is ours with the inexact ``search.pruning=racing``: what it saves and what its result is
worth. Printed are forward tokens and wall time, and where our tokens went.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from longrope2.config import compose
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.search.config import Pruning, SearchRoot
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses, perplexity
from longrope2.search.prepare import PreparedSearch, check, prepare
from longrope2.search.workers import Workers


class StraightforwardLosses:
    """The same losses, from the logits of every position."""

    def __init__(self, losses: SampleLosses) -> None:
        self.num_batches = losses.num_samples
        self._model, self._samples = losses.model, losses.samples

    @torch.no_grad()
    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Loss of one sample."""
        self._model.set_factors(factors)
        sample = self._samples[batch]
        tokens_T = torch.from_numpy(sample.tokens)
        logits_TV = self._model.logits(tokens_T[None, :-1], Window.LONG)[0]
        losses_T = cross_entropy(logits_TV, tokens_T[1:], reduction="none").double()
        return [losses_T[sample.first_scored - 1 :].sum().item()]


@dataclass
class Contestant:
    """One search, advanced round by round."""

    evolution: Evolution
    steps: Iterator[object] = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.steps = self.evolution.steps()

    def advance(self, num_candidates: int) -> bool:
        """Evaluate some candidates; False once the search is over."""
        started = time.perf_counter()
        done = sum(1 for _ in zip(range(num_candidates), self.steps, strict=False))
        self.seconds += time.perf_counter() - started
        return done == num_candidates


def contestant(prepared: PreparedSearch, pruning: Pruning, folder: Path) -> Contestant:
    """A search with a journal of its own; straightforward where nothing is pruned."""
    config, is_pruning = prepared.config, pruning is not Pruning.none
    evaluator = Evaluator(
        prepared.losses if is_pruning else StraightforwardLosses(prepared.losses),
        Journal(folder / pruning.value, {}),
        num_scored_tokens=prepared.losses.num_scored_tokens,
        is_pruning=is_pruning,
    )
    search = replace(config.search, pruning=pruning)
    return Contestant(Evolution(prepared.space, search, evaluator, config.seed))


def main() -> None:
    """Run all three and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=int, default=2048, help="target window in tokens")
    text = "any key of conf/search.yaml; default: the paper's budget"
    parser.add_argument("overrides", nargs="*", help=text)
    given = parser.parse_args()
    miniature = ["model=tiny", f"target_len={given.target}", "corpus=sample"]
    config = compose(SearchRoot, "search", [*miniature, *given.overrides])
    model_folder, space = check(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared = prepare(config, model_folder, space, folder, Workers())
        contestants = {
            "straightforward": contestant(prepared, Pruning.none, folder),
            "ours": contestant(prepared, Pruning.exact, folder),
            "ours, racing": contestant(prepared, Pruning.racing, folder),
        }
        running = list(contestants.values())
        while running:
            running = [search for search in running if search.advance(config.search.parents)]
    report(config, prepared.losses.num_scored_tokens, contestants)


def report(config: SearchRoot, num_scored_tokens: int, contestants: dict[str, Contestant]) -> None:
    """Same result? Tokens, seconds, and what the remaining tokens are."""
    plain, ours, _ = contestants.values()
    print(
        f"{'':16}{'candidates':>12}{'forward tokens':>18}{'fewer':>8}"
        f"{'seconds':>10}{'shorter':>9}{'result':>10}{'c':>4}"
    )
    for name, search in contestants.items():
        evolution, best = search.evolution, search.evolution.best
        num_losses, fewer = evolution.num_losses, plain.evolution.num_losses / evolution.num_losses
        print(
            f"{name:16}{evolution.num_candidates:>12,}{num_losses * config.target_len:>18,}"
            f"{fewer:>7.2f}x{search.seconds:>10.1f}{plain.seconds / search.seconds:>8.2f}x"
            f"{perplexity(best.loss_sum, num_scored_tokens):>10.4f}"
            f"{best.candidate.critical_index:>4}"
        )
    evolution = ours.evolution
    whole = (evolution.num_candidates - evolution.num_terminated) * config.search.num_samples
    stopped = evolution.num_terminated
    print(
        f"of our forward passes {whole / evolution.num_losses:.0%} went to the "
        f"{evolution.num_candidates} - {stopped} candidates that had to be finished, the rest to "
        f"{stopped} that were stopped after {(evolution.num_losses - whole) / max(stopped, 1):.1f} "
        f"of {config.search.num_samples} samples on average"
    )
    same_kept = [r.candidate for r in plain.evolution.kept] == [r.candidate for r in evolution.kept]
    print(f"straightforward and ours kept the same {len(evolution.kept)} candidates: {same_kept}")
    if plain.evolution.best.candidate != evolution.best.candidate or not same_kept:
        raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
