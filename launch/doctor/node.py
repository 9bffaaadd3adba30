"""``python -m launch.doctor node`` and ``nodes``: is every node of a job fit, and like the others?

``node FOLDER`` runs on each node and writes ``FOLDER/node-<name>.json``: what is wrong there (GPUs
that Slurm promised, free disk, packages) and which versions it has. ``nodes FOLDER NAME,NAME``
reads all reports, prints every fault with its node to stderr and the nodes to leave out to stdout,
and ends with code 1 when there is any: ``slurm/common.sh`` does not start then.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope2.files.artifacts import write_text
from longrope2.kernel_choice import AttentionKernel

COMPARED_PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn", "apex", "tokenizers",
                     "numpy", "pyarrow")  # fmt: skip
# Memory of an idle GPU that something else may hold: the driver and its services.
IDLE_GPU_GIB = 4.0
GIB, GB = 2**30, 1e9


def argument_parser(word: str, description: str | None) -> argparse.ArgumentParser:
    """Parser of a word that takes the folder of the job's reports."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.doctor {word}", description=description, formatter_class=raw
    )
    parser.add_argument("folder", type=Path, help="where the reports of the job stand")
    return parser


def node_command(arguments: list[str]) -> None:
    """Write the report of this node."""
    parser = argument_parser("node", __doc__)
    add = parser.add_argument
    add("--device", choices=("gpu", "cpu"), default="gpu", help="what ranks compute on [gpu]")
    add("--scratch", type=Path, default=Path("/tmp"), help="another folder for files [/tmp]")
    add("--min-free-gb", type=float, default=0.0, help="GB that must be free there and here [0]")
    given = parser.parse_args(arguments)
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    faults = _disk_faults((given.scratch, Path.cwd()), given.min_free_gb) + _apex_faults()
    if given.device == "gpu" and promised:
        faults += _gpu_faults(promised) + _flash_attention_faults()
    report = {"node": node, "faults": faults, "versions": _versions(given.device)}
    write_text(given.folder / f"node-{node}.json", json.dumps(report, indent=1) + "\n")
    print("\n".join(faults) or "nothing wrong")


def nodes_command(arguments: list[str]) -> None:
    """Judge the reports of all nodes; see the module's docstring."""
    parser = argument_parser("nodes", __doc__)
    parser.add_argument("names", help="nodes of the job, separated by commas")
    given = parser.parse_args(arguments)
    reports = {}
    for name in given.names.split(","):
        path = given.folder / f"node-{name}.json"
        reports[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    report_refused(faults_of_nodes(reports), what=f"{len(reports)} nodes: nothing wrong")


def report_refused(faults: Sequence[tuple[str, str]], *, what: str) -> None:
    """Print faults to stderr, their nodes to stdout, and end with code 1; else say ``what``."""
    if not faults:
        print(f"doctor: {what}", file=sys.stderr)
        return
    for node, fault in faults:
        print(f"doctor: {node + ': ' if node else ''}{fault}", file=sys.stderr)
    print(",".join(sorted({node for node, _ in faults if node})))
    sys.exit(1)


def faults_of_nodes(reports: dict[str, Any]) -> list[tuple[str, str]]:
    """(Node, fault) pairs: own faults, no report, and versions that differ from most others'.

    When no version has more than half of the nodes, nobody can say who is wrong: that fault has no
    node ("").
    """
    present = {name: report["versions"] for name, report in reports.items() if report is not None}
    found = [(name, fault) for name in present for fault in reports[name]["faults"]]
    for name in reports:
        if name not in present:
            found.append((name, f"no report: it did not run the check (doctor-{name}.log)"))
    for item in sorted({item for versions in present.values() for item in versions}):
        values = {name: versions.get(item) for name, versions in present.items()}
        common, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        if 2 * count <= len(values):
            where = ", ".join(f"{value} on {name}" for name, value in values.items())
            found.append(("", f"{item} differs: {where}"))
            continue
        found += [
            (name, f"{item} is {value}, the other nodes have {common}")
            for name, value in values.items()
            if value != common
        ]
    return found


def _disk_faults(places: Sequence[Path], min_free_gb: float) -> list[str]:
    """Folders that are missing, cannot be written to, or have too little space."""
    faults = []
    for place in places:
        if not os.access(place, os.W_OK):
            faults.append(f"{place} is missing or cannot be written to")
        elif (free := shutil.disk_usage(place).free / GB) < min_free_gb:
            asked = f"at least {min_free_gb:g} are asked for (MIN_FREE_GB)"
            faults.append(f"{place} has {free:.1f} GB free, {asked}")
    return faults


def _apex_faults() -> list[str]:
    """A package called apex that is not NVIDIA's; none at all is fine."""
    if importlib.util.find_spec("apex") is None:
        return []
    import torch

    from longrope2.training.config import OptimizerKind
    from longrope2.training.optimizer import optimizer_fault

    fault = optimizer_fault(OptimizerKind.apex_fused_adam, torch.device("cuda"))
    return [f"{fault} (pip uninstall apex)"] if fault else []


def _gpu_faults(promised: int) -> list[str]:
    """GPUs that are not there, do not compute, or are in use by something else."""
    import torch

    seen = torch.cuda.device_count()
    faults = [] if seen == promised else [f"Slurm promised {promised} GPUs, torch sees {seen}"]
    for index in range(seen):
        try:
            free, total = torch.cuda.mem_get_info(index)
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            right = bool((ones @ ones == 256).all())
        except RuntimeError as error:
            faults.append(f"GPU {index} does not compute: {str(error).splitlines()[0]}")
            continue
        if not right:
            faults.append(f"GPU {index} multiplies wrongly")
        if (used := (total - free) / GIB) > IDLE_GPU_GIB:
            faults.append(f"GPU {index} has {used:.0f} GiB in use by something else")
    return faults


def _flash_attention_faults() -> list[str]:
    """An installed flash-attn that cannot run, as when built for another torch; none is fine."""
    if importlib.util.find_spec("flash_attn") is None:
        return []
    import torch

    from longrope2.attention.kernels import kernel_fault

    fault = kernel_fault(AttentionKernel.flash_attn, torch.device("cuda"), torch.bfloat16)
    return [f"flash-attn is installed and cannot run: {fault}"] if fault else []


def _versions(device: str) -> dict[str, str]:
    # Nodes with a copy of the project's code of their own would run that.
    versions = {"python": platform.python_version(), "code": str(Path(__file__).parent.parent)}
    for package in COMPARED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    if device == "gpu":
        import torch
        import torch.cuda.nccl

        versions["cuda"] = str(torch.version.cuda)
        if torch.cuda.is_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            versions["gpu"] = torch.cuda.get_device_name(0)
    return versions
