"""``python -m benchmarks.gpu.check`` (``make gpu-check``): what only a GPU can show; minutes.

For whoever has one GPU: the tests of ``tests/gpu`` (every kernel against float32), the miniature
packed, searched, trained, evaluated and exported on the GPU in bf16, its losses beside those of the
same steps on the CPU in float32, and the slice of a long run (``benchmarks.gpu.slice``). Everything
ends in one JSON file with device, versions and commit, also where something failed.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from longrope2.attention.kernels import AttentionKernel, choose_kernel
from longrope2.command import run_command
from longrope2.errors import UserError
from longrope2.files.artifacts import Manifest, product_folder, write_text
from longrope2.model.norms import NormKernel, choose_norm
from longrope2.tracking.metrics import read_metrics

_ROOT = Path(__file__).parent.parent.parent
_STEPS, _STEP_TOKENS, _TARGET_LEN = 40, 4096, 2048
LARGEST_DIFFERENCE = 0.02
"""Of a step's loss, relative: bf16 carries 8 bits, and 40 updates follow each other."""
_KERNEL_PACKAGES = ("flash-attn", "liger-kernel", "apex", "triton")
_LAST_LINES = 15
WHERE_TO_SEND = (
    "send it: as benchmarks/gpu/results/DEVICE.json in a pull request, or attached to an issue of "
    "this repository, also when something failed"
)


@dataclass(frozen=True)
class Part:
    """One command of the check, and how it ended."""

    name: str
    command: str
    exit_code: int
    seconds: float
    last_lines: list[str]
    """Of its output, where it failed."""


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> arguments of ``python -m``, in order; those that begin with ``cpu`` see no GPU."""
    one = ["parallel.processes=1", "parallel.sequence=1", "tracking.wandb=disabled"]
    model = ["model=tiny", f"target_len={_TARGET_LEN}"]
    run, cpu = ([f"run.root={folder}", f"run.name={name}"] for name in ("gpu", "cpu"))
    training = ["launch.train", "experiment=tiny_extend", *one, "training.log_steps=1"]
    training += [f"training.tokens={_STEPS * _STEP_TOKENS}", "training.checkpoint_steps=1000"]
    training += [f"segments={product_folder(folder / 'gpu', 'segments')}"]
    training += [f"rope.factors={product_folder(folder / 'gpu', 'factors')}/factors.json"]
    packing = ["--target", str(_TARGET_LEN), "--corpus", "sample", "--model", "tiny"]
    searching = ["corpus=sample", "search=miniature", "parallel.processes=1"]
    junit = folder / "tests.xml"
    return {
        "kernels": ["pytest", "-q", "tests/gpu", "-m", "gpu", f"--junitxml={junit}"],
        "pack": ["data_prep.pack", *packing, *run],
        "search": ["launch.search", *model, *searching, *run],
        "train": [*training, "training.precision=bf16", *run],
        "cpu train": [*training, "training.precision=fp32", *cpu],
        "evaluate": ["launch.evaluate", *model, "evaluation=miniature", *run],
        "export": ["launch.export", *model, *run],
        "slice": ["benchmarks.gpu.slice", "--json", str(folder / "slice.json")],
    }


def run_parts(wanted: Mapping[str, Sequence[str]]) -> list[Part]:
    """Run one command after the other; one that fails keeps no other from being run."""
    parts = []
    for name, words in wanted.items():
        command = shlex.join(["python", "-m", *words])
        print(f"--- {name}: {command}", flush=True)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if name.startswith("cpu") else {}
        began = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=_ROOT,
            env=os.environ | hidden,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(ended.stdout, flush=True)
        lines = ended.stdout.splitlines()[-_LAST_LINES:] if ended.returncode else []
        seconds = round(time.monotonic() - began, 1)
        parts.append(Part(name, command, ended.returncode, seconds, lines))
    return parts


def assemble(folder: Path, parts: Sequence[Part], device: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the JSON file; ``faults`` is empty when all is well."""
    faults = [f"{part.name} ended with {part.exit_code}" for part in parts if part.exit_code]
    tests, losses = _tests(folder / "tests.xml"), _losses(folder)
    difference = max((_difference(row) for row in losses), default=None)
    if len(losses) < _STEPS:
        faults.append(f"{len(losses)} of {_STEPS} steps have a loss on both devices")
    if difference is not None and difference > LARGEST_DIFFERENCE:
        faults.append(f"losses differ by {difference:.2%}, allowed is {LARGEST_DIFFERENCE:.0%}")
    figures = folder / "slice.json"
    manifest = Manifest("gpu_check")
    return {
        "kind": manifest.kind,
        "commit": manifest.commit,
        "versions": manifest.versions | _kernel_versions(),
        "device": dict(device),
        "faults": faults,
        "parts": [asdict(part) for part in parts],
        "tests": tests,
        "largest_loss_difference": difference,
        "losses": losses,
        "slice": json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else None,
    }


def _tests(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, with the reasons, of pytest's report."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": 0, "reasons": []}
    if not report.is_file():
        return found
    reasons = set()
    for case in ElementTree.parse(report).iter("testcase"):
        if (skipped := case.find("skipped")) is not None:
            found["skipped"] += 1
            reasons.add(skipped.get("message", ""))
        elif case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(case.get("name", ""))
        else:
            found["passed"] += 1
    return found | {"reasons": sorted(reasons)}


def _losses(folder: Path) -> list[dict[str, float]]:
    """Loss of every step that both trainings have done."""
    by_device = {}
    for name in ("gpu", "cpu"):
        records = read_metrics(product_folder(folder / name, "checkpoints"))
        by_device[name] = {record["step"]: record["train/loss"] for record in records}
    gpu, cpu = by_device["gpu"], by_device["cpu"]
    return [{"step": step, "gpu": gpu[step], "cpu": cpu[step]} for step in sorted(gpu & cpu.keys())]


def _difference(row: Mapping[str, float]) -> float:
    difference = abs(row["gpu"] - row["cpu"]) / abs(row["cpu"])
    return difference if math.isfinite(difference) else math.inf


def _kernel_versions() -> dict[str, str]:
    versions = {}
    for package in _KERNEL_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def describe_device() -> dict[str, Any]:
    """The first GPU, and the kernels that are chosen on it.

    Raises:
        UserError: torch sees none.
    """
    if not torch.cuda.is_available():
        build = "no build for CUDA" if torch.version.cuda is None else "a build for CUDA"
        raise UserError(
            f"torch {torch.__version__} ({build}) sees no GPU, and a GPU is what this checks; "
            "on a CPU: make test"
        )
    device, dtype = torch.device("cuda"), torch.bfloat16
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "compute_capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "attention_kernel": str(choose_kernel(AttentionKernel.auto, device, dtype)),
        "norm_kernel": str(choose_norm(NormKernel.auto, device, dtype)),
    }


def main() -> None:
    """Command line; exit code 1 when something failed, with the file written all the same."""
    prog = "python -m benchmarks.gpu.check"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    where = "the JSON file (gpu_check.json)"
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help=where)
    given = parser.parse_args()
    device = describe_device()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        folder = Path(scratch)
        content = assemble(folder, run_parts(commands(folder)), device)
    write_text(given.json, json.dumps(content, indent=1) + "\n")
    tests = content["tests"]
    print(f"tests of kernels: {tests['passed']} passed, {tests['skipped']} skipped", end="")
    print(f" ({'; '.join(tests['reasons'])})" if tests["skipped"] else "")
    print(f"{device['name']}: {'; '.join(content['faults']) or 'all is well'}")
    print(f"all of it is in {given.json}; {WHERE_TO_SEND}")
    if content["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
