"""What evaluating, exporting or generating would be refused for and can be known at once.

Before torch is imported: files that are missing, and those that are of other lengths. Whether they
belong to the model is asked later (``subjects.py``).
"""

from collections.abc import Sequence
from pathlib import Path

from longrope2.config import StageConfig
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import CorpusKind
from longrope2.corpora.run_corpus import missing_corpus
from longrope2.errors import ArtifactError, ConfigError, FactorsError, MissingError, UserError
from longrope2.evaluation.config import EvaluateRoot, SubjectConfig, settings_faults
from longrope2.files.artifacts import MANIFEST_NAME, Manifest, product_folder, read_manifest
from longrope2.files.checked import read_text
from longrope2.files.unchanged import require_unchanged
from longrope2.model.exported import export_manifest, untrained_exports
from longrope2.model.factors_source import FACTORS_FILE, factors_faults, missing_factors
from longrope2.model.folder import ModelLook
from longrope2.model.shape import CONFIG_FILE
from longrope2.rope.factors import RescaleFactors


def known_faults(config: EvaluateRoot, look: ModelLook) -> list[str]:
    """All faults of an evaluation that are known without loading anything.

    Args:
        config: What was given.
        look: At the base model, by ``look_before``.
    """
    config = look.with_its_window(config)
    faults = [*look.faults, *settings_faults(config), *look.missing_files()]
    # Places elsewhere are tried when they are read.
    if config.corpus is not None and config.corpus.kind is CorpusKind.folder:
        try:
            build_corpus(config.corpus)
        except ConfigError as error:
            faults += error.faults
    waiting = missing_inputs(config) if config.dry_run else {}
    for index, subject in enumerate(config.evaluation.subjects):
        found, place = [], subject_place(index, subject)
        if place in waiting:
            continue
        if subject.rope is not None:
            found = factors_faults(
                subject.rope, config.run.folder_with("factors"), config.target_len
            )
        elif subject.checkpoint is not None:
            found = _checkpoint_faults(config, Path(subject.checkpoint))
        faults += [f"{place}: {fault}" for fault in found]
    return faults


def missing_inputs(config: EvaluateRoot) -> dict[str, str]:
    """What an evaluation reads and other commands have not made yet.

    Returns:
        ``corpus`` or the place of a subject (``subject_place``) -> the fault, which names the
        command that makes it.
    """
    missing = {}
    if config.reads_text and (fault := missing_corpus(config.corpus, config.run.folder)):
        missing["corpus"] = fault
    for index, subject in enumerate(config.evaluation.subjects):
        if fault := _missing_subject(config, subject):
            place = subject_place(index, subject)
            missing[place] = f"{place}: {fault}"
    return missing


def subject_place(index: int, subject: SubjectConfig) -> str:
    """How messages name a subject."""
    return f"evaluation.subjects[{index}] ({subject.name})"


def _missing_subject(config: EvaluateRoot, subject: SubjectConfig) -> str | None:
    if subject.rope is not None:
        return missing_factors(subject.rope, config.run.folder_with("factors"))
    try:
        require_subject(Path(subject.checkpoint or "."))
    except MissingError as error:
        return str(error)
    return None


def _checkpoint_faults(config: StageConfig, folder: Path) -> list[str]:
    """Why a subject's checkpoint or export cannot be read."""
    try:
        require_subject(folder)
        read_factors_beside(folder, config.model.original_len, config.target_len)
    except UserError as error:
        return [str(error)]
    return []


def require_subject(folder: Path) -> None:
    """Raise MissingError unless the checkpoint or export of a subject is there."""
    if not folder.is_dir():
        way_out = "run launch.train first, or leave the subject out"
        raise MissingError(f"checkpoint={folder} does not exist; {way_out}")


def trained_folder(
    config: StageConfig, key: str, given: str | None, *, or_exports: Sequence[Path] = ()
) -> Path:
    """The checkpoint of a stage: ``given`` at ``key``, else what the run trained.

    Args:
        config: Of the stage.
        key: Where a checkpoint is given.
        given: What is.
        or_exports: Exports that would do too, where the run has not trained.

    Raises:
        MissingError: it is not there.
    """
    folder = Path(given or product_folder(config.run.folder, "checkpoints") / "final")
    if folder.is_dir():
        return folder
    way_out = "run launch.train first"
    if given is None and or_exports:
        ways = " or ".join(f"{key}={export}" for export in or_exports)
        way_out += f", or give {ways}, which this run exported without training"
    raise MissingError(f"{key}={folder} does not exist; {way_out}")


def trained_faults(
    config: StageConfig, key: str, given: str | None, *, takes_exports: bool = False
) -> list[str]:
    """Why the checkpoint (or export) of a stage cannot be used, as far as its files say.

    In a dry run one that is not there is no fault (``missing_checkpoint``).
    """
    exports = untrained_exports(config.run.folder) if takes_exports else ()
    try:
        folder = trained_folder(config, key, given, or_exports=exports)
        read_factors_beside(folder, config.model.original_len, config.target_len)
    except MissingError as error:
        return [] if config.dry_run else [str(error)]
    except UserError as error:
        return [str(error)]
    return []


def missing_checkpoint(
    config: StageConfig, key: str, given: str | None, *, takes_exports: bool = False
) -> str | None:
    """The fault of a checkpoint (or export) that is not there yet; None where it is."""
    exports = untrained_exports(config.run.folder) if takes_exports else ()
    try:
        trained_folder(config, key, given, or_exports=exports)
    except MissingError as error:
        return str(error)
    return None


CHECKPOINT_WAY_OUT = (
    "bring it back; or remove manifest.json of 3_checkpoints, and launch.train writes final/ again "
    "from its newest checkpoint"
)


def finished_checkpoint(folder: Path) -> Manifest:
    """The manifest of a finished checkpoint, which must list what a model needs.

    Raises:
        ArtifactError: there is none, or it lists no configuration, factors, tokenizer or weights.
    """
    manifest = read_manifest(folder, "checkpoint")
    needed = {CONFIG_FILE: CONFIG_FILE, FACTORS_FILE: FACTORS_FILE}
    needed |= {"tokenizer": "tokenizer.", "*.safetensors": ".safetensors"}
    lacking = [
        what for what, part in needed.items() if not any(part in name for name in manifest.files)
    ]
    if lacking:
        fault = f"{folder / MANIFEST_NAME} lists no {', '.join(lacking)}"
        raise ArtifactError(f"{fault}: it is of no whole checkpoint; {CHECKPOINT_WAY_OUT}")
    return manifest


def require_unchanged_subject(folder: Path) -> None:
    """Refuse a checkpoint or an export whose files are not as they were written.

    Raises:
        ArtifactError: names the files, and what to do; or it is neither.
    """
    exported = export_manifest(folder)
    if exported is None:
        require_unchanged(folder, finished_checkpoint(folder).files, CHECKPOINT_WAY_OUT)
        return
    own = {
        name: digest for name, digest in exported.files.items() if folder_of(name) == folder.name
    }
    way_out = "bring it back, or give launch.export's command again, which makes it again"
    require_unchanged(folder.absolute().parent, own, way_out)


def folder_of(name: str) -> str:
    """The first folder of a file name of a manifest."""
    return name.partition("/")[0]


def read_factors_beside(folder: Path, original_len: int, target_len: int) -> RescaleFactors:
    """The factors that stand beside the weights of a checkpoint or an export.

    Raises:
        ArtifactError: the checkpoint is unfinished, has no factors, or was trained for other
            lengths.
    """
    if export_manifest(folder) is None:
        finished_checkpoint(folder)
    path = folder / FACTORS_FILE
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; a checkpoint of launch.train has one")
    try:
        factors = RescaleFactors.from_json(read_text(path, "a factors file", CHECKPOINT_WAY_OUT))
    except FactorsError as error:
        raise ArtifactError(f"{path}: {error}; {CHECKPOINT_WAY_OUT}") from None
    faults = []
    for key, found, wanted in (
        ("model.original_len", factors.geometry.original_len, original_len),
        ("target_len", factors.target_len, target_len),
    ):
        if found != wanted:
            fault = f"{path} is for {key}={found}, but {key}={wanted} is set"
            faults.append(f"{fault}; set {key}={found}")
    if faults:
        raise ArtifactError("; ".join(faults))
    return factors
