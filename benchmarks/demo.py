"""``python -m benchmarks.demo RUN [RUN ...]``: the demo's table over several seeds, with intervals.

The runs are those of ``make demo BASELINE=1``, ``... SEED=1`` and so on (``runs/demo``,
``runs/demo_1``, ...). Needles are pooled; perplexities are of all tokens of all seeds. Every
subject has the paired difference of the result's mean loss (nats per token) from its own on the
same needles and texts, with its 95 % bootstrap interval over them: below 0 the result is better.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from longrope2.statistics import bootstrap_interval, wilson_interval

Values = dict[tuple[str, str, int], dict[str, list[float]]]


def read_results(run: Path) -> Values:
    """Raw numbers of one run's evaluation, by subject, suite and length."""
    text = (run / "4_evaluations" / "results.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return {(r["subject"], r["suite"], r["length"]): r["values"] for r in records}


def pooled(runs: list[Values]) -> Values:
    """The numbers of all seeds, one after the other."""
    found: Values = {}
    for run in runs:
        for key, values in run.items():
            into = found.setdefault(key, defaultdict(list))
            for name, numbers in values.items():
                into[name] += numbers
    return found


def perplexity(values: dict[str, list[float]]) -> float:
    """Of all tokens together."""
    return math.exp(sum(values["nll"]) / sum(values["num_tokens"]))


def means(values: dict[str, list[float]]) -> list[float]:
    """Mean loss of every item, nats per token."""
    return [nll / num for nll, num in zip(values["nll"], values["num_tokens"], strict=True)]


def compared(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> str:
    """Paired difference of the mean losses with its interval."""
    differences = [a - b for a, b in zip(means(ours), means(theirs), strict=True)]
    low, high = bootstrap_interval(differences)
    mean = sum(differences) / len(differences)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def rows(runs: list[Values], result: str) -> list[list[str]]:
    """One row of texts for every subject that all runs have, in the first one's order."""
    every = pooled(runs)
    subjects = list(dict.fromkeys(subject for subject, _, _ in runs[0]))
    subjects = [s for s in subjects if all(any(s == key[0] for key in run) for run in runs)]
    lengths = sorted({length for _, suite, length in every if suite == "needle"})
    target, original = lengths[-1], lengths[0]
    base = subjects[0]
    table = []
    for subject in subjects:

        def of(suite: str, length: int, subject: str = subject) -> dict[str, list[float]]:
            return every[subject, suite, length]

        exact = of("needle", target)["exact"]
        low, high = wilson_interval(int(sum(exact)), len(exact))
        each = [run[subject, "needle", target]["exact"] for run in runs]
        kept = perplexity(of("retention", original)) / perplexity(
            every[base, "retention", original]
        )
        paired: list[Any] = ["", ""]
        if subject != result:
            paired = [
                compared(every[result, suite, target], of(suite, target))
                for suite in ("needle", "perplexity")
            ]
        table.append([
            subject,
            f"{100 * sum(exact) / len(exact):.0f} ({100 * low:.0f}-{100 * high:.0f})",
            " ".join(f"{100 * sum(seed) / len(seed):.0f}" for seed in each),
            f"{perplexity(of('needle', target)):.4g}",
            f"{perplexity(of('perplexity', target)):.4g}",
            f"{100 * (kept - 1):+.1f} %",
            *paired,
        ])  # fmt: skip
    return table


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--result", default="halving-trained", help="subject to compare with")
    given = parser.parse_args()
    heading = ["", "needles, %", "by seed", "needle ppl", "text ppl", "short"]
    heading += ["needle loss, result minus it", "text loss, result minus it"]
    table = rows([read_results(run) for run in given.runs], given.result)
    for row in [heading, ["---"] * len(heading), *table]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
