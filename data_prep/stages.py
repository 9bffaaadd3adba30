"""From tokenized documents to the documents of a run: candidates, demand for this supply, choice.

The tokenize stage as a whole: scan, then rounds of readings, on whatever the units run on.

From a corpus to shards: tokenize in rounds, plan, pack; every step resumes where it was
interrupted.

Intermediate files stand beside the shards, in a folder named by the fingerprint of configuration
and inputs, so a run finds its own and never another's; they are removed when the segments are
complete, unless ``keep_work`` is set.

What bounds memory: a worker of the tokenize stage holds one batch of text (``tokenizing.py``), a
worker of the pack stage one shuffle unit's list of documents (``pack_units.py``), both whatever the
corpus; planning, in this process alone, holds about 60 bytes for every document tokenized, which
the tokens wanted bound, not the corpus. Measured with everything in one process and one shuffle
unit, the peak grew by 0.62 kB a document (LAB_NOTES.md, section 5).

What a run would do, from a look at a few units: supply, demand, how much is read, disk.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.account import Planned, histogram, segment_counts
from data_prep.config import PackConfig
from data_prep.demand import demand_of, length_buckets, wanted_sources
from data_prep.duplicates import read_exclusions
from data_prep.engine import StageProgress, run_units, worker_count
from data_prep.quotas import Demand, Selection, find_candidates, measure_supply, select_documents
from data_prep.reading import (
    ReadingPlan,
    SourceScan,
    in_reading_order,
    scan_corpus,
    scan_from_plain,
    scan_to_plain,
)
from data_prep.shards import PackedUnit, PackJob, PackPlan, write_pack_plan
from data_prep.token_files import DocumentTable, TokenizedUnit, load_documents
from data_prep.tokenizing import (
    FULL_BAND,
    CharacterClasses,
    RetrievalPlan,
    TokenizeJob,
    UnitGroup,
    UnitTask,
)
from longrope2.corpora.config import BucketQuota, ShortOverlong
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Corpus, Unit
from longrope2.corpora.tokenizer import (
    DocumentTokenizer,
    load_document_tokenizer,
    prepared_tokenizer,
    save_prepared_tokenizer,
)
from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import write_text
from longrope2.segments.format import SegmentRules

SMALL_BYTES = 64 * 2**20  # below this, starting processes takes longer than the work
HAYSTACK_UNITS_PER_SOURCE = 256
GIB = 2**30


def choose(config: "PackConfig", table: DocumentTable, reading: ReadingPlan) -> Planned:
    """Choose from what has been tokenized so far; the result tells where reading more may help."""
    lengths, documents = length_buckets(config), config.documents
    candidates, account = find_candidates(
        table,
        lengths,
        documents.overlong,
        drop_exact=documents.exact_duplicates,
        drop_near=documents.near_duplicates,
    )
    supply = measure_supply(table, candidates, lengths)
    fitted = demand_of(config.corpus, supply, _natural_supply(table, reading))
    overlong = {source: config.corpus.short_overlong for source in table.sources}
    overlong[RETRIEVAL_SOURCE] = (
        ShortOverlong.drop
    )  # generated to the length of their bucket, never cut
    selection = select_documents(
        table, candidates, fitted.demand, lengths, overlong, account, seed=config.seed
    )
    missing, shortfalls = fitted.missing, list(fitted.shortfalls)
    if not config.corpus.plan.is_given:
        missing, shortfalls = _missing_quotas(config, selection)
    missing = {source: cells for source, cells in missing.items() if source in reading.sources}
    return Planned(table, selection, account, fitted.demand, missing, shortfalls, lengths)


def _natural_supply(
    table: DocumentTable, reading: ReadingPlan
) -> dict[str, dict[str, dict[str, float]]]:
    """Source -> domain -> tokens as the corpus has them: each document weighted by how many were left unread for it."""
    natural: dict[str, dict[str, dict[str, float]]] = {}
    for code, (source, domain) in enumerate(table.domains):
        if source in reading.sources:
            own = np.flatnonzero(table.domain_D == code)
            weights = reading.natural_weights(source, table.characters_D[own])
            natural.setdefault(source, {})[domain] = {
                "all": float((table.tokens_D[own] * weights).sum())
            }
    return natural


def _missing_quotas(
    config: "PackConfig", selection: Selection
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Cells below their quota: how far, and in words."""
    missing: dict[str, dict[str, float]] = {}
    shortfalls = []
    for source, quota in sorted(config.corpus.quotas.items()):
        for bucket in length_buckets(config).names:
            wanted, got = getattr(quota, bucket), selection.tokens[source, bucket]
            if wanted is not None and got < wanted:
                missing.setdefault(source, {})[bucket] = wanted / max(1, got)
                shortfalls.append(f"{source}/{bucket}: {got:,} of {wanted:,} tokens")
    return missing, shortfalls


def reading_plan(
    config: "PackConfig", units: dict[str, list[UnitGroup]], scans: dict[str, SourceScan]
) -> ReadingPlan:
    """How much is read, by a scan."""
    overlong, most = config.corpus.short_overlong, config.documents.max_units
    reading = ReadingPlan(units, scans, length_buckets(config), overlong, max_units=most)
    estimate = {source: scan.supply() or {} for source, scan in scans.items()}
    reading.start(demand_of(config.corpus, estimate, estimate).demand)
    return reading


@dataclass
class TokenizeRounds:
    """Reads and tokenizes for one run.

    Attributes:
        config: The run.
        model_folder: Model whose tokenizer is used.
        corpus: What to read.
        work: Folder of the intermediate files.
    """

    config: "PackConfig"
    model_folder: Path
    corpus: Corpus
    work: Path

    @cached_property
    def encoder(self) -> DocumentTokenizer:
        """The tokenizer as worker processes get it."""
        if not self._tokenizer_file.is_file():
            save_prepared_tokenizer(
                load_document_tokenizer(self.model_folder), self._tokenizer_file
            )
        return prepared_tokenizer(self._tokenizer_file)

    def start(self) -> ReadingPlan:
        """Scan and decide the first round.

        The scan is kept in a file: it decides what is read, so it must be the same when a run is
        resumed.
        """
        path = self.work / "scan.json"
        all_units = self.corpus.units()
        sources = wanted_sources(self.config.corpus)
        units = {
            source: in_reading_order(all_units, source, self.config.seed) for source in sources
        }
        if not path.is_file():
            scans = scan_corpus(self.corpus, units, self.encoder, length_buckets(self.config))
            write_text(path, json.dumps(scan_to_plain(scans), indent=1))
        scans = scan_from_plain(json.loads(path.read_text(encoding="utf-8")))
        return reading_plan(self.config, units, scans)

    def run(self, reading: ReadingPlan) -> list[TokenizedUnit]:
        """Tokenize the next round; the first one also generates the retrieval documents.

        Raises:
            DataError: units failed; all others are done and kept.
        """
        is_first = reading.num_rounds == 0
        tasks = [*reading.tasks(), *(self._retrieval_tasks() if is_first else [])]
        _ = self.encoder  # workers find it in its file
        job = TokenizeJob(
            self.corpus,
            tuple(tasks),
            self._tokenizer_file,
            self.work,
            self.config.seed,
            read_exclusions(self.config.documents.exclude),
            self.config.documents.near_duplicates,
            self._retrieval_plan(),
        )
        sizes = [task.unit.size_bytes for task in tasks]
        known = [size for size in sizes if size is not None]
        workers = worker_count(self.config.workers, len(tasks), small=sum(known) < SMALL_BYTES)
        with StageProgress(
            "tokenizing", len(tasks), known if len(known) == len(sizes) else None
        ) as progress:
            units = run_units(
                job,
                range(len(tasks)),
                self.config.cluster,
                workers=workers,
                logs=self.work / "slurm",
            )
            for number, account in units:
                progress.advance(number, account.num_tokens)
        return [TokenizedUnit(self.work, task.stem) for task in tasks]

    @property
    def _tokenizer_file(self) -> Path:
        return self.work / "tokenizer.json"

    @property
    def _retrieval_tokens(self) -> dict[str, int]:
        """Bucket -> tokens of generated documents."""
        quota = self.config.corpus.quotas.get(RETRIEVAL_SOURCE, BucketQuota())
        wanted = {"short": quota.short or 0, "long": quota.long or 0}
        return {bucket: tokens for bucket, tokens in wanted.items() if tokens}

    def _retrieval_tasks(self) -> Sequence[UnitTask]:
        """One unit, if there is anything to generate."""
        if not self._retrieval_tokens:
            return []
        unit, classes = (
            UnitGroup((Unit(RETRIEVAL_SOURCE, RETRIEVAL_SOURCE),)),
            CharacterClasses(("all",), ()),
        )
        return [UnitTask(unit, RETRIEVAL_SOURCE, classes, {"all": FULL_BAND})]

    def _retrieval_plan(self) -> RetrievalPlan | None:
        """What to generate, and from which text."""
        if not self._retrieval_tokens:
            return None
        original_len, target_len, seed = (
            self.config.model.original_len,
            self.config.target_len,
            self.config.seed,
        )
        all_units = self.corpus.units()
        haystack = [
            unit
            for source in self.corpus.sources
            for group in in_reading_order(all_units, source, seed)[:HAYSTACK_UNITS_PER_SOURCE]
            for unit in group.units
        ]
        limits = {"short": (0, original_len), "long": (original_len, target_len)}
        return RetrievalPlan(
            self.config.retrieval, self._retrieval_tokens, limits, target_len, tuple(haystack), seed
        )


@dataclass
class BuiltSegments:
    """Everything the manifest needs."""

    files: dict[str, str]
    counts: dict[str, Any]
    details: dict[str, Any]
    plan: PackPlan


def build_segments(
    config: "PackConfig", model_folder: Path, corpus: Corpus, folder: Path, fingerprint: str
) -> BuiltSegments:
    """Do all stages that are not done; shards stand in ``folder`` afterwards, the manifest is the
    caller's.

    Raises:
        DataError: the corpus gives nothing to pack, text that cannot be tokenized safely, or units
            failed.
    """
    work = folder / "work" / fingerprint
    plan = PackPlan(work / "plan")
    if not plan.is_complete:
        _write_plan(config, TokenizeRounds(config, model_folder, corpus, work), plan)
    packed = _pack(config, plan, work, folder)
    summary = plan.summary()
    if not any(unit.files for unit in packed):
        raise DataError(
            f"corpus.name={config.corpus.name} gave {summary['chosen_tokens']} tokens, not enough for one "
            f"segment of target_len={config.target_len}; raise the quotas or use a larger corpus"
        )
    files = {name: sha256 for unit in packed for name, sha256 in unit.files.items()}
    lengths = length_buckets(config)
    details = {
        **summary["rules"],
        "model_name": config.model.name,
        "length_buckets": dict(zip(lengths.names, lengths.limits, strict=True)),
        "length_histogram": summary["length_histogram"],
        "file_bytes": {name: (folder / name).stat().st_size for name in files},
    }
    return BuiltSegments(files, segment_counts(summary["counts"], packed), details, plan)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of ``folder``.

    Raises:
        ArtifactError: another process is packing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"{folder}: another process is packing here; wait for it, or use another run.name"
            ) from None
        yield
        path.unlink(missing_ok=True)


def clean_work(folder: Path) -> None:
    """Remove all intermediate files."""
    shutil.rmtree(folder / "work", ignore_errors=True)


def _write_plan(config: "PackConfig", rounds: TokenizeRounds, plan: PackPlan) -> None:
    """Rounds of tokenizing until the demand is met or the corpus ends; then the plan."""
    reading = rounds.start()
    done: list[TokenizedUnit] = []
    while True:
        done += rounds.run(reading)
        chosen = choose(config, load_documents(done), reading)
        if not any([reading.extend(source, buckets) for source, buckets in chosen.missing.items()]):
            break
    encoder = rounds.encoder
    rules = SegmentRules(
        config.target_len,
        config.model.original_len,
        config.align,
        encoder.vocab_size,
        encoder.bos_id,
        encoder.eos_id,
        encoder.control_ids,
    )
    summary = _summary(chosen, rules)
    write_pack_plan(
        plan.folder,
        chosen.table,
        chosen.selection,
        tokens_per_unit=config.tokens_per_unit,
        summary=summary,
    )


def _summary(chosen: Planned, rules: SegmentRules) -> dict[str, Any]:
    """What the plan keeps for packing and for the manifest."""
    return {
        "rules": vars(rules),
        "counts": chosen.counts(),
        "length_histogram": histogram(chosen),
        "chosen_tokens": int(chosen.selection.parts.tokens_P.sum()),
    }


def _pack(config: "PackConfig", plan: PackPlan, work: Path, folder: Path) -> list[PackedUnit]:
    """Pack all shuffle units; returns what they tell, in their order."""
    summary = plan.summary()
    rules = SegmentRules(
        **{**summary["rules"], "control_ids": tuple(summary["rules"]["control_ids"])}
    )
    names = length_buckets(config).names
    job = PackJob(plan, work, folder, rules, names, config.tokens_per_shard, config.seed)
    numbers = range(summary["num_units"])
    small = summary["chosen_tokens"] * rules.dtype().itemsize < SMALL_BYTES
    workers = worker_count(config.workers, len(numbers), small=small)
    packed: dict[int, PackedUnit] = {}
    with StageProgress("packing", len(numbers)) as progress:
        for number, unit in run_units(
            job, numbers, config.cluster, workers=workers, logs=work / "slurm"
        ):
            packed[number] = unit
            progress.advance(number, sum(sum(cells.values()) for cells in unit.tokens.values()))
    return [packed[number] for number in numbers]


def print_estimate(config: "PackConfig", model_folder: Path, corpus: Corpus) -> None:
    """Scan and print; writes nothing.

    Raises:
        DataError: a unit or the tokenizer cannot be read.
    """
    encoder = load_document_tokenizer(model_folder)
    lengths, all_units = length_buckets(config), corpus.units()
    units = {
        source: in_reading_order(all_units, source, config.seed)
        for source in wanted_sources(config.corpus)
    }
    scans = scan_corpus(corpus, units, encoder, lengths)
    supply = {source: scan.supply() or {} for source, scan in scans.items()}
    fitted = demand_of(config.corpus, supply, supply)
    reading = reading_plan(config, units, scans)
    print(
        f"  estimate from a scan; there / wanted, in tokens\n  {'source':<20}"
        + "".join(f"{n:>34}" for n in lengths.names)
    )
    for source, scan in scans.items():
        print(
            f"  {source:<20}"
            + "".join(f"{_cell(scan, fitted.demand, source, name):>34}" for name in lengths.names)
        )
    tokenized = 0.0
    for source, own in reading.sources.items():
        shares = ", ".join(f"{bucket} {share:.1%}" for bucket, share in own.shares.items())
        read, there = (
            sum(len(group.units) for group in units[source][:n]) for n in (own.num_units, None)
        )
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
    there = (
        "unknown" if supply is None else f"{sum(cells[bucket] for cells in supply.values()):,.0f}"
    )
    wanted = demand.of(source, bucket)
    return f"{there} / {'all' if wanted is None else format(wanted, ',')}"


def _tokens_read(scan: SourceScan, num_units: int, shares: dict[str, float]) -> float:
    """Tokens that are tokenized, estimated."""
    cells = (scan.tokens_per_unit or {}).values()
    return num_units * sum(
        tokens * shares[bucket] for cell in cells for bucket, tokens in cell.items()
    )


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
