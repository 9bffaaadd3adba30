"""The tokenize stage: one pass over the text of each unit, ids and an index to disk.

A large unit (a packed file cannot be read in ranges) is written in parts, each complete by itself:
a job that is stopped reads again what it had tokenized, which is fast, and goes on behind it.

Memory of a worker, whatever the corpus: the tokenizer and libraries (about 0.5 GiB), one record
batch of the corpus, and the batch being encoded: about ``BATCH_CHARACTERS`` characters, at 120
bytes each for a moment, and the ids of one document. A longer document is encoded in pieces; where
the tokenizer is of no family that can be cut surely (``corpora/cuts.py``), whole.

Retrieval documents are a unit too, so that they resume, pack and account like any other text. Their
haystack is text of the train split, so the units it is taken from are read once more; runs without
retrieval documents read everything once.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep import token_files
from data_prep.duplicates import SIGNATURE_BYTES, Exclusions, signature_of
from data_prep.token_files import IndexRow, LengthBuckets, TokenizedUnit, UnitAccount
from longrope2.corpora import corpus as corpora
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Corpus, Document, Split, Unit, content_hash
from longrope2.corpora.held_out import HeldOutTexts
from longrope2.corpora.losses import Losses
from longrope2.corpora.retrieval import RetrievalConfig, RetrievalDocuments
from longrope2.corpora.tokenizer import DocumentTokenizer, batches_by_characters, prepared_tokenizer

HAYSTACK_CHARACTERS_PER_TOKEN = 4  # generous, only bounds how much haystack is kept and indexed
NOT_NEEDED = "beyond what the quota needs"
HELD_OUT = "held out for search and evaluation"
UNUSED = "neither packed nor held out: its text is held out or its group is, not both"
EXCLUDED = "on the exclusion list"
ALREADY_READ = "tokenized by an earlier reading"
FULL_BAND = (0.0, 1.0)
# Of a unit that are written together: some minutes of work, which is all that a job loses that is
# stopped at its time limit.
PART_CHARACTERS = 2**27


@dataclass(frozen=True)
class RetrievalOrder:
    """What to generate."""

    config: RetrievalConfig
    tokens: Mapping[str, int]  # bucket -> tokens wanted
    # Bucket -> (above, up to) tokens of a document, BOS and EOS included.
    limits: Mapping[str, tuple[int, int]]  # those of "long" end at the target length
    haystack_units: tuple[Unit, ...]
    seed: int

    def documents(
        self,
        corpus: Corpus,
        encoder: DocumentTokenizer,
        held_out: HeldOutTexts,
        exclusions: Exclusions,
    ) -> Iterator[Document]:
        """Generate documents for all buckets, their haystacks from texts that may be packed.

        Raises:
            DataError: a window cannot hold a needle and its question, or the haystack is too small.
        """
        target_len = self.limits["long"][1]
        most = HAYSTACK_CHARACTERS_PER_TOKEN * (sum(self.tokens.values()) + target_len)
        texts = self._haystack_texts(corpus, most, held_out, exclusions)
        generator = RetrievalDocuments(encoder, texts, self.config, seed=self.seed)
        for bucket, tokens in self.tokens.items():
            above, up_to = self.limits[bucket]
            yield from generator.documents(bucket, tokens, above=above, up_to=up_to)

    def _haystack_texts(
        self, corpus: Corpus, num_characters: int, held_out: HeldOutTexts, exclusions: Exclusions
    ) -> list[str]:
        """Texts of the train split in an order drawn from the seed, just enough characters.

        Only the texts that come first in that order are held while reading.
        """
        kept: list[tuple[float, str, str]] = []  # a heap: the last in order on top
        size = 0
        for unit in self.haystack_units:
            for document in corpus.read(unit, Losses()):
                content = content_hash(document.text)
                if held_out.split_of(document, content) is not Split.train:
                    continue
                if exclusions.match(document.doc_id, corpora.text_hash(document.text)):
                    continue
                place = corpora.stable_fraction("haystack", self.seed, document.doc_id)
                heapq.heappush(kept, (-place, document.doc_id, document.text))
                size += len(document.text)
                while size - len(kept[0][2]) >= num_characters:
                    size -= len(heapq.heappop(kept)[2])
        return [text for _, _, text in sorted(kept, key=lambda item: -item[0])]


@dataclass(frozen=True)
class UnitGroup:
    """Units of one source that are read together, so that small files do not become work units."""

    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Name of the first unit."""
        return self.units[0].name

    @property
    def source(self) -> str:
        """The source of all of them."""
        return self.units[0].source

    @property
    def size_bytes(self) -> int | None:
        """Stored size of all, None if one is unknown."""
        sizes = [unit.size_bytes for unit in self.units]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def read(self, corpus: Corpus, losses: dict[str, Losses]) -> Iterator[tuple[int, Document]]:
        """Documents of all units, each with the place of its unit; ``losses``: by unit."""
        for place, unit in enumerate(self.units):
            own = losses.setdefault(unit.name, Losses())
            for document in corpus.read(unit, own):
                yield place, document


@dataclass(frozen=True)
class UnitTask:
    """One reading of one unit."""

    unit: UnitGroup
    stem: str  # of its files' names
    classes: LengthBuckets  # in characters: how to guess a document's bucket
    # Class -> (from, to): documents whose order, as a fraction, lies in the band are tokenized. A
    # run that needs a tenth of the short documents tokenizes a tenth.
    bands: Mapping[str, tuple[float, float]]
    is_first: bool = True  # no earlier reading; later ones account only for what it did not


@dataclass(frozen=True)
class TokenizeJob:
    """All readings of a round; a unit of work is one reading."""

    corpus: Corpus
    tasks: tuple[UnitTask, ...]
    tokenizer_file: Path
    folder: Path
    seed: int
    held_out: HeldOutTexts
    exclusions: Exclusions
    with_signatures: bool
    retrieval: RetrievalOrder | None

    def run(self, number: int) -> UnitAccount:
        """Tokenize one unit unless that is done."""
        task = self.tasks[number]
        parts = finished_parts(self.folder, task.stem)
        if parts and parts[-1].account().is_last:
            return _sum_of(parts)
        encoder = prepared_tokenizer(self.tokenizer_file)
        losses: dict[str, Losses] = {}
        documents = self._documents(task, encoder, losses)
        for _ in range(sum(part.account().num_read for part in parts)):
            next(documents)  # read again, not tokenized again
        while not (parts and parts[-1].account().is_last):
            unit = TokenizedUnit(self.folder, _part_stem(task.stem, len(parts)))
            self._write_part(task, unit, len(parts), documents, losses, encoder)
            parts.append(unit)
        return _sum_of(parts)

    def _write_part(
        self,
        task: UnitTask,
        unit: TokenizedUnit,
        number: int,
        documents: Iterator[tuple[int, Document]],
        losses: dict[str, Losses],
        encoder: DocumentTokenizer,
    ) -> None:
        """Tokenize the next ``PART_CHARACTERS`` of a unit, or what is left of it."""
        names = [u.name for u in task.unit.units]
        before = {name: own.copy() for name, own in losses.items()}
        account = UnitAccount(names, task.unit.source, part=number)
        width = SIGNATURE_BYTES if self.with_signatures else 0
        with token_files.write_unit(
            self.folder, unit.stem, encoder.dtype, signature_bytes=width
        ) as add:
            wanted = self._wanted(task, _of_part(documents, account), account)
            for batch in batches_by_characters(wanted, lambda item: len(item[0].text)):
                texts, names = zip(*((d.text, d.doc_id) for d, _ in batch), strict=True)
                contents = encoder.encode_contents(texts, names)
                for (document, row), ids in zip(batch, contents, strict=True):
                    add(row, ids)
                    account.num_documents += 1
                    account.num_tokens += len(ids)
                    account.num_characters += len(document.text)
        if task.is_first:
            for name, own in losses.items():
                account.skip(name, own.since(before.get(name, Losses())))
        unit.write_account(account)

    def _documents(
        self, task: UnitTask, encoder: DocumentTokenizer, losses: dict[str, Losses]
    ) -> Iterator[tuple[int, Document]]:
        """Documents of a unit, each with the place of its unit in the group."""
        if task.unit.source != RETRIEVAL_SOURCE:
            yield from task.unit.read(self.corpus, losses)
            return
        assert self.retrieval is not None
        generated = self.retrieval.documents(self.corpus, encoder, self.held_out, self.exclusions)
        yield from ((0, document) for document in generated)

    def _wanted(
        self, task: UnitTask, documents: Iterator[tuple[int, Document]], account: UnitAccount
    ) -> Iterator[tuple[Document, IndexRow]]:
        """Documents to tokenize, with their index rows; all others are counted."""
        for place, document in documents:
            order, content = order_of(self.seed, document.doc_id), content_hash(document.text)
            reason, text_hash = self._reason_against(task, document, content, order / 2**64), b""
            if reason is None:
                text_hash = corpora.text_hash(document.text)
                reason = EXCLUDED if self.exclusions.match(document.doc_id, text_hash) else None
            if reason is None:
                row = IndexRow(
                    doc_id=document.doc_id,
                    unit=place,
                    domain=document.domain,
                    num_characters=len(document.text),
                    text_hash=text_hash,
                    content_hash=content,
                    order=order,
                    signature=signature_of(document.text) if self.with_signatures else b"",
                )
                yield document, row
            elif task.is_first or reason == NOT_NEEDED:
                account.leave_out(account.units[place], reason, len(document.text))
                if reason == HELD_OUT:
                    longest = max(account.longest_heldout_characters, len(document.text))
                    account.longest_heldout_characters = longest

    def _reason_against(
        self, task: UnitTask, document: Document, content: bytes, order: float
    ) -> str | None:
        if task.unit.source == RETRIEVAL_SOURCE:
            return None
        split = self.held_out.split_of(document, content)
        if split is not Split.train:
            return HELD_OUT if split is Split.heldout else UNUSED
        first, last = task.bands[task.classes.of(len(document.text))]
        if order >= last:
            return NOT_NEEDED
        return ALREADY_READ if order < first else None


def _of_part(
    documents: Iterator[tuple[int, Document]], account: UnitAccount
) -> Iterator[tuple[int, Document]]:
    """The documents of one part; counts them, and says whether they are the last."""
    room = PART_CHARACTERS
    for place, document in documents:
        account.num_read += 1
        yield place, document
        room -= len(document.text)
        if room <= 0:
            return
    account.is_last = True


def _part_stem(stem: str, number: int) -> str:
    """Names of the files of a part: the first has those of the unit."""
    return f"{stem}-p{number:03d}" if number else stem


def finished_parts(folder: Path, stem: str) -> list[TokenizedUnit]:
    """The parts of a unit that are complete, in order."""
    parts: list[TokenizedUnit] = []
    while (unit := TokenizedUnit(folder, _part_stem(stem, len(parts)))).is_complete:
        parts.append(unit)
    return parts


def _sum_of(parts: Sequence[TokenizedUnit]) -> UnitAccount:
    """What a unit's progress is shown by."""
    accounts = [part.account() for part in parts]
    number = sum(account.num_tokens for account in accounts)
    return UnitAccount(accounts[0].units, accounts[0].source, num_tokens=number)


def order_of(seed: int, doc_id: str) -> int:
    """Number below 2**64 by which documents are chosen, smallest first; by seed and id alone."""
    return corpora.stable_hash("order", seed, doc_id)
