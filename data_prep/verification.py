"""Verification: does a segment keep the rules of the format?

Used on every segment before it is written, and to audit a finished folder (``verify_folder``).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longrope2.errors import ArtifactError, DataError
from longrope2.rope import Window
from longrope2.segments import Segment, SegmentStore

__all__ = ["SegmentRules", "check_segment", "verify_folder"]


@dataclass(frozen=True)
class SegmentRules:
    """What every segment of a folder has to keep.

    Attributes:
        target_len: L, tokens of a segment.
        original_len: L0, longest document of a short segment, BOS and EOS included.
        alignment: No document of a short segment crosses a multiple of ``target_len / alignment``.
        vocab_size: Ids are below it.
        bos_id: First id of a document.
        eos_id: Last id of a document.
    """

    target_len: int
    original_len: int
    alignment: int
    vocab_size: int
    bos_id: int
    eos_id: int


def check_segment(segment: Segment, rules: SegmentRules) -> None:
    """Check one segment.

    Raises:
        DataError: the first rule that is broken, with the index of the segment.
    """
    fault = _fault(segment, rules)
    if fault:
        raise DataError(f"segment {segment.index} ({segment.window.value}): {fault}")


def verify_folder(folder: Path) -> int:
    """Check hashes and every segment of a finished folder; returns the number of segments.

    Raises:
        ArtifactError: the folder is unfinished, a hash differs, or a segment breaks a rule.
    """
    store = SegmentStore(folder)
    store.verify()
    rules = SegmentRules(
        store.target_len, store.original_len, store.alignment, store.vocab_size, store.bos_id, store.eos_id
    )
    for index in range(len(store)):
        try:
            check_segment(store.segment(index), rules)
        except DataError as error:
            raise ArtifactError(f"{folder}: {error}") from None
    return len(store)


def _fault(segment: Segment, rules: SegmentRules) -> str | None:
    """The first broken rule in words, or None."""
    ends = segment.doc_ends.astype(np.int64)
    if len(segment.tokens) != rules.target_len or len(ends) == 0 or ends[-1] != rules.target_len:
        return f"{len(segment.tokens)} tokens and documents up to {ends[-1:]}, not {rules.target_len}"
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        return "an empty document"
    if not len(ends) == len(segment.sources) == len(segment.doc_ids) == len(segment.doc_is_padding):
        return "ends, sources, ids and padding marks differ in number"
    if int(segment.tokens.max()) >= rules.vocab_size:
        return f"id {int(segment.tokens.max())} is outside the vocabulary of {rules.vocab_size}"
    is_padding = np.asarray(segment.doc_is_padding)
    if int(lengths[is_padding].sum()) != segment.num_padding:
        return f"num_padding is {segment.num_padding}, padding documents hold {int(lengths[is_padding].sum())}"
    if segment.window is Window.SHORT:
        fault = _short_fault(segment, rules, ends, lengths, is_padding)
    else:
        fault = "padding in a long segment" if is_padding.any() else None
    return fault or _boundary_fault(segment, rules, ends, is_padding)


def _short_fault(
    segment: Segment, rules: SegmentRules, ends: np.ndarray, lengths: np.ndarray, is_padding: np.ndarray
) -> str | None:
    """Rules of short segments only."""
    longest = int(lengths[~is_padding].max(initial=0))
    if longest > rules.original_len:
        return f"a document of {longest} tokens, longer than original_len={rules.original_len}"
    if segment.starts_mid_document:
        return "starts mid-document"
    chunk = rules.target_len // rules.alignment
    if ((ends - lengths) // chunk != (ends - 1) // chunk).any():
        return f"a document crosses a multiple of {chunk} tokens (alignment {rules.alignment})"
    return None


def _boundary_fault(segment: Segment, rules: SegmentRules, ends: np.ndarray, is_padding: np.ndarray) -> str | None:
    """BOS and EOS stand at document ends and nowhere else; only a continued or a cut-off document may lack one."""
    starts = np.concatenate([[0], ends[:-1]])[~is_padding]
    lasts = ends[~is_padding] - 1
    begun = starts[1:] if segment.starts_mid_document else starts
    # A long segment cuts its last document, and a continued slice at its start may end before its document does.
    may_lack_eos = {int(lasts[0]), int(lasts[-1])} if segment.window is Window.LONG and len(lasts) else set()
    found = np.isin(segment.tokens, [rules.bos_id, rules.eos_id])
    found[_padding_positions(ends, is_padding)] = False
    if not (segment.tokens[begun] == rules.bos_id).all():
        return "a document does not start with BOS"
    if set(lasts[segment.tokens[lasts] != rules.eos_id].tolist()) - may_lack_eos:
        return "a document does not end with EOS"
    if set(np.flatnonzero(found).tolist()) - set(begun.tolist()) - set(lasts.tolist()):
        return "BOS or EOS stands inside a document"
    return None


def _padding_positions(ends: np.ndarray, is_padding: np.ndarray) -> np.ndarray:
    """Positions of all padding tokens."""
    starts = np.concatenate([[0], ends[:-1]])
    spans = [np.arange(a, b) for a, b in zip(starts[is_padding], ends[is_padding], strict=True)]
    return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
