"""Retrieval documents as a unit of the tokenize stage, so that they resume, pack and account like any other text.

Their haystack is text of the train split, so the units it is taken from are read once more; plans without retrieval
documents read everything once.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_prep.corpora import Corpus, Document, Split, Unit, split_of, stable_fraction
from data_prep.retrieval_corpus import RetrievalConfig, RetrievalDocuments
from data_prep.tokenization import DocumentTokenizer

__all__ = ["RetrievalPlan", "retrieval_documents"]

HAYSTACK_CHARACTERS_PER_TOKEN = 4  # generous, only bounds how much haystack is kept and indexed


@dataclass(frozen=True)
class RetrievalPlan:
    """What to generate.

    Attributes:
        config: Shape of the documents.
        tokens: Bucket -> tokens wanted.
        limits: Bucket -> (above, up to) tokens of a document, BOS and EOS included.
        target_len: L in tokens.
        haystack_units: Units to take haystack from.
        seed: Seed of everything drawn.
    """

    config: RetrievalConfig
    tokens: Mapping[str, int]
    limits: Mapping[str, tuple[int, int]]
    target_len: int
    haystack_units: tuple[Unit, ...]
    seed: int


def retrieval_documents(corpus: Corpus, plan: RetrievalPlan, encoder: DocumentTokenizer) -> Iterator[Document]:
    """Generate documents for all buckets.

    Raises:
        DataError: a window cannot hold a needle and its question, or the haystack is too small.
    """
    most = HAYSTACK_CHARACTERS_PER_TOKEN * (sum(plan.tokens.values()) + plan.target_len)
    texts = _haystack_texts(corpus, plan.haystack_units, plan.seed, most)
    generator = RetrievalDocuments(encoder, texts, plan.config, seed=plan.seed)
    for bucket, tokens in plan.tokens.items():
        above, up_to = plan.limits[bucket]
        yield from generator.documents(bucket, tokens, above=above, up_to=up_to)


def _haystack_texts(corpus: Corpus, units: Sequence[Unit], seed: int, num_characters: int) -> list[str]:
    """Texts of the train split in an order drawn from the seed, just enough for ``num_characters``.

    Only the texts that come first in that order are held while reading.
    """
    kept: list[tuple[float, str, str]] = []  # a heap: the last in order on top
    size = 0
    for unit in units:
        for document in corpus.read(unit, Counter()):
            if split_of(document.doc_id, corpus.heldout_fraction) is Split.heldout:
                continue
            place = stable_fraction("haystack", seed, document.doc_id)
            heapq.heappush(kept, (-place, document.doc_id, document.text))
            size += len(document.text)
            while size - len(kept[0][2]) >= num_characters:
                size -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=lambda item: -item[0])]
