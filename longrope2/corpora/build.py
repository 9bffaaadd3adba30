"""The corpus that a configuration describes: one adapter, or several as one (``paper``)."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Corpus, Document, Split, Unit
from longrope2.corpora.filters import FilteredCorpus, filter_faults, recorded_names
from longrope2.corpora.losses import Losses, named_files, printable
from longrope2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from longrope2.corpora.folder_files import FolderFiles


def build_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that ``config`` describes, with its files listed and its places tried.

    Public places are tried side by side, so that waiting for several costs no more than for one.

    Raises:
        ConfigError: a key the adapter needs is missing, a folder does not exist or holds no usable
            file, or public sources cannot be read; all of them together, each with what to do.
    """
    if faults := [*_faults(config), *filter_faults(config)]:
        raise ConfigError(faults)
    corpus = _unfiltered(config)
    if unknown := sorted({s for rule in config.filters for s in rule.sources} - {*corpus.sources}):
        known = ", ".join(corpus.sources)
        fault = f"corpus.filters: the corpus has no source {', '.join(unknown)}; it has {known}"
        raise ConfigError([fault])
    return FilteredCorpus(corpus, config.filters) if config.filters else corpus


def _unfiltered(config: CorpusConfig) -> Corpus:
    if config.kind is not CorpusKind.mix:
        return _adapter(config, config.kind)
    corpora, faults = {}, []
    with ThreadPoolExecutor(max_workers=len(config.members)) as pool:
        futures = {kind: pool.submit(_adapter, config, kind) for kind in config.members}
    for kind, future in futures.items():
        try:
            corpora[kind.value] = future.result()
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return MixedCorpus(corpora, heldout_fraction=config.heldout_fraction)


def heldout_documents(config: CorpusConfig) -> list[Document]:
    """Documents of the held-out split, for needle samples and perplexity.

    Says on stderr what was left out as faulty.

    Raises:
        DataError: the held-out split is empty.
    """
    documents, num_characters = [], 0
    skipped = Losses()
    for document in build_corpus(config).documents(Split.heldout, skipped):
        documents.append(document)
        num_characters += len(document.text)
        if config.heldout_characters is not None and num_characters >= config.heldout_characters:
            break
    if skipped:
        counts = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        print(f"corpus {config.name}, records left out while reading: {counts}", file=sys.stderr)
    for line in named_files(skipped.files, "the others are not named"):
        print(f"  damaged: {line}", file=sys.stderr)
    if not documents:
        raise DataError(
            f"corpus.name={config.name}: no document fell into the held-out split "
            f"(corpus.heldout_fraction={config.heldout_fraction}); use a larger corpus, or a "
            "larger fraction: 1.0 holds out all documents of a folder that only serves search or "
            "evaluation"
        )
    return documents


def ignored_files(config: CorpusConfig) -> dict[str, int]:
    """Ending -> files of the corpus' folder that are not read because of it."""
    found = _folder_files(config)
    return {} if found is None else found.ignored


def files_aside(config: CorpusConfig) -> dict[str, int]:
    """Other reasons (hidden, links without an end) -> what is not read of the corpus' folder."""
    found = _folder_files(config)
    return {} if found is None else found.aside


def _folder_files(config: CorpusConfig) -> "FolderFiles | None":
    if config.folder is None or CorpusKind.folder not in (config.kind, *config.members):
        return None
    if not Path(config.folder).is_dir():
        return None  # ``build_corpus`` says so
    from longrope2.corpora.folder_files import list_folder

    return list_folder(
        Path(config.folder),
        text_endings=config.more_text_endings,
        text_fields=[config.text_field, *config.more_text_fields],
    )


def heldout_texts(config: CorpusConfig) -> list[str]:
    """Texts of ``heldout_documents``."""
    return [document.text for document in heldout_documents(config)]


def _faults(config: CorpusConfig) -> Iterator[str]:
    """Values that are wrong whatever the files are."""
    if not 0.0 <= config.heldout_fraction <= 1.0:
        yield f"corpus.heldout_fraction={config.heldout_fraction} must be from 0 to 1"
    most = config.heldout_characters
    if most is not None and most < 1:
        yield f"corpus.heldout_characters={most} must be at least 1, or null"
    if config.kind is CorpusKind.mix:
        allowed = ", ".join(kind.value for kind in CorpusKind if kind is not CorpusKind.mix)
        names = [kind.value for kind in config.members]
        if not names or len(set(names)) < len(names) or CorpusKind.mix in config.members:
            yield f"corpus.members={names}: name different ones of {allowed}"
    wrong = [end for end in config.more_text_endings if not end.startswith(".") or len(end) < 2]
    if wrong:
        yield f"corpus.more_text_endings={wrong}: an ending starts with a dot, like .md"
    if CorpusKind.folder in (config.kind, *config.members):
        yield from _place_faults(config.folder)


def _place_faults(folder: str | None) -> Iterator[str]:
    """What is no path of this machine."""
    if folder is None:
        yield "corpus.folder is not set; corpus=folder needs corpus.folder=PATH"
        return
    if "://" in folder:
        yield (
            f"corpus.folder={folder} is an address; your own files are read from a folder of this "
            "machine: copy or mount it (public corpora are read from addresses: "
            "corpus.SOURCE.root=URL)"
        )
    if folder != printable(folder):
        unnamed = "the path has bytes that are no UTF-8, which no file of a run can hold"
        yield f"corpus.folder={printable(folder)}: {unnamed}; rename it, or give a link to it"


def _adapter(config: CorpusConfig, kind: CorpusKind) -> Corpus:
    """One adapter; only its own module is imported."""
    heldout, recorded = config.heldout_fraction, recorded_names(config.filters, kind.value)
    match kind:
        case CorpusKind.sample:
            from longrope2.corpora.sample import SampleCorpus

            return SampleCorpus(heldout_fraction=heldout)
        case CorpusKind.folder:
            from longrope2.corpora.folder import FolderCorpus

            assert config.folder is not None
            return FolderCorpus(
                config.folder,
                text_field=config.text_field,
                more_text_fields=config.more_text_fields,
                title_field=config.title_field,
                more_text_endings=config.more_text_endings,
                heldout_fraction=heldout,
            )
        case CorpusKind.redpajama_v1 | CorpusKind.redpajama_v2:
            from longrope2.corpora import redpajama

            if kind is CorpusKind.redpajama_v1:
                return redpajama.redpajama_v1(config.redpajama_v1, heldout)
            return redpajama.redpajama_v2(config.redpajama_v2, heldout, recorded)
        case CorpusKind.starcoder:
            from longrope2.corpora.starcoder import starcoder

            return starcoder(config.starcoder, heldout)
        case CorpusKind.fineweb_edu | CorpusKind.pg19:
            from longrope2.corpora.books_and_web import fineweb_edu, pg19

            if kind is CorpusKind.fineweb_edu:
                return fineweb_edu(config.fineweb_edu, heldout, recorded)
            return pg19(config.pg19)
        case CorpusKind.mix:
            raise AssertionError("a mix has no mix among its members")


class MixedCorpus:
    """The units of its members (name -> corpus), one after the other; their sources must differ."""

    def __init__(self, members: Mapping[str, Corpus], *, heldout_fraction: float) -> None:
        self.heldout_fraction = heldout_fraction
        self._members = dict(members)
        self._by_source = {s: corpus for corpus in members.values() for s in corpus.sources}

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of all members."""
        return tuple(self._by_source)

    def units(self) -> Sequence[Unit]:
        """Units of all members."""
        return [unit for corpus in self._members.values() for unit in corpus.units()]

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one unit, read by the member it belongs to."""
        return self._by_source[unit.source].read(unit, skipped)

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split, one of every member in turn: a reader may stop early."""
        turns = [corpus.documents(split, skipped) for corpus in self._members.values()]
        while turns:
            for turn in list(turns):
                document = next(turn, None)
                if document is None:
                    turns.remove(turn)
                else:
                    yield document

    def reserved(self) -> Iterator[Document]:
        """Those of all members."""
        for corpus in self._members.values():
            yield from corpus.reserved()

    def describe(self) -> dict[str, Any]:
        """Description of every member."""
        return {name: corpus.describe() for name, corpus in self._members.items()}
