"""The rules of a segment, and the part of an audit that is cheap enough for every start of a training run.

The packer checks every segment by these rules before it writes it; ``data_prep.verify`` checks all of them again, with
hashes and the source texts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longrope2.errors import ArtifactError, DataError
from longrope2.rope import Window
from longrope2.segments.format import Segment, SegmentStore

__all__ = ["SegmentRules", "check_at_start", "check_segment", "rules_of"]


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
        control_ids: Ids that stand nowhere inside a document; BOS and EOS always belong to them.
    """

    target_len: int
    original_len: int
    alignment: int
    vocab_size: int
    bos_id: int
    eos_id: int
    control_ids: tuple[int, ...] = ()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Smallest unsigned type that segments store these ids in."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32


def rules_of(store: SegmentStore) -> SegmentRules:
    """Rules of a folder, from its manifest."""
    control_ids = tuple(store.manifest.details.get("control_ids", ()))
    return SegmentRules(
        store.target_len, store.original_len, store.alignment, store.vocab_size, store.bos_id, store.eos_id, control_ids
    )


def check_at_start(store: SegmentStore, num_segments: int = 64) -> None:
    """The cheap part of an audit: sizes of the shards, totals of the manifest, and some segments spread over all.

    Reads about ``num_segments`` segments, so it takes well under a second a million tokens; run ``python -m
    data_prep.verify FOLDER`` once for all of it.

    Raises:
        ArtifactError: a shard has another size than was written, a total does not add up, or a segment breaks a rule.
    """
    _check_sizes(store)
    _check_totals(store)
    rules = rules_of(store)
    for index in np.unique(np.linspace(0, len(store) - 1, num=min(num_segments, len(store)), dtype=np.int64)):
        try:
            check_segment(store.segment(int(index)), rules)
        except DataError as error:
            raise ArtifactError(f"{store.folder}: {error}; pack again") from None


def check_segment(segment: Segment, rules: SegmentRules) -> None:
    """Check one segment.

    Raises:
        DataError: the first rule that is broken, with the index of the segment.
    """
    fault = _fault(segment, rules)
    if fault:
        raise DataError(f"segment {segment.index} ({segment.window.value}): {fault}")


def _check_sizes(store: SegmentStore) -> None:
    """Bytes of each shard as the manifest has them."""
    for name, expected in store.manifest.details.get("file_bytes", {}).items():
        found = Path(store.folder / name).stat().st_size
        if found != expected:
            raise ArtifactError(f"{store.folder / name} has {found} bytes, the manifest says {expected}; pack again")


def _check_totals(store: SegmentStore) -> None:
    """Tokens packed and padding make up exactly all segments."""
    counts = store.manifest.counts
    if "tokens" in counts and "padding_tokens" in counts:
        packed = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
        if packed + counts["padding_tokens"] != len(store) * store.target_len:
            raise ArtifactError(
                f"{store.folder}/manifest.json: counts.tokens ({packed}) and padding_tokens "
                f"({counts['padding_tokens']}) do not make up {len(store)} segments of {store.target_len}; pack again"
            )


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
    found = np.isin(segment.tokens, [rules.bos_id, rules.eos_id, *rules.control_ids])
    found[_padding_positions(ends, is_padding)] = False
    if not (segment.tokens[begun] == rules.bos_id).all():
        return "a document does not start with BOS"
    if set(lasts[segment.tokens[lasts] != rules.eos_id].tolist()) - may_lack_eos:
        return "a document does not end with EOS"
    # Ends are exempt only for BOS and EOS: a cut document may begin or end with any id but a control id.
    boundary = np.isin(segment.tokens, [rules.bos_id, rules.eos_id])
    inside = found & ~_marked(boundary, begun, lasts)
    if inside.any():
        place = int(np.flatnonzero(inside)[0])
        return (
            f"the control id {int(segment.tokens[place])} stands inside a document (BOS or EOS, or special), at {place}"
        )
    return None


def _padding_positions(ends: np.ndarray, is_padding: np.ndarray) -> np.ndarray:
    """Positions of all padding tokens."""
    starts = np.concatenate([[0], ends[:-1]])
    spans = [np.arange(a, b) for a, b in zip(starts[is_padding], ends[is_padding], strict=True)]
    return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)


def _marked(boundary: np.ndarray, begun: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """Where BOS or EOS may stand and does."""
    allowed = np.zeros(len(boundary), dtype=bool)
    allowed[begun] = allowed[lasts] = True
    return allowed & boundary
