"""Which documents may be packed: schema of ``documents`` in ``conf/pack.yaml``."""

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["DocumentsConfig", "Overlong"]


class Overlong(Enum):
    """What happens to documents longer than the longest bucket."""

    drop = "drop"
    cap = "cap"
    split = "split"


@dataclass
class DocumentsConfig:
    """Which documents may be packed."""

    max_tokens: int = 200_000
    """Longest document of a run with quotas, in tokens, BOS and EOS included; a plan has ``long_limit`` instead."""
    overlong: Overlong = Overlong.split
    """What happens to longer ones: ``split`` into nearly equal parts, each a document with BOS and EOS of its own, ``cap``
    (the rest is left out) or ``drop``. All three are counted."""
    exact_duplicates: bool = True
    """Of documents with the same text, in whatever sources, keep only one."""
    near_duplicates: bool = False
    """Of documents with similar text (MinHash), keep only one; needs datasketch, and takes about as long again."""
    exclude: list[str] = field(default_factory=list)
    """Files or folders that name texts of search and evaluation; such documents are never packed."""
    max_units: int | None = None
    """Most units (files) that are read of a source; null: as many as the plan needs, all if it comes to that."""
