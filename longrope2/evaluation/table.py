"""The comparison as a terminal table: one row per subject."""

from typing import Any

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
        title=f"Window {summary['original_len']} -> {summary['target_len']} tokens; "
        f"{next(iter(needle.values()))['num_samples']} needle samples per length",
        caption=f"needle: values retrieved exactly, in % (95 % interval at {longest}); ppl: perplexity at {longest}; "
        f"short ppl: held-out text inside {summary['original_len']} tokens, change against {summary['reference']}",
    )
    table.add_column("model")
    for length in lengths:
        table.add_column(f"needle {length}", justify="right", overflow="fold")
    for title in ("needle ppl", "text ppl", "short ppl"):
        table.add_column(title, justify="right")
    for subject in summary["subjects"]:
        name = subject["name"]
        accuracies = [_percent(needle[name, length], with_interval=length == longest) for length in lengths]
        table.add_row(
            name,
            *accuracies,
            f"{needle[name, longest]['perplexity']:.2f}",
            f"{text[name, longest]['perplexity']:.2f}",
            f"{retention[name]['perplexity']:.2f} ({100 * (retention[name]['ratio'] - 1):+.1f} %)",
        )
    return table


def _percent(row: dict[str, Any], *, with_interval: bool) -> str:
    """An accuracy in percent, e.g. ``38 (26-51)``."""
    low, high = row["accuracy_interval"]
    interval = f" ({100 * low:.0f}-{100 * high:.0f})" if with_interval else ""
    return f"{100 * row['accuracy']:.0f}{interval}"
