"""One export: a finished checkpoint found, its folders written, verified, and only then published.

Verified: plain transformers loads a folder and gives the trained model's logits. Without a training
(``export.trained=false``) the base model and factors of any origin stand in for the checkpoint, and
a folder of its own (``untrained``) for the product, so that the one is never taken for the other.
"""

import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrope2.config import from_plain, to_plain
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.run_corpus import corpus_label, corpus_of_run, segments_of
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ArtifactError, ConfigError, DamagedError, DataError
from longrope2.evaluation.subjects import find_base_model, find_checkpoint
from longrope2.export.gguf_file import GGUF_FILE, check_gguf, write_gguf
from longrope2.export.hugging_face import check_exportable, write_hugging_face_folder
from longrope2.export.model_card import StaticCost, measure_static_cost
from longrope2.export.progress import say
from longrope2.export.tokenizer import start_as_trained
from longrope2.export.variants import (
    ExportConfig,
    ExportRoot,
    ExportVariant,
    export_folder,
    final_folders,
    variant_factors,
)
from longrope2.export.verification import verify_export
from longrope2.files import artifacts
from longrope2.files.unchanged import changed_files
from longrope2.model.factors_source import RopeConfig
from longrope2.model.facts import model_name
from longrope2.model.folder import given_folder, model_source
from longrope2.model.loading import load_to_run, load_tokenizer
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod

# Read for the cost of a static choice at most; a large corpus holds out terabytes.
_MOST_COST_CHARACTERS = 4_000_000
# Enough for a token of so many characters on average: a long text is not tokenized to its end.
_CHARACTERS_PER_TOKEN = 16
_Differences = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Export:
    """What is exported, found and checked."""

    config: ExportRoot
    checkpoint: Path
    """Folder of the weights: a finished checkpoint's, or the base model's."""
    factors: RescaleFactors
    inputs: dict[str, dict[str, str]]
    corpus: CorpusConfig | None = None
    """Whose held-out text the cost of a static choice is measured on; None leaves it unmeasured."""
    is_former: bool = False
    """Whether that corpus is the one that the export to be replaced was measured on."""

    @property
    def folder(self) -> Path:
        """The product folder."""
        return export_folder(self.config)

    @property
    def origin(self) -> str | None:
        """What gave untrained weights their factors; None for a trained model."""
        return None if self.config.export.trained else _origin(_rope(self.config))

    @property
    def finals(self) -> list[Path]:
        """Where each wanted variant will stand."""
        return final_folders(self.config)


def find_export(config: ExportRoot) -> Export:
    """Find the weights and their factors, and check that they can be exported as configured.

    Raises:
        ConfigError: the run's corpus is not where it was.
        ArtifactError: they are missing, unfinished, or belong to another model or other lengths.
        FactorsError: the factors cannot be written into a Hugging Face config.
    """
    export = config.export
    if export.trained:
        checkpoint, factors = find_checkpoint(config, "export.checkpoint", export.checkpoint)
        inputs: dict[str, Any] = {"checkpoint": artifacts.describe_input(checkpoint)}
    else:
        checkpoint, factors, inputs = find_base_model(config, _rope(config))
    check_exportable(checkpoint, config.model.original_len, config.target_len)
    for variant in export.variants:
        variant_factors(factors, variant)
    if export.gguf:
        check_gguf(checkpoint, export.gguf_pretokenizer)
    former, corpus = None, _cost_corpus(config)
    if corpus is None and export.cost_windows > 0:
        former = _former_corpus(config)
    return Export(
        config, checkpoint, factors, inputs, corpus=corpus or former, is_former=former is not None
    )


def is_complete(export: Export) -> bool:
    """Whether this checkpoint has been exported with these settings, and every file still stands.

    What is not as it was written is said: it is made again.
    """
    try:
        manifest = artifacts.read_manifest(export.folder, "exports")
    except DamagedError as error:
        print(f"note: {error}: exported again")
        return False
    except ArtifactError:
        return False
    # The checkpoint is compared by its content, wherever it stood; a key that an older manifest
    # does not have came later, and its default was in force.
    found, wanted = (
        to_plain(ExportConfig())
        | plain.get("export", {})
        | {"checkpoint": None, "corpus": plain.get("corpus")}
        for plain in (manifest.config, to_plain(_config_of(export)))
    )
    same = _without_places(manifest.inputs) == _without_places(export.inputs)
    if not (manifest.files and same and found == wanted):
        return False
    changed = changed_files(export.folder, manifest.files)
    for fault in changed:
        print(f"note: {fault}: exported again")
    return not changed


def _without_places(inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Input records without their paths: a run may be moved."""
    return {role: dict(record, path=None) for role, record in inputs.items()}


def _config_of(export: Export) -> ExportRoot:
    """The configuration with the corpus that was taken from the export before."""
    return replace(export.config, corpus=export.corpus) if export.is_former else export.config


def publish(export: Export) -> _Differences:
    """Write beside the final places, verify all, then move; a failure leaves nothing behind.

    Returns the largest difference of the logits over the largest logit, by folder name and length.

    Raises:
        ArtifactError: plain transformers computes something else than our own model.
    """
    unverified = [_unverified(final) for final in export.finals]
    differences: _Differences = {}
    for variant in ExportVariant:  # what a killed export has left, of whatever variants
        shutil.rmtree(_unverified(export.folder / variant.folder_name), ignore_errors=True)
    try:
        cost = static_cost(export)
        for variant, temporary in zip(export.config.export.variants, unverified, strict=True):
            # All variants share the weight files of the first.
            weights_from = unverified[0] if temporary is not unverified[0] else None
            differences[variant.folder_name] = _write(
                export, variant, temporary, cost=cost, weights_from=weights_from
            )
        (export.folder / artifacts.MANIFEST_NAME).unlink(missing_ok=True)
        _remove_former(export)
        for temporary, final in zip(unverified, export.finals, strict=True):
            temporary.rename(final)
    finally:
        for temporary in unverified:
            shutil.rmtree(temporary, ignore_errors=True)
    _write_manifest(export, differences, cost)
    return differences


def _unverified(final: Path) -> Path:
    """Where a folder stands until it is verified."""
    return final.with_name(f".{final.name}.tmp")


def static_cost(export: Export) -> StaticCost | None:
    """What a static choice costs this model on short held-out texts of the run's corpus.

    Where the corpus holds out fewer texts than asked for, all of them are taken, which is printed.

    Raises:
        DataError: the corpus holds out no text at all.
    """
    num_windows, corpus = export.config.export.cost_windows, export.corpus
    if num_windows == 0 or corpus is None:
        return None
    limit = min(corpus.heldout_characters or _MOST_COST_CHARACTERS, _MOST_COST_CHARACTERS)
    try:
        documents = heldout_documents(replace(corpus, heldout_characters=limit))
    except DataError as error:
        raise DataError(f"{error}; export.cost_windows=0 exports without such text") from None
    if num_windows > len(documents):
        few = f"on {len(documents)} texts, all that corpus {corpus.name} holds out"
        print(f"cost       measured {few} (export.cost_windows={num_windows} asks for more)")
        num_windows = len(documents)
    say("measuring", f"the cost of a static choice, on {num_windows} texts")
    tokenizer = load_tokenizer(export.checkpoint)
    encoder = DocumentTokenizer(tokenizer, export.config.model.document_start)
    original_len, windows = export.factors.geometry.original_len, []
    for document in random.Random(export.config.seed).sample(documents, num_windows):
        ids = encoder.encode(document.text[: _CHARACTERS_PER_TOKEN * original_len])
        windows.append(torch.tensor((encoder.start_ids + ids)[: original_len - 1]))
    model = load_to_run(export.checkpoint, export.factors)
    return measure_static_cost(model, windows, f"held out of the corpus `{corpus.name}`")


def cost_in_words(export: Export) -> str:
    """For the plan: what the cost of a static choice is measured on, or why it is not."""
    num_windows = export.config.export.cost_windows
    if num_windows == 0:
        return "of a static choice: not measured (export.cost_windows=0)"
    if export.corpus is not None:
        label = corpus_label(export.corpus)
        measured = f"of a static choice: on {num_windows} texts held out of corpus {label}"
        if export.is_former:
            measured += ", as in the export that stands there; corpus=NAME names another"
        return measured
    where = artifacts.product_folder(export.config.run.folder, "segments")
    lacking = f"{where} holds no segments whose corpus could give the texts"
    return f"of a static choice: not measured, {lacking}; corpus=NAME names one"


def _cost_corpus(config: ExportRoot) -> CorpusConfig | None:
    """The corpus given, or that of the run's segments; None without either."""
    needs_none = config.export.cost_windows == 0
    if needs_none or (config.corpus is None and segments_of(config.run.folder) is None):
        return None
    try:
        return corpus_of_run(config.corpus, config.run.folder)
    except ConfigError as error:
        way_out = "or export.cost_windows=0, which measures nothing on it"
        raise ConfigError([f"{fault}, {way_out}" for fault in error.faults]) from None


def _former_corpus(config: ExportRoot) -> CorpusConfig | None:
    """The corpus that the export to be replaced was measured on, so that its card keeps a cost.

    Raises:
        ConfigError: its folder is not there any more.
    """
    try:
        former = artifacts.read_manifest(export_folder(config), "exports")
    except ArtifactError:
        return None
    given = former.config.get("corpus")
    if given is None or former.details.get("static_cost") is None:
        return None
    there = f"{export_folder(config)} has a cost measured on the corpus that it was given"
    corpus = from_plain(CorpusConfig, given, there)
    try:
        build_corpus(corpus)
    except ConfigError as error:
        way_out = "give corpus=NAME, or export.cost_windows=0 for an export without a cost"
        raise ConfigError([f"{there}: {fault}; {way_out}" for fault in error.faults]) from None
    return corpus


def _write(
    export: Export,
    variant: ExportVariant,
    folder: Path,
    *,
    cost: StaticCost | None,
    weights_from: Path | None,
) -> dict[str, float]:
    """Write one folder and compare it with our own model in the windows that it holds."""
    settings, applied = export.config.export, variant_factors(export.factors, variant)
    dtype, original_len = settings.dtype.torch_dtype, export.factors.geometry.original_len
    say("writing", f"{variant.folder_name}, {settings.dtype.value}")
    write_hugging_face_folder(
        export.checkpoint,
        export.factors,
        folder,
        dtype=dtype,
        variant=variant,
        cost=cost,
        weights_from=weights_from,
        origin=export.origin,
        verify=settings.verify,
    )
    start_as_trained(folder, export.config.model.document_start)
    around = (original_len - 1, original_len, original_len + 1)
    lengths = [length for length in around if length <= applied.target_len][-2:]
    differences = verify_export(
        export.checkpoint, applied, folder, dtype=dtype, lengths=lengths, verify=settings.verify
    )
    if settings.gguf:
        say("writing", f"{variant.folder_name}/{GGUF_FILE}")
        notes = write_gguf(
            folder,
            applied,
            folder / GGUF_FILE,
            name=model_name(export.config.model),
            pretokenizer=settings.gguf_pretokenizer,
        )
        for note in notes:
            print(f"note: {note}")
    return {str(length): difference for length, difference in differences.items()}


def _given(export: Export) -> Path:
    """Folder of the base model."""
    return given_folder(export.config.model, export.config.target_len)


def _rope(config: ExportRoot) -> RopeConfig:
    """The factors of an export without training; by default the run's own search."""
    return config.rope or RopeConfig()


def _origin(rope: RopeConfig) -> str:
    """For the card: what the factors come from. A file by its name, not by its place here."""
    method, file = rope.method, Path(rope.factors or "").name
    if method in CLOSED_FORMS:
        source = "a closed form, which no search or training has fitted to this model"
    elif method is RopeMethod.from_hf:
        source = f"read from the published config of `{file}`"
    elif method is RopeMethod.from_file:
        source = f"read from the file `{file}`"
    else:
        source = f"read from `{file}`" if file else "searched for this model, without training it"
        if method is not RopeMethod.searched:
            source = f"the closed form with a critical dimension {source}"
    in_both = ", in both windows (`rope.both_windows=true`)" if rope.both_windows else ""
    return f"`rope={method.value}`: {source}{in_both}"


def _remove_former(export: Export) -> None:
    """Make room, and leave no folder of another export beside the new ones."""
    for variant in ExportVariant:
        former = export.folder / variant.folder_name
        if former.exists():
            shutil.rmtree(former)
            if former not in export.finals:
                print(f"removed    {former}, which export.variants no longer names")


def _write_manifest(export: Export, differences: _Differences, cost: StaticCost | None) -> None:
    """Declare the export finished."""
    settings, finals = export.config.export, export.finals
    say("hashing", "the folders, for the manifest")
    paths = [path for final in finals for path in sorted(final.iterdir())]
    manifest = artifacts.Manifest(
        "exports",
        inputs=export.inputs,
        config=to_plain(_config_of(export)),
        files={f"{path.parent.name}/{path.name}": artifacts.sha256_of_file(path) for path in paths},
        details={
            "trained": settings.trained,
            "factors": {
                "method": export.factors.method,
                "attention_scales": {
                    str(window): export.factors.attention_scale(window) for window in Window
                },
                "provenance": export.factors.provenance,
            },
            "dtype": settings.dtype.value,
            "variants": [variant.value for variant in settings.variants],
            "gguf": settings.gguf,
            "verify": settings.verify.value,
            "original_len": export.factors.geometry.original_len,
            "target_len": export.factors.target_len,
            "largest_relative_logit_difference": differences,
            "static_cost": None if cost is None else asdict(cost),
            **model_source(export.config.model, _given(export)),
        },
    )
    artifacts.write_manifest(export.folder, manifest)
