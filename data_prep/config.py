"""Which documents may be packed: schema of ``documents`` in ``conf/pack.yaml``."""

from dataclasses import dataclass, field
from enum import Enum

from data_prep.engine import ClusterConfig
from longrope2.config import StageConfig
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.retrieval import RetrievalConfig


class Overlong(Enum):
    """What happens to documents longer than the longest bucket."""

    drop = "drop"
    cap = "cap"
    split = "split"


@dataclass
class DocumentsConfig:
    """Which documents may be packed."""

    max_tokens: int = 200_000
    """Longest document of a run with quotas, in tokens, BOS and EOS included; a plan has
    ``long_limit`` instead."""
    overlong: Overlong = Overlong.split
    """What happens to longer ones: ``split`` into nearly equal parts, each a document with BOS
    and EOS of its own, ``cap`` (the rest is left out) or ``drop``. All three are counted."""
    exact_duplicates: bool = True
    """Of documents with the same text, in whatever sources, keep only one."""
    near_duplicates: bool = False
    """Of documents with similar text (MinHash), keep only one; needs datasketch, and takes about as
    long again."""
    exclude: list[str] = field(default_factory=list)
    """Files or folders that name texts of search and evaluation; such documents are never
    packed."""
    max_units: int | None = None
    """Most units (files) that are read of a source; null: as many as the plan needs, all if it
    comes to that."""


@dataclass
class PackConfig(StageConfig):
    """Configuration of the pack stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    align: int = 1
    """k: no document of a short segment crosses a multiple of L/k, so k sequence-parallel ranks
    need no exchange there."""
    tokens_per_shard: int = 2**26
    """Tokens of a shard file, at least ``target_len``."""
    tokens_per_unit: int = 2**28
    """Tokens that are shuffled and packed together, at least ``target_len``. Each such unit
    leaves less than one segment of long documents over, so small ones waste tokens."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    workers: int = 0
    """Processes; 0: one per core, or none but this one for small corpora. Changes no byte of the
    result."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    keep_work: bool = False
    """Keep the intermediate files (token ids and indices) in ``1_segments/work``."""
