"""Corpora: where documents come from, behind one interface.

A corpus yields ``Document`` values with ids that are stable between runs and machines. Which split a document belongs
to depends on its id alone, so text used to evaluate or to search is never trained on, whatever the seed.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from data_prep.plan_config import PlanConfig
from data_prep.sources.config import (
    FinewebEduConfig,
    Pg19Config,
    RedpajamaV1Config,
    RedpajamaV2Config,
    StarcoderConfig,
)
from longrope2.config import MISSING
from longrope2.errors import DataError

__all__ = [
    "HELDOUT_FRACTION",
    "RETRIEVAL_SOURCE",
    "BucketQuota",
    "Corpus",
    "CorpusConfig",
    "CorpusKind",
    "Document",
    "ShortOverlong",
    "Split",
    "Unit",
    "build_corpus",
    "heldout_documents",
    "heldout_texts",
    "split_documents",
    "split_of",
    "stable_fraction",
]

RETRIEVAL_SOURCE = "retrieval"
HELDOUT_FRACTION = 0.05


class Split(Enum):
    """``train`` documents are packed; ``heldout`` documents serve search and evaluation only."""

    train = "train"
    heldout = "heldout"


class CorpusKind(Enum):
    """Which adapter reads the corpus."""

    sample = "sample"
    folder = "folder"
    redpajama_v1 = "redpajama_v1"
    redpajama_v2 = "redpajama_v2"
    starcoder = "starcoder"
    fineweb_edu = "fineweb_edu"
    pg19 = "pg19"
    mix = "mix"


class ShortOverlong(Enum):
    """What the short bucket does with documents that are longer than the short window."""

    drop = "drop"
    split = "split"


@dataclass
class BucketQuota:
    """Tokens (BOS and EOS included) wanted from one source; ``null`` means all there is, 0 means none."""

    short: int | None = 0
    """Tokens in short segments: documents of at most ``model.original_len`` tokens."""
    long: int | None = 0
    """Tokens in long segments: documents longer than ``model.original_len``."""


@dataclass
class CorpusConfig:
    """Which documents to read, and how many tokens of each source to pack."""

    name: str = MISSING
    """Name used in manifests and reports."""
    kind: CorpusKind = MISSING
    """Adapter: ``sample`` (the Python standard library, offline), ``folder`` (your own files), one of the public corpora
    (read from the hub, their URLs or a mirror: ``corpus.<kind>.root``), or ``mix`` (several of these)."""
    members: list[CorpusKind] = field(default_factory=list)
    """Adapters that kind ``mix`` puts together."""
    folder: str | None = None
    """Folder of .txt, .jsonl or .parquet files, packed or not (.gz, .zst); needed by kind ``folder``."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    title_field: str | None = None
    """Field whose value is added to the document ids of .jsonl and .parquet records, for readable records."""
    short_overlong: ShortOverlong = ShortOverlong.drop
    """What the short bucket does with documents longer than L0: ``drop`` leaves them out (of that bucket), ``split``
    cuts some into windows of L0 tokens with BOS and EOS (for miniatures, whose window few natural documents fit)."""
    heldout_fraction: float = HELDOUT_FRACTION
    """Share of documents kept from packing, for search and evaluation, 0 to 1, drawn by id; 1.0: all of them, for a
    folder of books that only serve search or evaluation. Keep it the same for all stages that read the corpus."""
    quotas: dict[str, BucketQuota] = field(default_factory=dict)
    """Source -> tokens wanted per bucket. The source ``retrieval`` (needle documents) exists for every corpus."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Tokens per source and per length bucket instead, fitted to what there is; without ``plan.sources`` the ``quotas`` are
    taken as they stand."""
    heldout_characters: int | None = None
    """Read no more held-out text than this for search and evaluation; ``null`` reads all of it. Public corpora need a
    limit, their held-out share is terabytes."""
    redpajama_v1: RedpajamaV1Config = field(default_factory=RedpajamaV1Config)
    redpajama_v2: RedpajamaV2Config = field(default_factory=RedpajamaV2Config)
    starcoder: StarcoderConfig = field(default_factory=StarcoderConfig)
    fineweb_edu: FinewebEduConfig = field(default_factory=FinewebEduConfig)
    pg19: Pg19Config = field(default_factory=Pg19Config)


@dataclass(frozen=True)
class Unit:
    """An independently readable piece of a corpus: a file, a listing entry, a group of files.

    Attributes:
        name: Unique within the corpus, for example ``redpajama_v1/arxiv/arxiv_023827cd.jsonl``.
        source: Name that quotas refer to.
        size_bytes: Stored (compressed) size where it is known, for progress and sampling.
    """

    name: str
    source: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        doc_id: Stable identifier, unique within the corpus: the file's name and the row, or the corpus' own id.
        text: The text, never empty, always encodable as UTF-8.
        source: Name that quotas refer to.
        domain: Finer label inside the source; plans can keep the mix of domains.
        size_hint: Characters as the corpus itself records them beside the text, where it does.
    """

    doc_id: str
    text: str
    source: str
    domain: str
    size_hint: int | None = None


class Corpus(Protocol):
    """What every adapter offers. A corpus can be pickled: it holds names, and opens files only while it reads."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources it can yield."""
        ...

    @property
    def heldout_fraction(self) -> float:
        """``corpus.heldout_fraction``: what ``split_of`` needs beside a document's id."""
        ...

    def units(self) -> Sequence[Unit]:
        """All units, in an order that is the same on every machine."""
        ...

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one unit, in a stable order, of both splits, in bounded memory (a line or a row batch).

        A faulty record never stops the reading: it is left out and counted.

        Args:
            unit: One of ``units()``.
            skipped: Gets the number of records left out by reason ("empty text", "bad json", "truncated file", ...).
                A reason that ends in "(kept)" tells of a document that was kept and is counted for information.

        Raises:
            DataError: a remote file stopped answering, after retries. Nothing is wrong with the file, so leaving its
                rest out would make the result depend on the network; the unit can be read again.
        """
        ...

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split; ``skipped`` gets what ``read`` counts."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was read, with hashes or a pinned revision, for the manifest; plain JSON values."""
        ...


def split_documents(corpus: Corpus, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of one split, unit by unit; ``skipped`` gets what ``Corpus.read`` counts."""
    skipped = Counter() if skipped is None else skipped
    for unit in corpus.units():
        for document in corpus.read(unit, skipped):
            if split_of(document.doc_id, corpus.heldout_fraction) is split:
                yield document


def stable_fraction(*parts: str | int) -> float:
    """Number in [0, 1) that depends on ``parts`` only: the same on every machine and in every process."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(doc_id: str, heldout_fraction: float = HELDOUT_FRACTION) -> Split:
    """Split of a document, by its id alone; about ``heldout_fraction`` of all are held out."""
    return Split.heldout if stable_fraction("split", doc_id) < heldout_fraction else Split.train


def build_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that ``config`` describes, with its files listed and its places tried.

    Raises:
        ConfigError: a key the adapter needs is missing, a folder does not exist or holds no usable file, or public sources
            cannot be read; all of them together, each with what to do.
    """
    from data_prep.sources.build import build_adapters  # the adapters import this module

    return build_adapters(config)


def heldout_documents(config: CorpusConfig) -> list[Document]:
    """Documents of the held-out split, for needle samples and perplexity; says on stderr what was left out as faulty.

    Raises:
        DataError: the held-out split is empty.
    """
    documents, num_characters = [], 0
    skipped: Counter[str] = Counter()
    for document in build_corpus(config).documents(Split.heldout, skipped):
        documents.append(document)
        num_characters += len(document.text)
        if config.heldout_characters is not None and num_characters >= config.heldout_characters:
            break
    if skipped:
        counts = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        print(f"corpus {config.name}, records left out while reading: {counts}", file=sys.stderr)
    if not documents:
        raise DataError(
            f"corpus.name={config.name}: no document fell into the held-out split "
            f"(corpus.heldout_fraction={config.heldout_fraction}); use a larger corpus, or a larger fraction: "
            "1.0 holds out all documents of a folder that only serves search or evaluation"
        )
    return documents


def heldout_texts(config: CorpusConfig) -> list[str]:
    """Texts of ``heldout_documents``."""
    return [document.text for document in heldout_documents(config)]
