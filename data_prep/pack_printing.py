"""What the pack stage prints: the plan before, the result after."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.plan_config import BUCKETS

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["print_plan", "print_result"]

MOST_PADDING = 0.005  # of the tokens in short segments; more is reported


def print_plan(config: "PackConfig", folder: Path) -> None:
    """What is asked for."""
    print(
        f"pack {config.corpus.name} for {config.model.name}: segments of {config.target_len} tokens, short window "
        f"{config.model.original_len}, alignment {config.align} -> {folder}"
    )
    if config.corpus.plan.is_given:
        _print_margins(config)
        return
    print(f"  {'source':<20}{'short tokens':>16}{'long tokens':>16}")
    for source, quota in sorted(config.corpus.quotas.items()):
        cells = ["all" if tokens is None else f"{tokens:,}" for tokens in (quota.short, quota.long)]
        print(f"  {source:<20}{cells[0]:>16}{cells[1]:>16}")
    known = [t for quota in config.corpus.quotas.values() for t in (quota.short, quota.long) if t is not None]
    more = " and all of the sources marked so" if len(known) < 2 * len(config.corpus.quotas) else ""
    print(f"  about {sum(known) // config.target_len:,} segments{more}; 2 bytes a token up to 65,536 ids, else 4")


def print_result(counts: dict[str, Any], folder: Path, seconds: float) -> None:
    """What was packed, what was left out and why, and what is missing."""
    tokens = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
    print(
        f"packed {tokens:,} tokens in {seconds:.1f} s: {counts['num_short_segments']} short and "
        f"{counts['num_long_segments']} long segments, {counts['padding_tokens']:,} padding tokens, "
        f"{counts['left_over_tokens']:,} tokens at the end that filled no segment -> {folder}"
    )
    in_short = counts["padding_tokens"] + sum(buckets.get("short", 0) for buckets in counts["tokens"].values())
    if counts["padding_tokens"] > MOST_PADDING * in_short:
        share = counts["padding_tokens"] / in_short
        print(
            f"  padding is {share:.2%} of the short segments, above {MOST_PADDING:.2%}: too few short documents to fill them"
        )
    for reason, number in sorted(_by_reason(counts["left_out_tokens"]).items()):
        print(f"  left out: {number:,} tokens, {reason}")
    for reason, number in sorted(_by_reason(counts["num_documents_untokenized"]).items()):
        print(f"  not tokenized: {number:,} documents, {reason}")
    for reason, number in sorted(_by_reason(counts["num_records_skipped"]).items()):
        print(f"  skipped: {number:,} records, {reason}")
    for shortfall in counts["shortfalls"]:
        print(f"  shortfall: {shortfall}")


def _print_margins(config: "PackConfig") -> None:
    """A plan: tokens by source and by length."""
    plan = config.corpus.plan
    print("  tokens by source: " + ", ".join(f"{source} {tokens:,}" for source, tokens in sorted(plan.sources.items())))
    if not plan.fixes_lengths:
        print(f"  tokens by length: all longer documents and {plan.short_survival:.0%} of the short ones")
    else:
        print("  tokens by length: " + ", ".join(f"{bucket} {getattr(plan.buckets, bucket):,}" for bucket in BUCKETS))
    if plan.total_tokens is not None:
        print(f"  scaled to {plan.total_tokens:,} tokens in all")


def _by_reason(left_out: dict[str, dict[str, int]]) -> dict[str, int]:
    """Numbers by reason, over all sources."""
    total: Counter[str] = Counter()
    for reasons in left_out.values():
        total.update(reasons)
    return dict(total)
