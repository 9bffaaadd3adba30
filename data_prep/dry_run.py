"""What a run would do, from a look at a few units: supply, demand, how much is read, disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpora import Corpus
from data_prep.demand import demand_of, length_buckets, wanted_sources
from data_prep.quotas import Demand
from data_prep.scan import SourceScan, in_reading_order, scan_corpus
from data_prep.tokenization import load_document_tokenizer
from data_prep.tokenize_rounds import reading_plan

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["print_estimate"]

GIB = 2**30


def print_estimate(config: "PackConfig", model_folder: Path, corpus: Corpus) -> None:
    """Scan and print; writes nothing.

    Raises:
        DataError: a unit or the tokenizer cannot be read.
    """
    encoder = load_document_tokenizer(model_folder)
    lengths, all_units = length_buckets(config), corpus.units()
    units = {source: in_reading_order(all_units, source, config.seed) for source in wanted_sources(config.corpus)}
    scans = scan_corpus(corpus, units, encoder, lengths)
    supply = {source: scan.supply() or {} for source, scan in scans.items()}
    fitted = demand_of(config.corpus, supply, supply)
    reading = reading_plan(config, units, scans)
    print(
        f"  estimate from a scan; there / wanted, in tokens\n  {'source':<20}"
        + "".join(f"{n:>34}" for n in lengths.names)
    )
    for source, scan in scans.items():
        print(f"  {source:<20}" + "".join(f"{_cell(scan, fitted.demand, source, name):>34}" for name in lengths.names))
    tokenized = 0.0
    for source, own in reading.sources.items():
        shares = ", ".join(f"{bucket} {share:.1%}" for bucket, share in own.shares.items())
        read, there = (sum(len(group.units) for group in units[source][:n]) for n in (own.num_units, None))
        print(f"  {source}: reads {read:,} of {there:,} units, tokenizes {shares}")
        tokenized += _tokens_read(scans[source], own.num_units, own.shares)
    for shortfall in fitted.shortfalls:
        print(f"  expected shortfall: {shortfall}")
    width = encoder.dtype().itemsize
    packed = _wanted_tokens(fitted.demand, scans)
    print(
        f"  disk: about {tokenized * width / GIB:.2f} GiB of intermediate ids (removed at the end) and "
        f"{packed * width / GIB:.2f} GiB of segments, about {packed / config.target_len:,.0f} of them"
    )


def _cell(scan: SourceScan, demand: Demand, source: str, bucket: str) -> str:
    """What there is and what is wanted of one cell."""
    supply = scan.supply()
    there = "unknown" if supply is None else f"{sum(cells[bucket] for cells in supply.values()):,.0f}"
    wanted = demand.of(source, bucket)
    return f"{there} / {'all' if wanted is None else format(wanted, ',')}"


def _tokens_read(scan: SourceScan, num_units: int, shares: dict[str, float]) -> float:
    """Tokens that are tokenized, estimated."""
    cells = (scan.tokens_per_unit or {}).values()
    return num_units * sum(tokens * shares[bucket] for cell in cells for bucket, tokens in cell.items())


def _wanted_tokens(demand: Demand, scans: dict[str, SourceScan]) -> float:
    """Tokens of all segments, estimated: what is wanted, or all there is."""
    total = 0.0
    for (source, bucket), wanted in demand.cells.items():
        supply = scans[source].supply() if source in scans else None
        if wanted is not None:
            total += wanted
        elif supply is not None:
            total += sum(cells.get(bucket, 0.0) for cells in supply.values())
    return total
