"""``python -m launch.export``: the run's trained model as a Hugging Face folder, checked by loading it again.

The folder ``5_exports/hugging_face`` appears only after plain transformers has loaded it and given the logits of the
trained model on either side of the window switch.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from longrope2.artifacts import (
    Manifest,
    describe_input,
    model_identity,
    product_folder,
    read_manifest,
    resolve_model_folder,
    sha256_of_file,
    write_manifest,
)
from longrope2.command import run_command
from longrope2.config import claim_folder, compose, to_plain
from longrope2.errors import ArtifactError
from longrope2.evaluation import check_same_model, read_checkpoint_factors
from longrope2.export import ExportRoot, verify_export, write_hugging_face_folder
from longrope2.rope import RescaleFactors

FOLDER_NAME = "hugging_face"


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, found and checked."""

    checkpoint: Path
    factors: RescaleFactors
    inputs: dict[str, dict[str, str]]


def main() -> None:
    """Compose, check, plan, write, verify, publish."""
    config = compose(ExportRoot, "export", sys.argv[1:])
    plan = make_plan(config)
    folder = product_folder(config.run.folder, "exports")
    factors = plan.factors
    print(f"checkpoint {plan.checkpoint}: window {factors.geometry.original_len} -> {factors.target_len}")
    print(f"export     {folder / FOLDER_NAME}, {config.export.dtype.value}, rope {factors.method}")
    if config.dry_run:
        return
    if _is_complete(folder, config, plan):
        print(f"already complete: {folder / FOLDER_NAME}")
        return
    claim_folder(folder, config, changeable=("dry_run", "export"))
    differences = _publish(plan, config, folder)
    for length, difference in differences.items():
        print(f"verified   at {length} tokens: logits differ by at most {difference:.1e} of the largest")
    print(f"export in {folder / FOLDER_NAME}")


def make_plan(config: ExportRoot) -> ExportPlan:
    """Find the checkpoint and check that it is finished and belongs to the configured model and lengths.

    Raises:
        ArtifactError: it does not.
        FactorsError: its factors cannot be written into a Hugging Face config.
    """
    own = product_folder(config.run.folder, "checkpoints") / "final"
    checkpoint = Path(config.export.checkpoint) if config.export.checkpoint else own
    if not checkpoint.is_dir():
        raise ArtifactError(f"export.checkpoint={checkpoint} does not exist; run launch.train first")
    factors = read_checkpoint_factors(checkpoint, config.model.original_len, config.target_len)
    check_same_model(
        f"export.checkpoint={checkpoint}", model_identity(checkpoint), resolve_model_folder(config.model.path)
    )
    factors.to_hf_config()
    return ExportPlan(checkpoint, factors, {"checkpoint": describe_input(checkpoint)})


def _is_complete(folder: Path, config: ExportRoot, plan: ExportPlan) -> bool:
    """Whether this very checkpoint has been exported in this very format."""
    try:
        manifest = read_manifest(folder, "exports")
    except ArtifactError:
        return False
    return manifest.inputs == plan.inputs and manifest.details.get("dtype") == config.export.dtype.value


def _publish(plan: ExportPlan, config: ExportRoot, folder: Path) -> dict[int, float]:
    """Write beside the final place, verify, then move; an export that fails leaves nothing behind."""
    original_len, dtype = plan.factors.geometry.original_len, config.export.dtype.torch_dtype
    unverified, final = folder / f".{FOLDER_NAME}.tmp", folder / FOLDER_NAME
    shutil.rmtree(unverified, ignore_errors=True)
    try:
        write_hugging_face_folder(plan.checkpoint, plan.factors, unverified, dtype)
        differences = verify_export(plan.checkpoint, plan.factors, unverified, dtype, (original_len, original_len + 1))
        (folder / "manifest.json").unlink(missing_ok=True)
        if final.exists():
            shutil.rmtree(final)
        unverified.rename(final)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    details = {
        "dtype": config.export.dtype.value,
        "original_len": original_len,
        "target_len": plan.factors.target_len,
        "largest_relative_logit_difference": {str(length): value for length, value in differences.items()},
    }
    files = {f"{FOLDER_NAME}/{p.name}": sha256_of_file(p) for p in sorted(final.iterdir())}
    manifest = Manifest("exports", inputs=plan.inputs, config=to_plain(config), files=files, details=details)
    write_manifest(folder, manifest)
    return differences


if __name__ == "__main__":
    run_command(main)
