"""What there is: the model's window, heads and tokenizer, and the lengths of the documents."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from launch.init.before import InitRoot, stated_window
from longrope2.config import target_faults
from longrope2.corpora.build import build_corpus, files_aside, ignored_files
from longrope2.corpora.corpus import Document, Unit, content_hash, place_of_content, stable_hash
from longrope2.corpora.losses import Losses
from longrope2.corpora.tokenizer import DocumentTokenizer, load_document_tokenizer
from longrope2.errors import ConfigError, DataError
from longrope2.model.folder import find_config_file, given_folder
from longrope2.model.loading import check_model
from longrope2.model.shape import ModelShape

# Texts that are tokenized together.
_BATCH = 64


@dataclass(frozen=True)
class ModelFacts:
    """What a model's own files say of it."""

    folder: Path
    shape: ModelShape
    encoder: DocumentTokenizer
    window: int
    """Tokens."""
    window_source: str


@dataclass(frozen=True)
class DocumentFacts:
    """Lengths of the documents that were read; D of them."""

    tokens_D: np.ndarray
    """Tokens with what starts and ends a document, int64."""
    split_D: np.ndarray
    """Where in [0, 1) a document stands: held out where it is below ``corpus.heldout_fraction``."""
    endings: Counter[str]
    """Files by what their names end in."""
    scale: float
    """All bytes over those that were read: 1 where everything was."""
    ignored: dict[str, int]
    """Files that no stage reads, by their endings."""
    aside: dict[str, int]
    """Files and links that no stage reads, by other reasons."""
    losses: Losses
    """Records that cannot be used, and damaged files, of what was read."""

    def train(self, heldout_fraction: float) -> np.ndarray:
        """Tokens of the documents that are packed."""
        return self.tokens_D[self.split_D >= heldout_fraction]

    def heldout(self, heldout_fraction: float) -> np.ndarray:
        """Tokens of the others."""
        return self.tokens_D[self.split_D < heldout_fraction]


def look_at_model(config: InitRoot) -> ModelFacts:
    """The model; sets ``config.model.original_len`` where it was not given.

    Raises:
        ConfigError: its window is stated nowhere.
        UserError: the model cannot be found, read, or extended by this project.
    """
    given, source = config.model.original_len, "as given"
    if not given:
        file = find_config_file(config.model.path, "model.path")
        given, source = stated_window(file, config.model)
    config.model.original_len = given
    if faults := target_faults(config.model, config.target_len, extends=True):
        raise ConfigError(faults)
    folder = given_folder(config.model, config.target_len)
    check_model(folder, given)
    encoder = load_document_tokenizer(folder, config.model.document_start)
    shape = ModelShape.from_folder(folder)
    return ModelFacts(folder, shape, encoder, window=given, window_source=source)


def look_at_documents(config: InitRoot, encoder: DocumentTokenizer) -> DocumentFacts:
    """Read the corpus, or as much of it as ``most_characters`` allows.

    Raises:
        ConfigError: the corpus cannot be read.
        DataError: it holds no document.
    """
    corpus, room = build_corpus(config.corpus), config.most_characters
    units = list(corpus.units())
    drawn = sorted(units, key=lambda unit: stable_hash("init", unit.name))
    tokens: list[int] = []
    splits: list[float] = []  # as ``split_of`` draws them
    read: list[Unit] = []
    losses = Losses()
    for unit in drawn:
        if room <= 0:
            break
        documents = list(corpus.read(unit, losses))
        room -= sum(len(document.text) for document in documents)
        tokens += _tokens_of(documents, encoder)
        splits += [place_of_content(content_hash(document.text)) for document in documents]
        read.append(unit)
    if not tokens:
        given = f"corpus.folder={config.corpus.folder}"
        raise DataError(f"{given}: none of its {len(units)} files holds a document with text")
    sizes = [sum(unit.size_bytes or 1 for unit in those) for those in (units, read)]
    endings = Counter(PurePosixPath(unit.name).suffix or unit.source for unit in units)
    return DocumentFacts(
        tokens_D=np.asarray(tokens, dtype=np.int64),
        split_D=np.asarray(splits),
        endings=endings,
        scale=sizes[0] / sizes[1],
        ignored=ignored_files(config.corpus),
        aside=files_aside(config.corpus),
        losses=losses,
    )


def _tokens_of(documents: list[Document], encoder: DocumentTokenizer) -> list[int]:
    """Tokens of each, with what stands before and behind it."""
    counts: list[int] = []
    for first in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[first : first + _BATCH]]
        counts += encoder.count_tokens(texts)
    return [count + encoder.num_boundary_tokens for count in counts]
