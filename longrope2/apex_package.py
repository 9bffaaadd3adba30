"""NVIDIA's apex, told apart from the package of that name on the Python package index."""

import importlib.metadata
import importlib.util
from pathlib import Path

__all__ = ["apex_fault"]


def apex_fault() -> str | None:
    """Why NVIDIA's apex is not here, without importing it: another project has had the name since 2013. None if it is."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "NVIDIA apex is not installed"
    if any(
        (Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in spec.submodule_search_locations or ()
    ):
        return None
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return (
        f"the package apex found at {spec.origin} (version {version}) is not NVIDIA's, which has optimizers.FusedAdam; "
        "the apex of the Python package index is a web toolkit of 2013"
    )
