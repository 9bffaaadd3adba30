"""The comparison as a terminal table of 80 columns: one row per subject."""

from typing import Any

from rich import box
from rich.table import Table

__all__ = ["comparison_table"]


def comparison_table(summary: dict[str, Any]) -> Table:
    """Needle accuracy by length, needle and text perplexity at the longest length, retention of the short window.

    Args:
        summary: Content of ``evaluations.json``.
    """
    needle = {(row["subject"], row["length"]): row for row in summary["needle"]}
    text = {(row["subject"], row["length"]): row for row in summary["perplexity"]}
    retention = {row["subject"]: row for row in summary["retention"]}
    lengths = sorted({length for _, length in needle})
    longest = lengths[-1]
    table = Table(
        title=f"Window {summary['original_len']} -> {summary['target_len']} tokens",
        caption=f"{', '.join(map(str, lengths))}: needles retrieved exactly at that many tokens, in % of "
        f"{next(iter(needle.values()))['num_samples']}; the 95 % interval is that at {longest}. Needle ppl, text ppl: "
        f"perplexity of needle values and of held-out text at {longest} tokens. Short: change of the perplexity "
        f"inside {summary['original_len']} tokens against {summary['reference']}.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for title in (*map(str, lengths), "95 %", "needle ppl", "text ppl", "short"):
        table.add_column(title, justify="right")
    for subject in summary["subjects"]:
        name = subject["name"]
        low, high = needle[name, longest]["accuracy_interval"]
        table.add_row(
            name,
            *(f"{100 * needle[name, length]['accuracy']:.0f}" for length in lengths),
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{needle[name, longest]['perplexity']:.4g}",
            f"{text[name, longest]['perplexity']:.4g}",
            f"{100 * (retention[name]['ratio'] - 1):+.1f} %",
        )
    return table
