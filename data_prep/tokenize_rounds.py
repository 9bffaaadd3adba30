"""The tokenize stage as a whole: scan, then rounds of readings, on whatever the units run on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpora import RETRIEVAL_SOURCE, BucketQuota, Corpus, Unit
from data_prep.demand import demand_of, length_buckets, wanted_sources
from data_prep.engine import run_units, worker_count
from data_prep.exclusions import read_exclusions
from data_prep.progress import StageProgress
from data_prep.reading import ReadingPlan
from data_prep.retrieval_unit import RetrievalPlan
from data_prep.scan import SourceScan, in_reading_order, scan_corpus, scan_from_plain, scan_to_plain
from data_prep.token_files import TokenizedUnit
from data_prep.tokenization import (
    DocumentTokenizer,
    load_document_tokenizer,
    prepared_tokenizer,
    save_prepared_tokenizer,
)
from data_prep.tokenizing import FULL_BAND, TokenizeJob, UnitTask
from data_prep.unit_groups import CharacterClasses, UnitGroup
from longrope2.artifacts import write_text

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["SMALL_BYTES", "TokenizeRounds", "reading_plan"]

SMALL_BYTES = 64 * 2**20  # below this, starting processes takes longer than the work
HAYSTACK_UNITS_PER_SOURCE = 256


def reading_plan(config: "PackConfig", units: dict[str, list[UnitGroup]], scans: dict[str, SourceScan]) -> ReadingPlan:
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
            save_prepared_tokenizer(load_document_tokenizer(self.model_folder), self._tokenizer_file)
        return prepared_tokenizer(self._tokenizer_file)

    def start(self) -> ReadingPlan:
        """Scan and decide the first round.

        The scan is kept in a file: it decides what is read, so it must be the same when a run is resumed.
        """
        path = self.work / "scan.json"
        all_units = self.corpus.units()
        sources = wanted_sources(self.config.corpus)
        units = {source: in_reading_order(all_units, source, self.config.seed) for source in sources}
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
            self.corpus, tuple(tasks), self._tokenizer_file, self.work, self.config.seed,
            read_exclusions(self.config.documents.exclude), self.config.documents.near_duplicates,
            self._retrieval_plan(),
        )  # fmt: skip
        sizes = [task.unit.size_bytes for task in tasks]
        known = [size for size in sizes if size is not None]
        workers = worker_count(self.config.workers, len(tasks), small=sum(known) < SMALL_BYTES)
        with StageProgress("tokenizing", len(tasks), known if len(known) == len(sizes) else None) as progress:
            units = run_units(job, range(len(tasks)), self.config.cluster, workers=workers, logs=self.work / "slurm")
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
        unit, classes = UnitGroup((Unit(RETRIEVAL_SOURCE, RETRIEVAL_SOURCE),)), CharacterClasses(("all",), ())
        return [UnitTask(unit, RETRIEVAL_SOURCE, classes, {"all": FULL_BAND})]

    def _retrieval_plan(self) -> RetrievalPlan | None:
        """What to generate, and from which text."""
        if not self._retrieval_tokens:
            return None
        original_len, target_len, seed = self.config.model.original_len, self.config.target_len, self.config.seed
        all_units = self.corpus.units()
        haystack = [
            unit
            for source in self.corpus.sources
            for group in in_reading_order(all_units, source, seed)[:HAYSTACK_UNITS_PER_SOURCE]
            for unit in group.units
        ]
        limits = {"short": (0, original_len), "long": (original_len, target_len)}
        return RetrievalPlan(self.config.retrieval, self._retrieval_tokens, limits, target_len, tuple(haystack), seed)
