"""From a corpus to shards: tokenize in rounds, choose, pack; every step resumes where it stopped.

Intermediate files stand beside the shards, in a folder named by the fingerprint of configuration
and inputs, so a run finds its own and never another's; they are removed when the segments are
complete, unless ``keep_work`` is set.

What bounds memory: a worker of the tokenize stage holds one batch of text (``tokenizing.py``), a
worker of the pack stage one shuffle unit's list of documents (``shards.py``), both whatever the
corpus; choosing, in this process alone, holds 46 bytes for every document tokenized
(``python -m benchmarks.pack_plan``), which the tokens wanted bound, not the corpus.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.account import (
    LOSSES_FILE,
    Choice,
    copy_losses,
    histogram,
    segment_counts,
    write_document_list,
    write_losses,
)
from data_prep.candidates import find_candidates, measure_supply
from data_prep.config import PackConfig, ShortOverlong
from data_prep.demand import Cells, Supply, demand_of, length_buckets, wanted_sources
from data_prep.duplicates import SIGNATURE_BYTES, read_exclusions, signature_of
from data_prep.engine import run_stage
from data_prep.notices import HeldOut, Kinds, held_out_of, kinds_of, notices
from data_prep.quotas import Demand, Selection, select_documents
from data_prep.reading import TOKENIZED_MARGIN, Readings
from data_prep.reading_plan import Needed, by_source, needed_reading
from data_prep.scan import (
    Stratum,
    StratumScan,
    StratumUnits,
    divide_units,
    in_reading_order,
    scan_corpus,
)
from data_prep.shards import PackedUnit, PackJob, PackList
from data_prep.token_files import DocumentTable, LengthBuckets, TokenizedUnit, load_documents
from data_prep.tokenizing import (
    FULL_BAND,
    RetrievalOrder,
    TokenizeJob,
    UnitGroup,
    UnitTask,
    finished_parts,
)
from longrope2.corpora import tokenizer
from longrope2.corpora.build import files_aside, heldout_documents, ignored_files
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Corpus, Split, Unit
from longrope2.corpora.held_out import HeldOutTexts
from longrope2.errors import DataError
from longrope2.files.artifacts import atomic_path, write_text
from longrope2.segments.format import SegmentRules

SMALL_BYTES = 64 * 2**20  # below this, starting processes takes longer than the work
HAYSTACK_UNITS_PER_SOURCE = 256
GIB = 2**30


@dataclass(frozen=True)
class _Choosing:
    """What choosing from what has been tokenized so far told, for the next round too."""

    choice: Choice
    supply: dict[Stratum, Cells]  # tokens that can be packed
    estimate: dict[Stratum, Cells | None]  # tokens of whole strata
    # Source -> bucket -> tokens wanted over tokens there, above 1; of quotas.
    missing: dict[str, dict[str, float]]


def _choose(
    config: PackConfig, table: DocumentTable, readings: Readings, held_out: Sequence[bytes]
) -> _Choosing:
    """Choose from what has been tokenized so far.

    ``held_out``: signatures of held-out texts, where near duplicates are looked for.
    """
    lengths = length_buckets(config)
    candidates, account = find_candidates(table, lengths, config.documents, held_out)
    supply = measure_supply(table, candidates, lengths)
    read = measure_supply(table, candidates, lengths, _weights(table, readings))
    estimate = readings.estimate(_by_stratum(read, readings))
    natural = by_source({s: cells for s, cells in estimate.items() if cells is not None})
    fitted = demand_of(config, supply, natural, read, readings.divided_sources())
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
    missing, shortfalls = {}, list(fitted.shortfalls)
    if not config.mixture.is_given:
        missing, shortfalls = _missing_quotas(config, selection)
    choice = Choice(
        table, selection=selection, account=account, demand=fitted.demand, shortfalls=shortfalls
    )
    missing = {source: cells for source, cells in missing.items() if source in readings.sources}
    return _Choosing(choice, _by_stratum(supply, readings), estimate, missing)


def _by_stratum(supply: Supply, readings: Readings) -> dict[Stratum, Cells]:
    strata: dict[Stratum, dict[str, Mapping[str, float]]] = {}
    for source, domains in supply.items():
        if source in readings.sources:
            for domain, row in domains.items():
                strata.setdefault(readings.stratum_of(source, domain), {})[domain] = row
    return dict(strata)


def _weights(table: DocumentTable, readings: Readings) -> np.ndarray:
    """How many documents that were read each tokenized document stands for, shape [D]."""
    weight_D = np.ones(len(table), np.float32)
    starts = pairwise(table.first_U)
    for unit, account, (first, last) in zip(table.units, table.accounts, starts, strict=True):
        if account.source not in readings.sources:
            continue
        sizes = unit.index(["num_characters"]).column(0).to_numpy()
        for code in np.unique(table.domain_D[first:last]):
            own = table.domain_D[first:last] == code
            stratum = readings.stratum_of(*table.domains[code])
            weights = readings.natural_weights(stratum, account.units[0], sizes[own])
            weight_D[first:last][own] = weights
    return weight_D


def _next_round(config: PackConfig, readings: Readings, found: _Choosing) -> bool:
    """Decide how much more is read; False if nothing more is needed, or there is no more."""
    done, hope = readings.done(), readings.half_documents()
    needed = needed_reading(config, found.estimate, done, hope)
    if readings.extend(needed, found.estimate, found.supply):
        return True
    return any([readings.grow(source, cells) for source, cells in found.missing.items()])


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


def _divided_units(config: PackConfig, corpus: Corpus) -> dict[Stratum, StratumUnits]:
    return divide_units(corpus.units(), wanted_sources(config), config.seed)


def _first_readings(
    config: PackConfig, units: dict[Stratum, StratumUnits], scans: dict[Stratum, StratumScan]
) -> Readings:
    lengths, most = length_buckets(config), config.documents.max_units
    readings = Readings(units, scans, lengths, config.short_overlong, max_units=most)
    estimate = {stratum: scan.tokens for stratum, scan in scans.items()}
    readings.start(needed_reading(config, estimate, {}))
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
        if self._tokenizer_file.is_file():
            return tokenizer.prepared_tokenizer(self._tokenizer_file)
        start = self.config.model.document_start
        encoder = tokenizer.load_document_tokenizer(self.model_folder, start)
        tokenizer.save_prepared_tokenizer(encoder, self._tokenizer_file)
        return encoder

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
        path, units = self.work / "scan.json", _divided_units(self.config, self.corpus)
        if not path.is_file():
            scans = scan_corpus(self.corpus, units, self.encoder, length_buckets(self.config))
            plain = [[*stratum, vars(scan)] for stratum, scan in scans.items()]
            write_text(path, json.dumps(plain, indent=1))
        plain = json.loads(path.read_text(encoding="utf-8"))
        scans = {(source, domain): StratumScan(**fields) for source, domain, fields in plain}
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
        return [part for task in tasks for part in finished_parts(self.work, task.stem)]

    @property
    def _tokenizer_file(self) -> Path:
        return self.work / "tokenizer.json"

    def _retrieval_order(self) -> RetrievalOrder | None:
        config, tokens = self.config, self.config.retrieval_tokens
        if not tokens:
            return None
        units, haystack = self.corpus.units(), []
        for source in self.corpus.sources:
            own = [unit for unit in units if unit.source == source]
            groups = in_reading_order(own, config.seed)[:HAYSTACK_UNITS_PER_SOURCE]
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
    if not (pack_list.is_complete and (pack_list.folder / LOSSES_FILE).is_file()):
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
    counts = segment_counts(summary["counts"], packed) | {"num_files_not_read": _not_read(config)}
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
        "losses": copy_losses(pack_list.folder / LOSSES_FILE, folder),
        "damaged_files": summary["damaged_files"],
    }
    return files, counts, details


def _not_read(config: PackConfig) -> dict[str, int]:
    """Why files of the corpus' folder were not read, by reason or ending."""
    by_ending = {f"ending {end}": number for end, number in ignored_files(config.corpus).items()}
    return by_ending | files_aside(config.corpus)


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
        found = _choose(config, table, readings, held_out)
        if not _next_round(config, readings, found):
            break
        del table, found  # the next ones are as large
    choice = found.choice
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
    write_losses(pack_list.folder / LOSSES_FILE, choice)
    summary = {
        "rules": vars(rules),
        "damaged_files": choice.damaged_files(),
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
    units = _divided_units(config, corpus)
    by_stratum = scan_corpus(corpus, units, encoder, lengths)
    scans = _by_source(by_stratum)
    known = {s: scan.tokens for s, scan in by_stratum.items() if scan.tokens is not None}
    supply = by_source(known)
    fitted = demand_of(config, supply, supply)
    needed = needed_reading(config, {s: scan.tokens for s, scan in by_stratum.items()}, {})
    print("  estimate from a scan; there / wanted, in tokens")
    print(f"  {'source':<20}" + "".join(f"{name:>34}" for name in lengths.names))
    for source, scan in scans.items():
        cells = [_cell(scan, fitted.demand.of(source, name), name) for name in lengths.names]
        print(f"  {source:<20}" + "".join(f"{cell:>34}" for cell in cells))
    tokenized = sum(_print_reading(s, units[s], by_stratum[s], needed[s]) for s in units)
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


def _print_reading(stratum: Stratum, units: StratumUnits, scan: StratumScan, need: Needed) -> float:
    """One line on how much of a stratum is read; returns the tokens that are tokenized, at most."""
    of = [len(group.units) for group in units.groups]
    read = sum(of[: units.groups_for(need.fraction)])
    name = "/".join(part for part in stratum if part)
    if scan.tokens is None:
        print(f"  {name}: reads {read:,} of {sum(of):,} units, of unknown size")
        return 0.0
    total = sum(sum(row.values()) for row in scan.tokens.values())
    there = {b: sum(r[b] for r in scan.tokens.values()) * need.fraction for b in need.wanted}
    taken = sum(min(number, there[bucket]) for bucket, number in need.wanted.items())
    reads = f"reads {read:,} of {sum(of):,} units, about {need.fraction * total:,.0f} tokens"
    print(f"  {name}: {reads} for {taken:,.0f} packed")
    return min(need.fraction * total, TOKENIZED_MARGIN * taken)


def _by_source(scans: dict[Stratum, StratumScan]) -> dict[str, Cells | None]:
    """Tokens of whole sources; None where those of a stratum are unknown."""
    cells: dict[str, Cells | None] = {}
    for source in sorted({source for source, _ in scans}):
        own = {s: scan.tokens for s, scan in scans.items() if s[0] == source}
        known = {s: tokens for s, tokens in own.items() if tokens is not None}
        whole = by_source(known).get(source, {})
        cells[source] = whole if len(known) == len(own) else None
    return cells


def _there(cells: Cells | None, bucket: str) -> float | None:
    """Tokens of a source in one bucket; None if unknown."""
    return None if cells is None else sum(row.get(bucket, 0.0) for row in cells.values())


def _expected_kinds(config: PackConfig, demand: Demand, scans: dict[str, Cells | None]) -> Kinds:
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


def _cell(scan: Cells | None, wanted: int | None, bucket: str) -> str:
    there = _there(scan, bucket)
    known = "unknown" if there is None else f"{there:,.0f}"
    return f"{known} / {'all' if wanted is None else format(wanted, ',')}"


def _wanted_tokens(demand: Demand, scans: dict[str, Cells | None]) -> float:
    """Tokens of all segments, estimated: what is wanted, or all there is."""
    total = 0.0
    for (source, bucket), wanted in demand.cells.items():
        if wanted is not None:
            total += wanted
        elif source in scans:
            total += _there(scans[source], bucket) or 0.0
    return total
