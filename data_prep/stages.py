"""From a corpus to shards: tokenize in rounds, choose, pack; every step resumes where it stopped.

Intermediate files stand beside the shards, in a folder named by the fingerprint of configuration
and inputs, so a run finds its own and never another's; they are removed when the segments are
complete, unless ``keep_work`` is set.

What bounds memory: a worker of the tokenize stage holds one batch of text (``tokenizing.py``), a
worker of the pack stage one shuffle unit's list of documents (``shards.py``), both whatever the
corpus; choosing, in this process alone, holds about 60 bytes for every document tokenized, which
the tokens wanted bound, not the corpus. Measured with everything in one process and one shuffle
unit, the peak grew by 0.62 kB a document (LAB_NOTES.md, section 5).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.account import Choice, histogram, segment_counts, write_document_list
from data_prep.config import PackConfig, ShortOverlong
from data_prep.demand import demand_of, length_buckets, wanted_sources
from data_prep.duplicates import SIGNATURE_BYTES, read_exclusions, signature_of
from data_prep.engine import run_stage
from data_prep.notices import HeldOut, Kinds, held_out_of, kinds_of, notices
from data_prep.quotas import Demand, Selection, find_candidates, measure_supply, select_documents
from data_prep.reading import Readings, SourceScan, in_reading_order, scan_corpus
from data_prep.shards import PackedUnit, PackJob, PackList
from data_prep.token_files import DocumentTable, LengthBuckets, TokenizedUnit, load_documents
from data_prep.tokenizing import FULL_BAND, RetrievalOrder, TokenizeJob, UnitGroup, UnitTask
from longrope2.corpora import tokenizer
from longrope2.corpora.build import heldout_documents, ignored_files
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Corpus, Split, Unit
from longrope2.corpora.held_out import HeldOutTexts
from longrope2.errors import DataError
from longrope2.files.artifacts import atomic_path, write_text
from longrope2.segments.format import SegmentRules

SMALL_BYTES = 64 * 2**20  # below this, starting processes takes longer than the work
HAYSTACK_UNITS_PER_SOURCE = 256
GIB = 2**30


def _choose(
    config: PackConfig, table: DocumentTable, readings: Readings, held_out: Sequence[bytes]
) -> Choice:
    """Choose from what has been tokenized so far; tells where reading more may help.

    ``held_out``: signatures of held-out texts, where near duplicates are looked for.
    """
    lengths = length_buckets(config)
    candidates, account = find_candidates(table, lengths, config.documents, held_out)
    supply = measure_supply(table, candidates, lengths)
    fitted = demand_of(config, supply, _natural_supply(table, readings))
    overlong = dict.fromkeys(table.sources, config.short_overlong)
    # Generated to the length of their bucket, never cut.
    overlong[RETRIEVAL_SOURCE] = ShortOverlong.drop
    selection = select_documents(
        table,
        candidates,
        demand=fitted.demand,
        lengths=lengths,
        short_overlong=overlong,
        account=account,
        seed=config.seed,
    )
    missing, shortfalls = fitted.missing, list(fitted.shortfalls)
    if not config.mixture.is_given:
        missing, shortfalls = _missing_quotas(config, selection)
    missing = {source: cells for source, cells in missing.items() if source in readings.sources}
    return Choice(
        table,
        selection=selection,
        account=account,
        demand=fitted.demand,
        missing=missing,
        shortfalls=shortfalls,
    )


def _natural_supply(
    table: DocumentTable, readings: Readings
) -> dict[str, dict[str, dict[str, float]]]:
    """Source -> domain -> tokens as the corpus has them, those left unread included."""
    natural: dict[str, dict[str, dict[str, float]]] = {}
    for code, (source, domain) in enumerate(table.domains):
        if source in readings.sources:
            own = np.flatnonzero(table.domain_D == code)
            weights = readings.natural_weights(source, table.characters_D[own])
            tokens = float((table.tokens_D[own] * weights).sum())
            natural.setdefault(source, {})[domain] = {"all": tokens}
    return natural


def _missing_quotas(
    config: PackConfig, selection: Selection
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Cells below their quota: how far, and in words."""
    missing: dict[str, dict[str, float]] = {}
    shortfalls = []
    for source, quota in sorted(config.quotas.items()):
        for bucket, wanted in vars(quota).items():
            got = selection.tokens[source, bucket]
            if wanted is not None and got < wanted:
                missing.setdefault(source, {})[bucket] = wanted / max(1, got)
                shortfalls.append(f"{source}/{bucket}: {got:,} of {wanted:,} tokens")
    return missing, shortfalls


def _ordered_units(config: PackConfig, corpus: Corpus) -> dict[str, list[UnitGroup]]:
    units = corpus.units()
    return {s: in_reading_order(units, s, config.seed) for s in wanted_sources(config)}


def _first_readings(
    config: PackConfig, units: dict[str, list[UnitGroup]], scans: dict[str, SourceScan]
) -> Readings:
    lengths, most = length_buckets(config), config.documents.max_units
    readings = Readings(units, scans, lengths, config.short_overlong, max_units=most)
    estimate = {source: scan.supply() or {} for source, scan in scans.items()}
    readings.start(demand_of(config, estimate, estimate).demand)
    return readings


@dataclass
class _TokenizeStage:
    """Reads and tokenizes for one run; intermediate files stand in ``work``."""

    config: PackConfig
    model_folder: Path
    corpus: Corpus
    work: Path

    @cached_property
    def encoder(self) -> tokenizer.DocumentTokenizer:
        """The tokenizer as worker processes get it."""
        if not self._tokenizer_file.is_file():
            start = self.config.model.document_start
            encoder = tokenizer.load_document_tokenizer(self.model_folder, start)
            tokenizer.save_prepared_tokenizer(encoder, self._tokenizer_file)
        return tokenizer.prepared_tokenizer(self._tokenizer_file)

    @cached_property
    def held_out(self) -> HeldOutTexts:
        """What decides which texts are not packed."""
        return HeldOutTexts.of(self.corpus)

    def held_out_signatures(self) -> list[bytes]:
        """Signatures of the texts that search and evaluation will read, kept in a file."""
        if not self.config.documents.near_duplicates or not self._holds_out:
            return []
        path = self.work / "held_out.signatures"
        if not path.is_file():
            texts = (document.text for document in heldout_documents(self.config.corpus))
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.writelines(map(signature_of, texts))
        data = path.read_bytes()
        return [data[n : n + SIGNATURE_BYTES] for n in range(0, len(data), SIGNATURE_BYTES)]

    @property
    def _holds_out(self) -> bool:
        return next(self.corpus.documents(Split.heldout), None) is not None

    def start(self) -> Readings:
        """Decide the first round by a scan, kept in a file: a resumed run must read the same."""
        path, units = self.work / "scan.json", _ordered_units(self.config, self.corpus)
        if not path.is_file():
            scans = scan_corpus(self.corpus, units, self.encoder, length_buckets(self.config))
            plain = {source: vars(scan) for source, scan in scans.items()}
            write_text(path, json.dumps(plain, indent=1))
        plain = json.loads(path.read_text(encoding="utf-8"))
        scans = {source: SourceScan(**fields) for source, fields in plain.items()}
        return _first_readings(self.config, units, scans)

    def run(self, readings: Readings) -> list[TokenizedUnit]:
        """Tokenize the next round; the first one also generates the retrieval documents.

        Raises:
            DataError: units failed; all others are done and kept.
        """
        is_first, tasks = readings.num_rounds == 0, readings.tasks()
        if is_first and self.config.retrieval_tokens:
            unit = UnitGroup((Unit(RETRIEVAL_SOURCE, RETRIEVAL_SOURCE),))
            classes = LengthBuckets(("all",), (math.inf,))
            tasks.append(UnitTask(unit, RETRIEVAL_SOURCE, classes, {"all": FULL_BAND}))
        _ = self.encoder  # workers find it in its file
        job = TokenizeJob(
            corpus=self.corpus,
            tasks=tuple(tasks),
            tokenizer_file=self._tokenizer_file,
            folder=self.work,
            seed=self.config.seed,
            held_out=self.held_out,
            exclusions=read_exclusions(self.config.documents.exclude),
            with_signatures=self.config.documents.near_duplicates,
            retrieval=self._retrieval_order(),
        )
        sizes = [task.unit.size_bytes for task in tasks]
        small = sum(size or 0 for size in sizes) < SMALL_BYTES
        workers, logs = self.config.workers, self.work / "slurm"
        cluster = self.config.cluster
        run_stage("tokenizing", job, sizes, cluster, workers=workers, small=small, logs=logs)
        return [TokenizedUnit(self.work, task.stem) for task in tasks]

    @property
    def _tokenizer_file(self) -> Path:
        return self.work / "tokenizer.json"

    def _retrieval_order(self) -> RetrievalOrder | None:
        config, tokens = self.config, self.config.retrieval_tokens
        if not tokens:
            return None
        units, haystack = self.corpus.units(), []
        for source in self.corpus.sources:
            groups = in_reading_order(units, source, config.seed)[:HAYSTACK_UNITS_PER_SOURCE]
            haystack += [unit for group in groups for unit in group.units]
        original_len, target_len = config.model.original_len, config.target_len
        return RetrievalOrder(
            config=config.retrieval,
            tokens=tokens,
            limits={"short": (0, original_len), "long": (original_len, target_len)},
            haystack_units=tuple(haystack),
            seed=config.seed,
        )


def build_segments(
    config: PackConfig, model_folder: Path, corpus: Corpus, *, folder: Path, fingerprint: str
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Do all stages that are not done; shards stand in ``folder`` afterwards, without a manifest.

    Returns:
        What the manifest needs: files, counts and details.

    Raises:
        DataError: the corpus gives nothing to pack, text that cannot be tokenized safely, or units
            failed.
    """
    work = folder / "work" / fingerprint
    pack_list = PackList(work / "list")
    if not pack_list.is_complete:
        _write_pack_list(config, _TokenizeStage(config, model_folder, corpus, work), pack_list)
    packed = _pack(config, pack_list, work, folder)
    summary = pack_list.summary()
    if not any(unit.files for unit in packed):
        raise DataError(
            f"corpus.name={config.corpus.name} gave {summary['chosen_tokens']} tokens, not enough "
            f"for one segment of target_len={config.target_len}; raise the quotas or use a larger "
            "corpus"
        )
    files = {name: sha256 for unit in packed for name, sha256 in unit.files.items()}
    lengths = length_buckets(config)
    details = {
        **summary["rules"],
        "notices": _notices(config, summary, packed),
        "heldout_fraction": summary["heldout_fraction"],
        "document_start": "none" if summary["rules"]["bos_id"] is None else "bos",
        "model_name": config.model.name,
        "length_buckets": dict(zip(lengths.names, lengths.limits, strict=True)),
        "length_histogram": summary["length_histogram"],
        "file_bytes": {name: (folder / name).stat().st_size for name in files},
        "documents": write_document_list(folder, pack_list),
    }
    return files, segment_counts(summary["counts"], packed), details


def _notices(config: PackConfig, summary: dict[str, Any], packed: list[PackedUnit]) -> list[str]:
    """What to know of the segments before going on."""
    kinds = kinds_of(segment_counts(summary["counts"], packed))
    held_out = summary["held_out"]
    held_out = None if held_out is None else HeldOut(**held_out)
    return notices(config, kinds, ignored_files(config.corpus), held_out)


def _write_pack_list(config: PackConfig, stage: _TokenizeStage, pack_list: PackList) -> None:
    """Rounds of tokenizing until the demand is met or the corpus ends; then the list."""
    readings, held_out = stage.start(), stage.held_out_signatures()
    done: list[TokenizedUnit] = []
    while True:
        done += stage.run(readings)
        table = load_documents(done, stage.encoder.num_boundary_tokens)
        choice = _choose(config, table, readings, held_out)
        if not any([readings.extend(source, cells) for source, cells in choice.missing.items()]):
            break
    encoder = stage.encoder
    rules = SegmentRules(
        target_len=config.target_len,
        original_len=config.model.original_len,
        alignment=config.align,
        vocab_size=encoder.vocab_size,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        control_ids=encoder.control_ids,
    )
    seen = held_out_of(choice.table, len(stage.corpus.units()))
    summary = {
        "rules": vars(rules),
        "held_out": None if seen is None else vars(seen),
        "heldout_fraction": stage.held_out.fraction,
        "counts": choice.counts(),
        "length_histogram": histogram(choice),
        "chosen_tokens": int(choice.selection.parts.tokens_P.sum()),
    }
    pack_list.write(
        choice.table,
        choice.selection,
        held_out=stage.held_out,
        tokens_per_unit=config.tokens_per_unit,
        summary=summary,
    )


def _pack(config: PackConfig, pack_list: PackList, work: Path, folder: Path) -> list[PackedUnit]:
    summary, rules = pack_list.summary(), pack_list.rules()
    job = PackJob(
        pack_list=pack_list,
        tokenized=work,
        folder=folder,
        rules=rules,
        bucket_names=length_buckets(config).names,
        tokens_per_shard=config.tokens_per_shard,
        seed=config.seed,
    )
    small = summary["chosen_tokens"] * rules.dtype().itemsize < SMALL_BYTES
    sizes, cluster, logs = [None] * summary["num_units"], config.cluster, work / "slurm"
    return run_stage("packing", job, sizes, cluster, workers=config.workers, small=small, logs=logs)


def print_estimate(config: PackConfig, model_folder: Path, corpus: Corpus) -> None:
    """What a run would do, from a look at a few units: supply, demand, how much is read, disk.

    Raises:
        DataError: a unit or the tokenizer cannot be read.
    """
    start, lengths = config.model.document_start, length_buckets(config)
    encoder = tokenizer.load_document_tokenizer(model_folder, start)
    units = _ordered_units(config, corpus)
    scans = scan_corpus(corpus, units, encoder, lengths)
    supply = {source: scan.supply() or {} for source, scan in scans.items()}
    fitted = demand_of(config, supply, supply)
    readings = _first_readings(config, units, scans)
    print("  estimate from a scan; there / wanted, in tokens")
    print(f"  {'source':<20}" + "".join(f"{name:>34}" for name in lengths.names))
    for source, scan in scans.items():
        cells = [_cell(scan, fitted.demand.of(source, name), name) for name in lengths.names]
        print(f"  {source:<20}" + "".join(f"{cell:>34}" for cell in cells))
    tokenized = 0.0
    for source, own in readings.sources.items():
        shares = ", ".join(f"{bucket} {share:.1%}" for bucket, share in own.shares.items())
        sizes = [len(group.units) for group in units[source]]
        read = sum(sizes[: own.num_units])
        print(f"  {source}: reads {read:,} of {sum(sizes):,} units, tokenizes {shares}")
        for cell in (scans[source].tokens_per_unit or {}).values():
            per_unit = sum(tokens * own.shares[bucket] for bucket, tokens in cell.items())
            tokenized += own.num_units * per_unit
    for shortfall in fitted.shortfalls:
        print(f"  expected shortfall: {shortfall}")
    expected = _expected_kinds(config, fitted.demand, scans)
    for notice in notices(config, expected, ignored_files(config.corpus), None):
        print(f"  expected: {notice}")
    width, packed = encoder.dtype().itemsize, _wanted_tokens(fitted.demand, scans)
    print(
        f"  disk: about {tokenized * width / GIB:.2f} GiB of intermediate ids (removed at the end) "
        f"and {packed * width / GIB:.2f} GiB of segments, "
        f"about {packed / config.target_len:,.0f} of them"
    )


def _there(scan: SourceScan, bucket: str) -> float | None:
    """Tokens of a source in one bucket; None if unknown."""
    supply = scan.supply()
    return None if supply is None else sum(cells.get(bucket, 0.0) for cells in supply.values())


def _expected_kinds(config: PackConfig, demand: Demand, scans: dict[str, SourceScan]) -> Kinds:
    """Segments of each kind by the estimate; None where a source's lengths are unknown."""
    generated = config.retrieval_tokens
    names = length_buckets(config).names
    tokens: dict[str, float | None] = {}
    for kind, buckets in (("short", names[:1]), ("long", names[1:])):
        expected = float(sum(generated.get(bucket, 0) for bucket in buckets))
        for (source, scan), bucket in product(scans.items(), buckets):
            there, wanted = _there(scan, bucket), demand.of(source, bucket)
            if there is None and wanted != 0:
                expected = math.nan
            elif there is not None:
                expected += there if wanted is None else min(there, wanted)
        tokens[kind] = None if math.isnan(expected) else expected
    if config.short_overlong is ShortOverlong.split:  # the longer documents are shared out
        tokens = {"short": None, "long": None}
    num = {k: None if n is None else int(n // config.target_len) for k, n in tokens.items()}
    return Kinds(tokens["short"], tokens["long"], num_short=num["short"], num_long=num["long"])


def _cell(scan: SourceScan, wanted: int | None, bucket: str) -> str:
    there = _there(scan, bucket)
    known = "unknown" if there is None else f"{there:,.0f}"
    return f"{known} / {'all' if wanted is None else format(wanted, ',')}"


def _wanted_tokens(demand: Demand, scans: dict[str, SourceScan]) -> float:
    """Tokens of all segments, estimated: what is wanted, or all there is."""
    total = 0.0
    for (source, bucket), wanted in demand.cells.items():
        if wanted is not None:
            total += wanted
        elif source in scans:
            total += _there(scans[source], bucket) or 0.0
    return total
