"""One corpus per run: search, evaluation and export read the text that the segments hold out.

What is measured is then the user's own text, and none of it was trained on. Another corpus has to
be asked for (``corpus=``), and whoever shows figures says which text they are of (``HeldoutText``).
A run without segments has no corpus of its own and must be given one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longrope2.config import from_plain
from longrope2.corpora.config import (
    HELDOUT_FRACTION,
    PLACES_OF_A_DESCRIPTION,
    CorpusConfig,
    CorpusKind,
)
from longrope2.errors import ConfigError
from longrope2.files.artifacts import (
    MANIFEST_NAME,
    Manifest,
    find_segments,
    product_folder,
    read_manifest,
    sha256_of_file,
)

# What is no part of a corpus' content: how it is called and where it stands.
_PLACE = ("name", *PLACES_OF_A_DESCRIPTION)


@dataclass(frozen=True)
class HeldoutText:
    """Which text figures are of."""

    corpus: str
    """Name of the corpus that it is held out of, and its folder where it is one."""
    own: str | None
    """The same of the corpus that the run's segments were packed from; None without segments."""
    is_other: bool
    """Whether the two hold different documents."""

    def __str__(self) -> str:
        """For the caption of a table."""
        held_out = f"Text: held out of corpus {self.corpus}"
        if self.own is None:
            return f"{held_out}; the run has no segments."
        if not self.is_other:
            return f"{held_out}, the run's own."
        if self.corpus == self.own:
            return f"{held_out}, which has changed since the run's segments were packed."
        return f"{held_out}, not of the run's own corpus, {self.own}."


def segments_of(run_folder: Path) -> Path | None:
    """The finished segments that a run was trained on, or else has; None without any."""
    own = find_segments(run_folder) or product_folder(run_folder, "segments")
    checkpoints = product_folder(run_folder, "checkpoints")
    is_own = (own / MANIFEST_NAME).is_file()
    if (checkpoints / MANIFEST_NAME).is_file():
        trained_on = read_manifest(checkpoints, "checkpoints").inputs.get("segments")
        own_sha256 = sha256_of_file(own / MANIFEST_NAME) if is_own else None
        if trained_on is None or trained_on["sha256"] == own_sha256:
            return own if is_own else None
        elsewhere = Path(trained_on["path"])
        if (elsewhere / MANIFEST_NAME).is_file():
            return elsewhere
    return own if is_own else None


def packed_corpus(run_folder: Path) -> CorpusConfig | None:
    """The corpus that a run's segments were packed from; None without segments.

    Raises:
        ConfigError: their manifest holds keys that this version does not know.
    """
    found = _segments_manifest(run_folder)
    return None if found is None else _corpus_in(*found)


def corpus_of_run(given: CorpusConfig | None, run_folder: Path) -> CorpusConfig:
    """The corpus that a stage after packing reads: the one given, or else that of the segments.

    Raises:
        ConfigError: none is given and there are no segments, or their folder of texts is gone; or
            the one given holds out documents that the segments may hold.
    """
    if (fault := missing_corpus(given, run_folder)) is not None:
        raise ConfigError([fault])
    found = _segments_manifest(run_folder)
    if found is None:
        assert given is not None
        return given
    if given is None:
        packed = _corpus_in(*found)
        if (fault := _fault_of_place(packed, found[0])) is not None:
            raise ConfigError([fault])
        return packed
    if faults := list(_faults_of_share(given, *found)):
        raise ConfigError(faults)
    return given


def missing_corpus(given: CorpusConfig | None, run_folder: Path) -> str | None:
    """The fault of a stage that has no corpus: none is given, and there are no segments yet."""
    if given is not None or segments_of(run_folder) is not None:
        return None
    where = product_folder(run_folder, "segments")
    own = "corpus=sample (the Python standard library) or corpus=folder corpus.folder=DIR"
    fault = f"corpus is not chosen, and {where} holds no segments to take it from"
    return f"{fault}; give corpus=NAME, for example {own}, or run data_prep.pack first"


def heldout_text(
    config: CorpusConfig, description: Mapping[str, Any], run_folder: Path
) -> HeldoutText:
    """Which text a stage of a run has read.

    Args:
        config: The corpus it was read from.
        description: What ``Corpus.describe`` says of it.
        run_folder: Folder of the run.
    """
    found = _segments_manifest(run_folder)
    if found is None:
        return HeldoutText(corpus_label(config), None, is_other=False)
    packed = found[1].inputs.get("corpus", {})
    is_other = _content(packed) != _content(description)
    return HeldoutText(corpus_label(config), corpus_label(_corpus_in(*found)), is_other=is_other)


def corpus_label(config: CorpusConfig) -> str:
    """A corpus by its name, and its folder where it is one."""
    is_folder = config.kind is CorpusKind.folder
    return f"{config.name} ({config.folder})" if is_folder else config.name


def _segments_manifest(run_folder: Path) -> tuple[Path, Manifest] | None:
    folder = segments_of(run_folder)
    return None if folder is None else (folder, read_manifest(folder, "segments"))


def _corpus_in(folder: Path, manifest: Manifest) -> CorpusConfig:
    """The corpus that a manifest of segments names."""
    where = f"{folder / MANIFEST_NAME}: its corpus cannot be taken"
    try:
        return from_plain(CorpusConfig, manifest.config.get("corpus", {}), where)
    except ConfigError as error:
        raise ConfigError([f"{fault}; give corpus=NAME" for fault in error.faults]) from None


def _fault_of_place(packed: CorpusConfig, segments: Path) -> str | None:
    """Why a folder of texts cannot be read any more."""
    if packed.folder is None or CorpusKind.folder not in (packed.kind, *packed.members):
        return None
    if Path(packed.folder).is_dir():
        return None
    gone = f"{segments} was packed from corpus.folder={packed.folder}, which is not there any more"
    return f"{gone}; give its new place: {' '.join(_words(packed))}"


def _words(packed: CorpusConfig) -> Iterator[str]:
    """Settings that name the corpus in another place."""
    yield f"corpus={packed.kind.value if packed.kind is CorpusKind.folder else packed.name}"
    yield "corpus.folder=DIR"
    for field in fields(CorpusConfig):
        value = getattr(packed, field.name)
        is_default = value == field.default or value == packed.kind.value
        if isinstance(value, (str, float)) and field.name != "folder" and not is_default:
            yield f"corpus.{field.name}={value}"
    if packed.more_text_endings:
        yield f"corpus.more_text_endings=[{','.join(packed.more_text_endings)}]"


def _faults_of_share(given: CorpusConfig, folder: Path, manifest: Manifest) -> Iterator[str]:
    """A larger share of the same corpus is held out than the segments left out."""
    packed = manifest.config.get("corpus", {})
    share = packed.get("heldout_fraction", HELDOUT_FRACTION)
    place = (packed.get("kind"), packed.get("members", []), packed.get("folder"))
    kinds = [kind.value for kind in given.members]
    if (given.kind.value, kinds, given.folder) != place or given.heldout_fraction <= share:
        return
    fault = f"corpus.heldout_fraction={given.heldout_fraction} is more than the {share} that"
    trained = f"{folder} left out, so that texts in the segments would count as held out"
    yield f"{fault} {trained}; use at most {share}, or pack again with more"


def _content(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description without places; those of the members of a mix stand one level below."""
    plain = {key: value for key, value in description.items() if key not in _PLACE}
    members = {kind.value for kind in CorpusKind}
    return {k: _content(v) if k in members and isinstance(v, dict) else v for k, v in plain.items()}
