"""``python -m launch.export``: the run's trained model as Hugging Face folders, checked by loading
them again.

A folder (``5_exports/hugging_face``, or one per ``export.variants``) appears only after plain
transformers has loaded it and given the logits of the trained model on either side of the window
switch, as far as the folder reaches.
"""

import random
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longrope2.command import run_command
from longrope2.config import claim_folder, compose, to_plain
from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ArtifactError, ConfigError
from longrope2.evaluation.subjects import check_same_model, read_checkpoint_factors
from longrope2.export.gguf_file import GGUF_FILE, check_gguf, write_gguf
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.model_card import StaticCost, measure_static_cost
from longrope2.export.variants import ExportRoot, ExportVariant, check, variant_factors
from longrope2.export.verification import verify_export
from longrope2.files.artifacts import (
    Manifest,
    describe_input,
    product_folder,
    read_manifest,
    sha256_of_file,
    write_manifest,
)
from longrope2.model.folder import model_identity, resolve_model_folder
from longrope2.model.loading import load_to_run, load_tokenizer
from longrope2.rope.factors import RescaleFactors

COST_TEXT = "held-out Python documentation and sources"


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, found and checked."""

    checkpoint: Path
    factors: RescaleFactors
    inputs: dict[str, dict[str, str]]


def main() -> None:
    """Compose, check, plan, write, verify, publish."""
    config = compose(ExportRoot, "export", sys.argv[1:])
    check(config)
    plan = make_plan(config)
    folder = product_folder(config.run.folder, "exports")
    factors = plan.factors
    print(
        f"checkpoint {plan.checkpoint}: window {factors.geometry.original_len} -> {factors.target_len}"
    )
    for final in final_folders(folder, config):
        print(f"export     {final}, {config.export.dtype.value}, rope {factors.method}")
    if config.dry_run:
        return
    if _is_complete(folder, config, plan):
        print(f"already complete: {', '.join(map(str, final_folders(folder, config)))}")
        return
    claim_folder(folder, config, changeable=("dry_run", "export"))
    differences = _publish(plan, config, folder)
    for name, by_length in differences.items():
        for length, difference in by_length.items():
            print(
                f"verified   at {length} tokens: {name} differs by at most {difference:.1e} of the largest logit"
            )
    print(f"export in {', '.join(map(str, final_folders(folder, config)))}")


def final_folders(folder: Path, config: ExportRoot) -> list[Path]:
    """Where each wanted variant will stand."""
    return [folder / variant.folder_name for variant in config.export.variants]


def make_plan(config: ExportRoot) -> ExportPlan:
    """Find the checkpoint and check that it is finished and belongs to the configured model and
    lengths.

    Raises:
        ArtifactError: it does not.
        FactorsError: its factors cannot be written into a Hugging Face config.
    """
    own = product_folder(config.run.folder, "checkpoints") / "final"
    checkpoint = Path(config.export.checkpoint) if config.export.checkpoint else own
    if not checkpoint.is_dir():
        raise ArtifactError(
            f"export.checkpoint={checkpoint} does not exist; run launch.train first"
        )
    factors = read_checkpoint_factors(checkpoint, config.model.original_len, config.target_len)
    check_same_model(
        f"export.checkpoint={checkpoint}",
        model_identity(checkpoint),
        resolve_model_folder(config.model.path),
    )
    for variant in config.export.variants:
        variant_factors(factors, variant)
    if config.export.gguf:
        check_gguf(
            checkpoint, resolve_model_folder(config.model.path), config.export.gguf_pretokenizer
        )
    return ExportPlan(checkpoint, factors, {"checkpoint": describe_input(checkpoint)})


def _is_complete(folder: Path, config: ExportRoot, plan: ExportPlan) -> bool:
    """Whether this very checkpoint has been exported with these very settings, and still stands there."""
    try:
        manifest = read_manifest(folder, "exports")
    except ArtifactError:
        return False
    # The checkpoint is compared by its content, wherever it stood.
    found, wanted = (
        plain.get("export", {}) | {"checkpoint": None}
        for plain in (manifest.config, to_plain(config))
    )
    there = all(final.is_dir() for final in final_folders(folder, config))
    return there and manifest.inputs == plan.inputs and found == wanted


def _publish(plan: ExportPlan, config: ExportRoot, folder: Path) -> dict[str, dict[int, float]]:
    """Write beside the final places, verify all, then move; an export that fails leaves nothing behind."""
    finals = final_folders(folder, config)
    unverified = [final.with_name(f".{final.name}.tmp") for final in finals]
    try:
        cost = _static_cost(plan, config)
        differences = {}
        for variant, temporary in zip(config.export.variants, unverified, strict=True):
            shutil.rmtree(temporary, ignore_errors=True)
            weights_from = unverified[0] if temporary is not unverified[0] else None
            write_hugging_face_folder(
                plan.checkpoint,
                plan.factors,
                temporary,
                config.export.dtype.torch_dtype,
                variant,
                cost,
                weights_from,
            )
            differences[variant.folder_name] = _verify(plan, config, variant, temporary)
            if config.export.gguf:
                applied, base_folder = (
                    variant_factors(plan.factors, variant),
                    resolve_model_folder(config.model.path),
                )
                write_gguf(
                    temporary,
                    applied,
                    temporary / GGUF_FILE,
                    base_folder,
                    config.export.gguf_pretokenizer,
                )
        (folder / "manifest.json").unlink(missing_ok=True)
        _remove_former(folder, finals)
        for temporary, final in zip(unverified, finals, strict=True):
            temporary.rename(final)
    finally:
        for temporary in unverified:
            shutil.rmtree(temporary, ignore_errors=True)
    _write_manifest(plan, config, folder, differences, cost)
    return differences


def _remove_former(folder: Path, finals: list[Path]) -> None:
    """Make room, and leave no folder of another export beside the new ones."""
    for variant in ExportVariant:
        former = folder / variant.folder_name
        if former.exists():
            shutil.rmtree(former)
            if former not in finals:
                print(f"removed    {former}, which export.variants no longer names")


def _verify(
    plan: ExportPlan, config: ExportRoot, variant: ExportVariant, folder: Path
) -> dict[int, float]:
    """Compare a folder with the trained model in the windows that it holds."""
    applied, original_len = (
        variant_factors(plan.factors, variant),
        plan.factors.geometry.original_len,
    )
    lengths = [
        length
        for length in (original_len - 1, original_len, original_len + 1)
        if length <= applied.target_len
    ]
    return verify_export(
        plan.checkpoint, applied, folder, config.export.dtype.torch_dtype, lengths[-2:]
    )


def _static_cost(plan: ExportPlan, config: ExportRoot) -> StaticCost | None:
    """What a static choice costs this model on short texts that every machine has."""
    num_windows, original_len = config.export.cost_windows, plan.factors.geometry.original_len
    if num_windows == 0:
        return None
    corpus = CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=0.2)
    encoder = DocumentTokenizer(load_tokenizer(plan.checkpoint))
    documents = [document.text for document in heldout_documents(corpus)]
    if num_windows > len(documents):
        raise ConfigError(
            [
                f"export.cost_windows={num_windows} must be at most {len(documents)}, all texts there are"
            ]
        )
    texts = random.Random(config.seed).sample(documents, num_windows)
    rows = [
        [encoder.bos_id, *encoder.encode(text[: 16 * original_len])][: original_len - 1]
        for text in texts
    ]
    model = load_to_run(plan.checkpoint, plan.factors)
    return measure_static_cost(model, [torch.tensor(row) for row in rows], COST_TEXT)


def _write_manifest(
    plan: ExportPlan,
    config: ExportRoot,
    folder: Path,
    differences: dict[str, dict[int, float]],
    cost: StaticCost | None,
) -> None:
    """Declare the export finished."""
    details = {
        "dtype": config.export.dtype.value,
        "variants": [variant.value for variant in config.export.variants],
        "gguf": config.export.gguf,
        "original_len": plan.factors.geometry.original_len,
        "target_len": plan.factors.target_len,
        "largest_relative_logit_difference": {
            name: {str(length): value for length, value in by_length.items()}
            for name, by_length in differences.items()
        },
        "static_cost": None if cost is None else asdict(cost),
    }
    files = {
        f"{final.name}/{path.name}": sha256_of_file(path)
        for final in final_folders(folder, config)
        for path in sorted(final.iterdir())
    }
    manifest = Manifest(
        "exports", inputs=plan.inputs, config=to_plain(config), files=files, details=details
    )
    write_manifest(folder, manifest)


if __name__ == "__main__":
    run_command(main)
