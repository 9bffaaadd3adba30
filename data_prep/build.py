"""From a corpus to draft segments: select by quota, generate retrieval documents, pack, and account for every token."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from data_prep.corpora import RETRIEVAL_SOURCE, BucketQuota, Corpus, Document, ShortOverlong, Split, stable_fraction
from data_prep.packing import DraftSegment, LongPacking, pack_long, pack_short
from data_prep.quotas import BUCKETS, Selection, TokenizedDocument, select_documents
from data_prep.retrieval_corpus import RetrievalDocuments
from data_prep.tokenization import DocumentTokenizer, load_document_tokenizer
from data_prep.verification import SegmentRules
from longrope2.errors import DataError

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["BuiltSegments", "build_segments"]

HAYSTACK_CHARACTERS_PER_TOKEN = 4  # generous, only bounds how much haystack is indexed


@dataclass
class BuiltSegments:
    """Everything that is to be written."""

    drafts: list[DraftSegment]
    rules: SegmentRules
    counts: dict[str, Any]
    details: dict[str, Any]


def build_segments(config: "PackConfig", model_folder: Path, corpus: Corpus) -> BuiltSegments:
    """Choose, generate, tokenize and pack.

    Raises:
        DataError: the corpus gives nothing to pack, or text that cannot be tokenized safely.
    """
    encoder = load_document_tokenizer(model_folder)
    selection = _select(config, encoder, corpus)
    order = _shuffled_order(config.seed)
    short = pack_short(
        sorted(selection.short, key=order), target_len=config.target_len, alignment=config.align, seed=config.seed
    )
    long = pack_long(sorted(selection.long, key=order), target_len=config.target_len, seed=config.seed)
    drafts = [*short, *long.segments]
    if not drafts:
        raise DataError(
            f"corpus.name={config.corpus.name} gave {sum(selection.tokens.values())} tokens, not enough for one "
            f"segment of target_len={config.target_len}; raise corpus.quotas or use a larger corpus"
        )
    rules = SegmentRules(
        config.target_len, config.model.original_len, config.align, encoder.vocab_size, encoder.bos_id, encoder.eos_id
    )
    details = {
        "target_len": config.target_len, "original_len": config.model.original_len, "alignment": config.align,
        "vocab_size": encoder.vocab_size, "bos_id": encoder.bos_id, "eos_id": encoder.eos_id,
        "model_name": config.model.name,
    }  # fmt: skip
    return BuiltSegments(drafts, rules, _counts(config, selection, short, long), details)


def _select(config: "PackConfig", encoder: DocumentTokenizer, corpus: Corpus) -> Selection:
    """Documents of all sources by their quotas."""
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in corpus.documents(Split.train):
        by_source[document.source].append(document)
    selection = Selection()
    plan = sorted(config.corpus.quotas.items())
    for source, quota in track(plan, "sources", disable=not sys.stderr.isatty(), transient=True):
        if source == RETRIEVAL_SOURCE:
            documents = _retrieval_documents(config, encoder, quota, [d for ds in by_source.values() for d in ds])
        else:
            documents = by_source[source]
        select_documents(
            documents, quota, encoder, selection, original_len=config.model.original_len, seed=config.seed,
            # Generated documents have the length of their bucket; they are never cut into windows.
            short_overlong=ShortOverlong.drop if source == RETRIEVAL_SOURCE else config.corpus.short_overlong,
        )  # fmt: skip
    return selection


def _retrieval_documents(
    config: "PackConfig", encoder: DocumentTokenizer, quota: BucketQuota, documents: list[Document]
) -> list[Document]:
    """Generated needle documents for both buckets."""
    wanted = {bucket: getattr(quota, bucket) for bucket in BUCKETS if getattr(quota, bucket)}
    if not wanted:
        return []
    most = HAYSTACK_CHARACTERS_PER_TOKEN * (sum(wanted.values()) + config.target_len)
    texts: list[str] = []
    for document in sorted(documents, key=lambda d: stable_fraction("haystack", config.seed, d.doc_id)):
        if most <= 0:
            break
        texts.append(document.text)
        most -= len(document.text)
    generator = RetrievalDocuments(encoder, texts, config.retrieval, seed=config.seed)
    limits = {"short": (0, config.model.original_len), "long": (config.model.original_len, config.target_len)}
    return [
        document
        for bucket, tokens in wanted.items()
        for document in generator.documents(bucket, tokens, above=limits[bucket][0], up_to=limits[bucket][1])
    ]


def _shuffled_order(seed: int) -> Callable[[TokenizedDocument], tuple[float, str]]:
    """Sort key that mixes the sources."""
    return lambda document: (stable_fraction("mix", seed, document.doc_id), document.doc_id)


def _counts(config: "PackConfig", selection: Selection, short: list[DraftSegment], long: LongPacking) -> dict[str, Any]:
    """The account for the manifest: what was packed, per source and bucket, and everything that was not."""
    tokens: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    padding = 0
    for draft in [*short, *long.segments]:
        for piece in draft.pieces:
            if piece.document is None:
                padding += len(piece)
            else:
                tokens[piece.document.source, draft.window.value] += len(piece)
                documents[piece.document.source, draft.window.value] += piece.start == 0
    return {
        "num_short_segments": len(short),
        "num_long_segments": len(long.segments),
        "tokens": _nested(tokens),
        "num_documents": _nested(documents),
        "padding_tokens": padding,
        "long_rest_tokens": sum(map(len, long.rest)),
        "num_cut_documents": long.num_cut_documents,
        "num_documents_split_for_short": dict(sorted(selection.split_documents.items())),
        "left_out_tokens": _nested(selection.left_out),
        "num_documents_unread": dict(sorted(selection.unread.items())),
        "shortfalls": _shortfalls(config, selection),
    }


def _nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """(a, b) -> n as a -> {b -> n}, sorted."""
    nested: dict[str, dict[str, int]] = {}
    for (first, second), number in sorted(counter.items()):
        nested.setdefault(first, {})[second] = int(number)
    return nested


def _shortfalls(config: "PackConfig", selection: Selection) -> list[str]:
    """Quotas that the corpus could not meet, in words."""
    found = []
    for source, quota in sorted(config.corpus.quotas.items()):
        for bucket in BUCKETS:
            wanted, got = getattr(quota, bucket), selection.tokens[source, bucket]
            if wanted is not None and got < wanted:
                found.append(f"{source}/{bucket}: {got:,} of {wanted:,} tokens")
    return found
