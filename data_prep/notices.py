"""What a user must know of the result before going on: nothing is missing or unread quietly.

A kind of segments that is not there (its window is then not trained), files that were not read, and
held-out text too small to search and to evaluate with. Each notice names what to change. They are
the last lines of a run, stand in its manifest and its page, and come again where nothing is to do.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.config import PackConfig, ShortOverlong
from data_prep.token_files import DocumentTable
from data_prep.tokenizing import HELD_OUT
from longrope2.corpora.corpus import RETRIEVAL_SOURCE
from longrope2.corpora.folder_files import NO_LINES

MOST_ENDINGS = 8  # that are named one by one
MOST_SHARE = 0.5  # of a corpus that is suggested to be held out


@dataclass(frozen=True)
class Kinds:
    """What there is of each kind of segments, or what an estimate expects; None is unknown."""

    short_tokens: float | None
    """Of chosen documents of at most L0 tokens."""
    long_tokens: float | None
    """Of chosen documents that are longer."""
    num_short: int | None
    """Segments."""
    num_long: int | None


@dataclass(frozen=True)
class HeldOut:
    """Text that is held out; tokens are estimated from characters."""

    num_documents: int
    tokens: int
    longest_tokens: int


def held_out_of(table: DocumentTable, num_units: int) -> HeldOut | None:
    """What was seen of the held-out split; None unless all ``num_units`` units were read."""
    accounts = [account for account in table.accounts if account.source != RETRIEVAL_SOURCE]
    if len({(account.source, unit) for account in accounts for unit in account.units}) < num_units:
        return None
    characters = max(1, sum(account.num_characters for account in accounts))
    per_character = sum(account.num_tokens for account in accounts) / characters
    longest = max((account.longest_heldout_characters for account in accounts), default=0)
    return HeldOut(
        num_documents=sum(account.left_out_documents[HELD_OUT] for account in accounts),
        tokens=round(
            per_character * sum(account.left_out_characters[HELD_OUT] for account in accounts)
        ),
        longest_tokens=round(per_character * longest),
    )


def kinds_of(counts: Mapping[str, Any]) -> Kinds:
    """What the counts of a finished run say."""
    cells = [(b, n) for by in counts["chosen_tokens"].values() for b, n in by.items()]
    short = sum(tokens for bucket, tokens in cells if bucket == "short")
    long = sum(tokens for bucket, tokens in cells if bucket != "short")
    return Kinds(short, long, counts["num_short_segments"], counts["num_long_segments"])


def notices(
    config: PackConfig, kinds: Kinds, ignored: Mapping[str, int], held_out: HeldOut | None
) -> list[str]:
    """Everything to be said, a line each.

    Args:
        config: Configuration of the run.
        kinds: The segments.
        ignored: Ending -> files of the corpus' folder that are not read because of it.
        held_out: None where it is unknown.
    """
    found = [*_missing_kinds(config, kinds), *_ignored_files(ignored)]
    return found + ([] if held_out is None else list(_small_held_out(config, held_out)))


def _missing_kinds(config: PackConfig, kinds: Kinds) -> Iterator[str]:
    original_len, target_len = config.model.original_len, config.target_len
    if target_len <= original_len:  # pre-training: there is one window only
        return
    if kinds.num_short == 0:
        untrained = f"the short window, up to {original_len:,} tokens, will not be trained"
        what = f"documents of at most {original_len:,} tokens"
        why = _why(config, "short", kinds.short_tokens or 0, what)
        yield f"no short segments: {untrained}; {why}. {_remedy_short(config)}"
    if kinds.num_long == 0:
        untrained = f"the long window, up to {target_len:,} tokens, will not be trained"
        what = f"documents of more than {original_len:,} tokens"
        why = _why(config, "long", kinds.long_tokens or 0, what)
        yield f"no long segments: {untrained}; {why}. {_remedy_long(config)}"


def _why(config: PackConfig, kind: str, tokens: float, what: str) -> str:
    if not _asks_for(config, kind):
        return "none are asked for"
    if not tokens:
        return f"no {what} are there"
    return f"{what} are there with {tokens:,.0f} tokens, too few for one segment"


def _asks_for(config: PackConfig, kind: str) -> bool:
    mixture = config.mixture
    if not mixture.is_given:
        return any(getattr(quota, kind) != 0 for quota in config.quotas.values())
    if not mixture.fixes_lengths:
        return kind == "long" or mixture.short_survival > 0
    buckets = mixture.buckets
    return bool(buckets.short if kind == "short" else buckets.mid + buckets.long)


def _remedy_short(config: PackConfig) -> str:
    key = "mixture.buckets.short" if config.mixture.is_given else "quotas.SOURCE.short"
    if not _asks_for(config, "short"):
        return f"Set {key}=TOKENS"
    if config.short_overlong is ShortOverlong.split:
        return "Add more text"
    cuts = f"cuts some of the longer documents into windows of {config.model.original_len:,} tokens"
    return f"short_overlong=split {cuts}; or add more short text"


def _remedy_long(config: PackConfig) -> str:
    if not _asks_for(config, "long"):
        key = "mixture.buckets.long" if config.mixture.is_given else "quotas.SOURCE.long"
        return f"Set {key}=TOKENS"
    generated = "quotas.retrieval.long=TOKENS generates needle documents of them"
    return f"Add longer texts, best of {config.target_len:,} tokens and more; {generated}"


def _ignored_files(ignored: Mapping[str, int]) -> Iterator[str]:
    if not ignored:
        return
    by_number = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{number:,} {ending}" for ending, number in by_number[:MOST_ENDINGS]]
    if others := sum(number for _, number in by_number[MOST_ENDINGS:]):
        named.append(f"{others:,} with other endings")
    first = by_number[0][0]
    way_out = f"corpus.more_text_endings=[{first}] reads them as plain text"
    if first.endswith(NO_LINES):
        way_out = "an array of records becomes lines with `jq -c '.[]' FILE > FILE.jsonl`"
    elif not first.startswith("."):
        way_out = "rename what is text"
    yield f"files not read, by ending: {', '.join(named)}; {way_out}"


def _small_held_out(config: PackConfig, held_out: HeldOut) -> Iterator[str]:
    share, target_len = config.corpus.heldout_fraction, config.target_len
    if share in (0.0, 1.0) or target_len <= config.model.original_len:
        return
    given = f"corpus.heldout_fraction={share:g}"
    again = "search and evaluation read it; pack again with"
    documents = f"{held_out.num_documents:,} documents"
    if held_out.num_documents == 0:
        larger = f"corpus.heldout_fraction={min(MOST_SHARE, max(2 * share, 0.2)):g}"
        yield f"no text is held out ({given}): {again} {larger}, or more text"
    elif held_out.tokens < 2 * target_len:
        needed = f"a search needs {2 * target_len:,}, twice target_len"
        wanted = math.ceil(100 * share * 2 * target_len / max(1, held_out.tokens)) / 100
        larger = f"corpus.heldout_fraction={wanted:g}"
        way_out = f"{larger}, or more text" if wanted <= MOST_SHARE else "more text"
        there = f"about {held_out.tokens:,} tokens are held out in {documents} ({given})"
        yield f"{there}, {needed}: {again} {way_out}"
    elif held_out.longest_tokens < target_len:
        longest = f"the longest text that is held out has about {held_out.longest_tokens:,} tokens"
        needed = f"text perplexity at target_len={target_len:,} needs one of that length"
        larger = "a larger corpus.heldout_fraction, longer texts, or shorter evaluation.lengths"
        yield f"{longest} ({given}), {needed}: {larger}"
