"""``python -m benchmarks.real_model RUN``: needles and text of an evaluation, finished or not.

For models that a forward pass takes minutes of: what stands in the run's ``results.jsonl`` so far,
at its longest length, with 95 % intervals. Needles of one haystack are resampled together, text by
its windows (which lie in different documents while there are enough of those). Each subject's mean
loss (nats per token) is compared in pairs with the subject ``--result`` on the haystacks and
windows that both have: below 0 the result is better.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2.statistics import bootstrap_interval, grouped_interval, ratio_interval

SUITES = ("needle", "perplexity")


@dataclass(frozen=True)
class Unit:
    """A haystack with its needles, or a window of text: what is resampled as a whole."""

    nll: float
    num_tokens: int
    exact: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Loss, nats per token."""
        return self.nll / self.num_tokens


Results = dict[tuple[str, str], list[Unit]]


def read_units(run: Path) -> Results:
    """The units of each subject and suite at the longest length, in the order of measuring.

    That order is the same for all subjects: an evaluation measures the same data of each, and a
    later one with more samples puts its own behind them.
    """
    text = (run / "4_evaluations" / "results.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    longest = max(record["length"] for record in records if record["suite"] in SUITES)
    found: Results = {}
    for record in records:
        if record["suite"] in SUITES and record["length"] == longest:
            units = found.setdefault((record["subject"], record["suite"]), [])
            units += _units(record["values"])
    return found


def _units(values: dict[str, list[Any]]) -> list[Unit]:
    """The haystacks or windows of one line."""
    size = values.get("needles_per_haystack", [1])[0]
    units = []
    for first in range(0, len(values["nll"]), size):
        own = slice(first, first + size)
        exact = tuple(values["exact"][own]) if "exact" in values else ()
        units.append(Unit(sum(values["nll"][own]), sum(values["num_tokens"][own]), exact))
    return units


def shown_perplexity(units: Sequence[Unit]) -> str:
    """Perplexity over all tokens with its interval; no interval of one unit."""
    sums, counts = [unit.nll for unit in units], [unit.num_tokens for unit in units]
    value = f"{math.exp(sum(sums) / sum(counts)):.4g}"
    if len(units) < 2:
        return value
    low, high = (math.exp(x) for x in ratio_interval(sums, counts))
    return f"{value} ({low:.4g}-{high:.4g})"


def shown_share(units: Sequence[Unit]) -> str:
    """Needles retrieved, of how many, and the interval of their share in percent."""
    scores = [score for unit in units for score in unit.exact]
    groups = [number for number, unit in enumerate(units) for _ in unit.exact]
    low, high = (100 * x for x in grouped_interval(scores, groups))
    return f"{sum(scores)} of {len(scores)} ({low:.0f}-{high:.0f} %)"


def compared(ours: Sequence[Unit], theirs: Sequence[Unit]) -> str:
    """Mean paired difference of the losses, ours minus theirs, on what both have."""
    differences = [a.mean - b.mean for a, b in zip(ours, theirs, strict=False)]
    mean = f"{sum(differences) / len(differences):+.3f}"
    if len(differences) < 2:
        return mean
    low, high = bootstrap_interval(differences)
    return f"{mean} ({low:+.3f} to {high:+.3f})"


def rows(results: Results, result: str) -> list[list[str]]:
    """One row of texts for every subject; empty where nothing is measured yet."""
    table = []
    for subject in dict.fromkeys(subject for subject, _ in results):
        needles, texts = (results.get((subject, suite), []) for suite in SUITES)
        cells = [subject, "", "", "", ""]
        if needles:
            cells[1:3] = [shown_share(needles), shown_perplexity(needles)]
        if texts:
            tokens = sum(unit.num_tokens for unit in texts)
            cells[3:] = [f"{tokens:,}", shown_perplexity(texts)]
        for suite, own in zip(SUITES, (needles, texts), strict=True):
            ours = results.get((result, suite), [])
            is_other = bool(own and ours) and subject != result
            cells.append(compared(ours, own) if is_other else "")
        table.append(cells)
    return table


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--result", default="halving", help="subject to compare with")
    given = parser.parse_args()
    heading = ["", "needles", "needle ppl", "text tokens", "text ppl"]
    heading += [f"needle loss, {given.result} minus it", f"text loss, {given.result} minus it"]
    for row in [heading, ["---"] * len(heading), *rows(read_units(given.run), given.result)]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
