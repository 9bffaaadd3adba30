"""Checkpoints that can be trusted: hashed when written, verified when read, ``latest`` moved last.

``step_00000120/`` holds DeepSpeed's files and a manifest with their SHA-256 and the training cursor; the cursor is the
number of finished optimizer steps, and everything else (order of segments, learning rate) is a pure function of it, save
for the count of skipped steps, which is kept beside it.
``final/`` is the result: a Hugging Face folder with the base model's config and our factors.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from longrope2.artifacts import (
    Manifest,
    atomic_path,
    read_manifest,
    sha256_of_file,
    write_manifest,
    write_text,
)
from longrope2.errors import ArtifactError
from longrope2.model import FACTORS_FILE
from longrope2.rope import RescaleFactors
from longrope2.training.guard import SkippedSteps

__all__ = ["FINAL_FOLDER", "load_newest", "save", "save_final"]

FINAL_FOLDER = "final"
LATEST_FILE = "latest"
STEP_KIND = "training_state"
FINAL_KIND = "checkpoint"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "special_tokens_map.json")  # fmt: skip

log = logging.getLogger(__name__)


def save(
    engine: Any, folder: Path, steps_done: int, skipped: SkippedSteps, keep: int, identity: dict[str, Any]
) -> None:
    """Write ``step_<n>``, verify-ready, then move ``latest`` and drop all but the ``keep`` newest.

    Every rank calls this. ``identity`` is stored in the manifest and compared on resume.
    """
    tag = f"step_{steps_done:08d}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        files = {p.name: sha256_of_file(p) for p in sorted((folder / tag).iterdir()) if p.name != "manifest.json"}
        counts = {"steps": steps_done, "skipped_steps": skipped.total, "skipped_in_a_row": skipped.in_a_row}
        write_manifest(folder / tag, Manifest(STEP_KIND, inputs=identity, counts=counts, files=files))
        write_text(folder / LATEST_FILE, tag + "\n")
        for old in _step_folders(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_newest(engine: Any, folder: Path, identity: dict[str, Any]) -> tuple[int, SkippedSteps]:
    """Load the newest undamaged checkpoint; a damaged one is skipped with a warning.

    Returns:
        Finished optimizer steps, and how many of them were skipped; zeros when there is no checkpoint.

    Raises:
        ArtifactError: there are checkpoints and all are damaged, or they belong to another run.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [_newest_intact(folder, identity)]
    dist.broadcast_object_list(found)
    if isinstance(found[0], ArtifactError):
        raise found[0]
    if found[0] is None:
        return 0, SkippedSteps()
    tag, counts = found[0]
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    if loaded is None:
        raise ArtifactError(f"DeepSpeed could not load {folder / tag}; remove it to go on from the one before")
    return counts["steps"], SkippedSteps(counts.get("skipped_steps", 0), counts.get("skipped_in_a_row", 0))


def save_final(engine: Any, folder: Path, model_folder: Path, factors: RescaleFactors, manifest: Manifest) -> None:
    """Gather the weights on rank 0 and write ``final/``: config and tokenizer of the base model, weights, factors."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        final = folder / FINAL_FOLDER
        final.mkdir(parents=True, exist_ok=True)
        (final / "manifest.json").unlink(missing_ok=True)
        for name in MODEL_FILES:
            if (model_folder / name).is_file():
                with atomic_path(final / name) as temporary:
                    shutil.copyfile(model_folder / name, temporary)
        with atomic_path(final / "model.safetensors") as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        write_text(final / FACTORS_FILE, factors.to_json())
        manifest.kind = FINAL_KIND
        manifest.files = {p.name: sha256_of_file(p) for p in sorted(final.iterdir())}
        write_manifest(final, manifest)
    dist.barrier()


def _newest_intact(folder: Path, identity: dict[str, Any]) -> tuple[str, dict[str, int]] | ArtifactError | None:
    """Tag and counts of the newest checkpoint whose files match their hashes; an error is returned to be raised."""
    candidates = _step_folders(folder)
    if not candidates:
        return None
    for candidate in reversed(candidates):
        try:
            manifest = read_manifest(candidate, STEP_KIND)
            _verify(candidate, manifest)
        except ArtifactError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        changed = [key for key in identity if manifest.inputs.get(key) != identity[key]]
        if changed:
            return ArtifactError(
                f"{candidate} was written by another run: {', '.join(changed)} differ; "
                "use another run.name, or remove the checkpoints to start over"
            )
        return candidate.name, manifest.counts
    return ArtifactError(f"no checkpoint in {folder} is intact ({len(candidates)} damaged); remove them to start over")


def _verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its hash."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        if sha256_of_file(path) != expected:
            raise ArtifactError(f"{path} does not match its SHA-256")


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())
