"""Held-out text in segments like the training's own: what a training's held-out loss is read on.

The run's segments name their corpus; its held-out documents are cut into a few segments of each
kind by the packer's own rules. They are written once, before the ranks of a training start, into
``3_checkpoints/heldout``: every part of the run is measured on the same text, and ranks read a
file instead of a corpus.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import PackConfig
from data_prep.packing import DraftSegment, pack_long, pack_short
from data_prep.shards import write_shards
from longrope2.config import load
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.corpus import Document
from longrope2.corpora.held_out import Overlap, find_overlap
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ConfigError, DamagedError
from longrope2.files.artifacts import (
    MANIFEST_NAME,
    Manifest,
    describe_input,
    read_manifest,
    write_manifest,
)
from longrope2.files.unchanged import require_unchanged
from longrope2.rope.window import Window
from longrope2.segments.format import RULE_DETAILS, SegmentRules, SegmentStore

# No text has more on average: what is longer need not be tokenized to be known as long.
_CHARACTERS_PER_TOKEN = 16
_KEPT_DETAILS = (*RULE_DETAILS, "control_ids", "model_name", "made_for", "num_asked")


@dataclass(frozen=True, eq=False)
class _HeldoutDocument:
    """A document, or a window of one, BOS and EOS included."""

    doc_id: str
    source: str
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def heldout_corpus(segments_folder: Path) -> CorpusConfig:
    """The corpus that segments were packed from, with its files listed.

    Raises:
        ConfigError: it cannot be read any more.
    """
    corpus = load(PackConfig, segments_folder / "config.yaml").corpus
    try:
        build_corpus(corpus)
    except ConfigError as error:
        whose = f"held-out text is read from the corpus of {segments_folder}"
        way_out = "bring it back, or train with training.heldout_every=null"
        raise ConfigError([f"{whose}: {fault}; {way_out}" for fault in error.faults]) from None
    return corpus


def pack_heldout(
    folder: Path, segments_folder: Path, encoder: DocumentTokenizer, num_segments: int
) -> str:
    """Write up to ``num_segments`` segments of each kind into ``folder``; says how many in a line.

    Texts that the segments hold all the same (an earlier version split by name) are left out, and
    named in the line. A folder that was made for the same segments, and as many, stays as it is.

    Raises:
        ConfigError: the corpus cannot be read.
        DataError: it holds nothing out.
    """
    store, made_for = SegmentStore(segments_folder), describe_input(segments_folder)
    details = {**store.manifest.details, "made_for": made_for, "num_asked": num_segments}
    details = {name: details[name] for name in _KEPT_DETAILS if name in details}
    if _details_of_whole(folder) == details:
        return _line(SegmentStore(folder), num_segments)
    corpus, rules = heldout_corpus(segments_folder), store.rules
    tokens = num_segments * rules.target_len
    documents = heldout_documents(corpus)
    overlap = find_overlap(documents, segments_folder)
    unseen = _without(documents, overlap)
    short, long = _documents(unseen, rules, encoder, tokens=tokens)
    packed_short = pack_short(
        short, target_len=rules.target_len, alignment=rules.alignment, seed=0
    ).segments
    packed_long = pack_long(long, target_len=rules.target_len, seed=0).segments
    drafts = [*packed_short[:num_segments], *packed_long[:num_segments]]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = write_shards(folder, drafts, rules, tokens_per_shard=num_segments * 2 * tokens)
    _write_manifest(folder, store, drafts, files=files, details=details)
    line = _line(SegmentStore(folder), num_segments)
    return line if overlap is None else f"{line}; left out: {overlap}"


def _details_of_whole(folder: Path) -> dict[str, Any] | None:
    """Details of held-out segments, which say what they were made for; None to make them anew."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(folder, "segments")
        require_unchanged(folder, manifest.files, "it is written again")
    except DamagedError as error:
        print(f"note: {error}", file=sys.stderr)
        return None
    return manifest.details


def _documents(
    documents: Sequence[Document], rules: SegmentRules, encoder: DocumentTokenizer, *, tokens: int
) -> tuple[list[_HeldoutDocument], list[_HeldoutDocument]]:
    """Held-out documents for about ``tokens`` tokens of short and of long segments.

    Short are whole documents of at most L0 tokens and, where they do not suffice, windows of L0
    tokens of longer ones, with BOS and EOS as the packer cuts them.
    """
    room = rules.original_len - len(rules.boundary_ids)
    short, long, contents = [], [], []
    for document in documents:
        if _num_tokens(long) >= tokens:
            if _num_tokens(short) >= tokens:
                break
            if len(document.text) > _CHARACTERS_PER_TOKEN * room:
                continue  # too long to be a short one
        (content,) = encoder.encode_contents([document.text])
        if len(content) <= room:
            short.append(_document(document, content, rules))
        elif _num_tokens(long) < tokens:
            long.append(_document(document, content, rules))
            contents.append((document, content))
    for document, content in contents:
        for first in range(0, len(content), room):
            if _num_tokens(short) < tokens:
                short.append(_document(document, content[first : first + room], rules))
    return short, long


def _without(documents: Sequence[Document], overlap: Overlap | None) -> list[Document]:
    packed = set() if overlap is None else set(overlap.doc_ids)
    return [document for document in documents if document.doc_id not in packed]


def _document(document: Document, content: np.ndarray, rules: SegmentRules) -> _HeldoutDocument:
    *start, end = rules.boundary_ids
    tokens = np.concatenate([start, content, [end]]).astype(rules.dtype)
    return _HeldoutDocument(document.doc_id, document.source, tokens)


def _num_tokens(documents: Sequence[_HeldoutDocument]) -> int:
    return sum(map(len, documents))


def _write_manifest(
    folder: Path,
    store: SegmentStore,
    drafts: Sequence[DraftSegment],
    files: dict[str, str],
    details: dict[str, Any],
) -> None:
    counts = {
        f"num_{window.value}_segments": sum(draft.window is window for draft in drafts)
        for window in Window
    }
    inputs = {name: store.manifest.inputs[name] for name in ("model", "corpus")}
    manifest = Manifest("segments", inputs=inputs, counts=counts, files=files, details=details)
    write_manifest(folder, manifest)


def _line(store: SegmentStore, num_asked: int) -> str:
    """What there is, and what there is not."""
    found = {"short": len(store.short_ids), "long": len(store.long_ids)}
    there = " and ".join(f"{number} {kind}" for kind, number in found.items())
    line = f"held out   {there} segments of {store.target_len} tokens of the segments' corpus"
    if min(found.values()) < num_asked:
        line += f"; its held-out text fills no more (training.heldout_segments={num_asked})"
    return line
