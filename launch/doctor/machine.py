"""``launch.doctor`` without a verb: what this machine has for the whole flow, and what to do about
what it lacks.

One line per finding: ``ok``; ``fix`` for what costs speed or comfort; ``blocker`` for what stops a
run. Nothing is downloaded and no weight is read; on a GPU each attention kernel is run on a few
tokens.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from launch.doctor.rope import DoctorRoot
from longrope2.attention.kernels import AttentionKernel, choose_kernel, kernel_fault
from longrope2.config import compose, find_shipped
from longrope2.errors import ArtifactError, ConfigError
from longrope2.model.folder import local_model_folder
from longrope2.model.norms import NormKernel, choose_norm, norm_fault
from longrope2.model.shape import CONFIG_FILE, ModelShape
from longrope2.tracking.metrics import WandbMode, resolve_mode
from longrope2.training.config import OptimizerKind, Precision, compute_dtype
from longrope2.training.optimizer import optimizer_fault

GIB = 2**30
# Lowest version that the code is written for, and what it needs it for (pyproject.toml says the
# same; a test compares).
NEEDED = {
    "torch": "2.11",
    "transformers": "5.10",
    "deepspeed": "0.19.8",
    "datasets": "4",
    "hydra-core": "1.3",
}
OPTIONAL = {
    "lm-eval": "standard short tasks: pip install '.[lm-eval]'",
    "wandb-workspaces": "the W&B workspace of launch.report: pip install '.[dashboards]'",
    "gguf": "model=smollm2_135m and GGUF exports: pip install '.[smollm2]'",
}
# A run of the miniature takes some ten MiB; a checkpoint of an 8B model with its optimizer 16 bytes
# a parameter.
SCARCE_GIB, ROOMY_GIB = 1, 300
INDEX_FILE = "model.safetensors.index.json"
MODEL_FILES = ("tokenizer.json", "tokenizer.model")


class State(Enum):
    """How bad a finding is."""

    ok = "ok"
    fix = "fix"
    blocker = "blocker"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    state: State
    what: str
    found: str
    remedy: str = ""


def machine_command(arguments: list[str]) -> None:
    """Compose, look, print; exits with 1 when there is a blocker."""
    findings = find_all(compose(DoctorRoot, "doctor", arguments))
    print_findings(findings)
    if any(finding.state is State.blocker for finding in findings):
        sys.exit(1)


def find_all(config: DoctorRoot) -> list[Finding]:
    """Look at everything."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *_packages(),
        *_gpus(device),
        *_kernels(device),
        *_norms(device),
        _fused_loss(),
        _apex(device),
        _compiler(device),
        _disk(Path(config.run.root)),
        _hub(config.model.path),
        _wandb(),
        *_model(config),
    ]


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """The table, and a last line with the verdict."""
    out = console or Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    colors = {State.ok: "green", State.fix: "yellow", State.blocker: "bold red"}
    for finding in findings:
        state = f"[{colors[finding.state]}]{finding.state.value}[/]"
        table.add_row(
            state,
            finding.what,
            finding.found.replace("[", r"\["),
            finding.remedy.replace("[", r"\["),
        )
    out.print(table)
    blockers = sum(finding.state is State.blocker for finding in findings)
    out.print(
        f"{blockers} blocker(s)" if blockers else "ready: nothing stops a run", highlight=False
    )


def _packages() -> list[Finding]:
    """Versions: needed ones too old or missing are blockers, optional ones are named."""
    findings = []
    for name, lowest in NEEDED.items():
        version = installed_version(name)
        good = version is not None and _numbers(version) >= _numbers(lowest)
        state = State.ok if good else State.blocker
        remedy = "" if good else f"pip install -c constraints.txt '{name}>={lowest}'"
        findings.append(Finding(state, name, version or "missing", remedy))
    for name, remedy in OPTIONAL.items():
        version = installed_version(name)
        findings.append(
            Finding(State.ok, name, version)
            if version
            else Finding(State.fix, name, "not installed (optional)", remedy)
        )
    return findings


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None; torch's own word names its build too (2.13.0+cu130)."""
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _gpus(device: torch.device) -> list[Finding]:
    """Name and memory of every GPU."""
    if device.type != "cuda":
        return [_no_gpu()]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        taken = free < 0.9 * total
        findings.append(
            Finding(
                State.fix if taken else State.ok,
                f"GPU {index}",
                f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free",
                "other processes hold memory; nvidia-smi names them" if taken else "",
            )
        )
    return findings


def _no_gpu() -> Finding:
    """Whether there is none, or torch does not see it: a driver older than torch's CUDA is found by nobody else."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"none seen by torch, {build}: float32 on the CPU, for miniatures"
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is there: install the torch built for the CUDA version it prints, or one below"
        return Finding(State.fix, "GPU", found, remedy)
    return Finding(State.fix, "GPU", found, "8B models need GPUs: launch.plan says how many")


def _kernels(device: torch.device) -> list[Finding]:
    """Which attention kernels can run, and which one is taken."""
    dtype = compute_dtype(Precision.auto, device)
    chosen = choose_kernel(AttentionKernel.auto, device, dtype).kernel
    findings = []
    for kernel in (AttentionKernel.flash_attn, AttentionKernel.torch_varlen, AttentionKernel.sdpa):
        fault = kernel_fault(kernel, device, dtype)
        found = "chosen" if kernel is chosen else "runs" if fault is None else fault
        # On a CPU sdpa is the only kernel, and no fault of the machine.
        missing = (
            fault is not None and kernel is AttentionKernel.flash_attn and device.type == "cuda"
        )
        remedy = (
            "pip install flash-attn --no-build-isolation; torch_varlen is the same algorithm"
            if missing
            else ""
        )
        findings.append(
            Finding(State.fix if missing else State.ok, f"attention {kernel.value}", found, remedy)
        )
    return findings


def _norms(device: torch.device) -> list[Finding]:
    """Which kernels of RMS norms can run, and which one training takes."""
    dtype = compute_dtype(Precision.auto, device)
    chosen = choose_norm(NormKernel.auto, device, dtype).kernel
    findings = []
    for kernel in list(NormKernel)[1:]:
        fault = norm_fault(kernel, device, dtype)
        found = "chosen" if kernel is chosen else "runs" if fault is None else fault
        findings.append(Finding(State.ok, f"norm {kernel.value}", found))
    return findings


def _fused_loss() -> Finding:
    """Whether torch has the chunked loss."""
    if hasattr(F, "linear_cross_entropy"):
        return Finding(State.ok, "chunked loss", "torch's linear_cross_entropy")
    return Finding(
        State.ok,
        "chunked loss",
        "this project's own: torch before 2.13 has none; logits are computed twice",
    )


def _apex(device: torch.device) -> Finding:
    """NVIDIA's apex, none, or the web toolkit of the same name."""
    if importlib.util.find_spec("apex") is None:
        return Finding(State.ok, "apex", "not installed, not needed")
    fault = optimizer_fault(OptimizerKind.apex_fused_adam, torch.device("cuda"))
    if fault is None:
        return Finding(State.ok, "apex", "NVIDIA's")
    remedy = "pip uninstall apex; nothing here needs it"
    return Finding(State.fix, "apex", "not NVIDIA's: another package of that name", remedy)


def _compiler(device: torch.device) -> Finding:
    """DeepSpeed builds a small operator on first use; without a compiler it goes on without."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler:
        return Finding(State.ok, "C++ compiler", compiler)
    return Finding(
        State.fix,
        "C++ compiler",
        "none",
        "apt-get install g++: DeepSpeed builds operators when first used",
    )


def _disk(root: Path) -> Finding:
    """Free space where the runs stand."""
    place = root
    while not place.exists():
        place = place.parent if place.parent != place else Path.cwd()
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            State.blocker,
            "disk",
            f"{place.resolve()} cannot be written to",
            "set run.root to a folder of yours",
        )
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:,.0f} GiB free in {place.resolve()}"
    if free < SCARCE_GIB:
        return Finding(State.blocker, "disk", found, "free some, or set run.root to a larger disk")
    if free < ROOMY_GIB:
        return Finding(
            State.ok,
            "disk",
            f"{found}: enough for a miniature; two checkpoints of an 8B model take 240 GiB",
        )
    return Finding(State.ok, "disk", found)


def _hub(path: str) -> Finding:
    """A login of the Hugging Face hub; needed for gated models only."""
    from huggingface_hub import get_token

    if get_token():
        return Finding(State.ok, "hub login", "token found")
    if find_shipped(path).is_dir() or "://" in path:
        return Finding(State.ok, "hub login", f"none; {path} needs none")
    remedy = f"`hf auth login`, and accept the licence of {path} on the hub if it is gated"
    return Finding(State.fix, "hub login", "none", remedy)


def _wandb() -> Finding:
    """Where Weights & Biases would record."""
    try:
        mode = resolve_mode(WandbMode.auto)
    except ConfigError as error:
        return Finding(State.blocker, "W&B login", error.faults[0], "change or unset WANDB_MODE")
    if mode is WandbMode.online:
        return Finding(State.ok, "W&B login", "online")
    remedy = "`wandb login` to watch runs online"
    return Finding(State.fix, "W&B login", f"{mode.value}: metrics stay in the run folder", remedy)


def _model(config: DoctorRoot) -> list[Finding]:
    """Weights and tokenizer of the configured model, on this machine."""
    name, path = config.model.name, config.model.path
    try:
        folder = local_model_folder(path)
    except ArtifactError as error:
        return [
            Finding(State.blocker, f"model {name}", f"{path} is not on this machine", str(error))
        ]
    if folder is None:
        remedy = f"model.path=FOLDER, or fetch it: hf download {path}"
        return [Finding(State.blocker, f"model {name}", f"{path} is not on this machine", remedy)]
    if (folder / CONFIG_FILE).is_file():
        ModelShape.from_folder(folder)  # a damaged one stops every command with the same message
    weights, missing = len(list(folder.glob("*.safetensors"))), _missing_files(folder)
    if not weights:
        findings = [
            Finding(
                State.blocker, f"model {name}", f"no *.safetensors in {folder}", "fetch the weights"
            )
        ]
    elif missing:
        found = f"{', '.join(missing)} missing in {folder}"
        findings = [Finding(State.blocker, f"model {name}", found, "fetch the missing files")]
    else:
        findings = [Finding(State.ok, f"model {name}", f"{weights} weight file(s) in {folder}")]
    there = [file for file in MODEL_FILES if (folder / file).is_file()]
    if there:
        return [*findings, Finding(State.ok, f"tokenizer {name}", ", ".join(there))]
    remedy = f"put {' or '.join(MODEL_FILES)} of the model beside its config.json"
    found = f"neither {' nor '.join(MODEL_FILES)} in {folder}"
    return [*findings, Finding(State.blocker, f"tokenizer {name}", found, remedy)]


def _missing_files(folder: Path) -> list[str]:
    """Of config.json and the weight files that an index names, those that are not there."""
    index = folder / INDEX_FILE
    named = (
        json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if index.is_file()
        else ()
    )
    return sorted(name for name in {CONFIG_FILE, *named} if not (folder / name).is_file())
