"""How a kernel is chosen among several that compute the same: look, then run it on a few tokens.

A package that is installed says little: a wheel that does not fit its torch imports well and fails
at the first call. NVIDIA's apex is told apart from the package of that name on the Python index.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from longrope2.errors import ConfigError

if TYPE_CHECKING:
    import torch

_Kernel = TypeVar("_Kernel", bound=Enum)


class AttentionKernel(Enum):
    """Kernels of attention, and ``auto`` for the first that can run, in this order."""

    auto = "auto"
    flash_attn = "flash_attn"
    torch_varlen = "torch_varlen"
    sdpa = "sdpa"


class NormKernel(Enum):
    """Kernels of RMS norms; ``auto`` is the first fused one that runs on a GPU, else ``model``."""

    auto = "auto"
    liger = "liger"
    apex = "apex"
    torch = "torch"
    model = "model"


def apex_fault() -> str | None:
    """Why NVIDIA's apex is not here, found out without importing it; None if it is."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "NVIDIA apex is not installed"
    folders = map(Path, spec.submodule_search_locations or ())
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return None
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return (
        f"the package apex found at {spec.origin} (version {version}) is not NVIDIA's, which has "
        "optimizers.FusedAdam; the apex of the Python package index is a web toolkit of 2013"
    )


class KernelError(ConfigError):
    """A kernel that was asked for by name cannot run; ``fault`` says why."""

    def __init__(self, asked: str, fault: str, instead: str) -> None:
        super().__init__([f"{asked} cannot run here: {fault}; use {instead}"])
        self.fault = fault


@dataclass(frozen=True)
class KernelChoice(Generic[_Kernel]):
    """The kernel of a run and why it was taken."""

    kernel: _Kernel
    reason: str
    fault: str | None = None
    """Why it cannot run on the machine that plans; a run is refused for it."""

    def __str__(self) -> str:
        return f"{self.kernel.value} ({self.reason})"


def forced_kernel(
    key: str, wanted: _Kernel, fault: str | None, *, instead: str
) -> KernelChoice[_Kernel]:
    """A kernel that was asked for by name under a configuration key.

    Raises:
        KernelError: it has a fault and cannot run; says what to set ``instead``.
    """
    if fault:
        raise KernelError(f"{key}={wanted.value}", fault, instead)
    return KernelChoice(wanted, f"forced by {key}")


def first_that_runs(
    kernels: Sequence[_Kernel], fault_of: Callable[[_Kernel], str | None], otherwise: _Kernel
) -> KernelChoice[_Kernel]:
    """The first kernel without a fault, or ``otherwise``; the reason names those passed over."""
    faults = []
    for kernel in kernels:
        fault = fault_of(kernel)
        if fault is None:
            return KernelChoice(kernel, "; ".join(["auto", *faults]))
        faults.append(f"no {kernel.value}: {fault}")
    return KernelChoice(otherwise, "; ".join(["auto", *faults]))


def why_it_fails(attempt: Callable[[], None], device: "torch.device") -> str | None:
    """Run something on a device to its end; what it raised, in a line, or None."""
    try:
        attempt()
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
    # Whatever a binary that does not fit throws is the reason it cannot run.
    except Exception as error:
        words = str(error).splitlines()[0] if str(error) else "no message"
        return f"{type(error).__name__}: {words}"
    return None
