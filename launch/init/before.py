"""The settings of ``launch.init``, and what it would be refused for before torch is imported."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from longrope2.config import SHORTEST_WINDOW, ModelConfig, StageConfig, find_shipped, target_faults
from longrope2.corpora.build import build_corpus, ignored_files
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.folder_files import PLAIN_TEXT_ENDINGS
from longrope2.errors import ConfigError
from longrope2.model.facts import model_name
from longrope2.model.folder import look_before
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.planning.hardware import HardwareConfig
from longrope2.presets import CONF_FOLDER, FILE_SUFFIXES, OWN_EXPERIMENTS

_UNNAMED = "auto"


@dataclass
class InitRoot(StageConfig):
    """Configuration of the command."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Your documents."""
    hardware: HardwareConfig | None = None
    """Machine that will train; null is the one that this command runs on."""
    processes: int | None = None
    """Processes that will train; null is one for each GPU, or one on a machine without."""
    file: str | None = None
    """Where the experiment is written; null is ``conf/experiment/NAME.yaml`` in the current folder,
    where every command finds it by its name."""
    most_characters: int = 50_000_000
    """Of the documents no more characters than these are read; of the others, files drawn by their
    names stand for all."""


def prepare(config: InitRoot) -> Path:
    """Names and places, absolute where they are folders; the file that will be written.

    Raises:
        ConfigError: everything that can be said of settings, model and folder, together.
    """
    faults = []
    if config.corpus.kind is not CorpusKind.folder or config.corpus.folder is None:
        faults.append("launch.init looks at documents of your own: give corpus.folder=FOLDER")
    elif Path(config.corpus.folder).is_dir():
        config.corpus.folder = str(Path(config.corpus.folder).resolve())
    if config.processes is not None and config.processes < 1:
        faults.append(f"processes={config.processes} must be at least 1, or null")
    if config.most_characters < 1:
        faults.append(f"most_characters={config.most_characters} must be at least 1")
    if (folder := find_shipped(config.model.path)).is_dir():
        config.model.path = str(folder.resolve())
    config.model.name = model_name(config.model)
    if config.run.name == _UNNAMED:
        config.run.name = f"{config.model.name}_{config.target_len}"
    path = Path(config.file or OWN_EXPERIMENTS / f"{config.run.name.replace('/', '_')}.yaml")
    if path.suffix not in FILE_SUFFIXES:
        faults.append(f"file={path} must end in {FILE_SUFFIXES[0]}")
    shipped = CONF_FOLDER / "experiment" / path.name
    there = path if path.exists() else shipped if config.file is None else path
    if there.exists() and not config.dry_run:
        way_out = "give run.name=NAME or file=FILE for another one, or remove it"
        faults.append(f"{there} is there already: {way_out}")
    if faults := [*faults, *_model_faults(config), *_corpus_faults(config)]:
        raise ConfigError(faults)
    return path


def _model_faults(config: InitRoot) -> Iterator[str]:
    """Of the model, as far as its folder says."""
    look = look_before(config.model)
    yield from [*look.faults, *look.missing_files()]
    if look.folder is None or look.faults:
        return
    try:
        given = config.model.original_len
        window = given or stated_window(look.folder / CONFIG_FILE, config.model)[0]
    except ConfigError as error:
        yield from error.faults
        return
    model = replace(config.model, original_len=window)
    yield from target_faults(model, config.target_len, extends=True)


def _corpus_faults(config: InitRoot) -> tuple[str, ...]:
    """Of the folder of documents."""
    if config.corpus.kind is not CorpusKind.folder or config.corpus.folder is None:
        return ()  # said already
    try:
        take_plain_text(config.corpus)
        build_corpus(config.corpus)
    except ConfigError as error:
        return error.faults
    return ()


def take_plain_text(corpus: CorpusConfig) -> None:
    """Add the endings of plain text that are there to ``more_text_endings``."""
    found = [ending for ending in ignored_files(corpus) if ending in PLAIN_TEXT_ENDINGS]
    corpus.more_text_endings = [*corpus.more_text_endings, *found]


def stated_window(file: Path, model: ModelConfig) -> tuple[int, str]:
    """The pre-trained window that a model's config.json states, and what does.

    Raises:
        ConfigError: none is stated.
    """
    key = "max_position_embeddings"
    stated = {**read_raw_config(file), **model.config}.get(key)
    if isinstance(stated, int) and stated >= SHORTEST_WINDOW:
        return stated, f"{key} of its config.json"
    fault = f"{file} states no window ({key}={stated})"
    raise ConfigError([f"{fault}; give model.original_len=TOKENS, what it was trained with"])
