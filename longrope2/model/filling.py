"""Give weights to a model that was built without memory, one parameter at a time.

A model on torch's meta device costs nothing. Its parameters are made real one by one, read from safetensors or drawn at
random, and each is handed to ``take`` at once: under ZeRO-3 it keeps this rank's part and releases the rest, so that no rank
ever holds more than its share and one whole parameter.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope2.errors import ArtifactError

__all__ = ["fill_at_random", "fill_from_safetensors"]

INDEX_FILE = "model.safetensors.index.json"
DERIVED_SUFFIX = ".rotary_emb.inv_freq"  # tables that old Llama checkpoints carry along; ours come from the factors

Take = Callable[[nn.Parameter], None]


def fill_from_safetensors(
    hf: PreTrainedModel, folder: Path, dtype: torch.dtype, take: Take, *, read: bool = True
) -> None:
    """Read every parameter of ``hf`` (on the meta device) from the folder's safetensors files.

    The names in the files must be the model's own, as in any checkpoint of a dense model that transformers saves.

    Args:
        hf: The model, built on the meta device.
        folder: Model folder; with an index, only the files it names are read.
        dtype: Number format of the parameters.
        take: Called with each parameter when it is real.
        read: False gives ``take`` memory without values: for ranks that get them from another.

    Raises:
        ArtifactError: a file is damaged, or the files do not hold exactly the model's parameters.
    """
    places = _where_tensors_are(folder)
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {key: next((name for name in tied if name in places), None) for key, tied in names.items()}
    missing = [tied[0] for key, tied in names.items() if found[key] is None]
    known = {name for tied in names.values() for name in tied}
    extra = [name for name in places if name not in known and not name.endswith(DERIVED_SUFFIX)]
    if missing or extra:
        raise ArtifactError(
            f"{folder} does not hold the parameters of {type(hf).__name__} under their own names (missing: "
            f"{_some(missing)}; unknown: {_some(extra)}): it cannot be read in shares; use parallel.zero_stage=2"
        )
    for parameter, owners in _parameters_with_owners(hf):
        name = found[id(parameter)]
        assert name is not None
        values = _read(places[name], name).to(dtype) if read else torch.empty(parameter.shape, dtype=dtype)
        if values.shape != parameter.shape:
            raise ArtifactError(f"{places[name]}: {name} has shape {[*values.shape]}, not {[*parameter.shape]}")
        take(_replace(owners, values, parameter))


@torch.no_grad()
def fill_at_random(hf: PreTrainedModel, dtype: torch.dtype, take: Take) -> None:
    """Initialise every parameter of ``hf`` (on the meta device) as its class does, from torch's random state of the CPU.

    The values depend on nothing but that state: not on ``take``, nor on the number of ranks.

    Args:
        hf: The model, built on the meta device.
        dtype: Number format of the parameters.
        take: Called with each parameter when it is real.
    """
    owners_of = {id(parameter): owners for parameter, owners in _parameters_with_owners(hf)}
    for module, initialise in _modules_with_initialiser(hf, hf):
        # Drawn in float32 and rounded once, so that a bf16 model starts as the rounded float32 one.
        new = [
            _replace(owners_of[id(parameter)], torch.empty(parameter.shape), parameter)
            for parameter in list(module.parameters(recurse=False))
            if parameter.is_meta
        ]
        if new:
            initialise(module)
        for parameter in new:
            parameter.data = parameter.data.to(dtype)
            take(parameter)


def _where_tensors_are(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor of a model folder.

    Raises:
        ArtifactError: no weights, or an index or file that cannot be read.
    """
    index = folder / INDEX_FILE
    try:
        if index.is_file():
            return {n: folder / file for n, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: its weights cannot be read: {error}") from None
    if not places:
        raise ArtifactError(f"{folder} holds no *.safetensors weights; check model.path or the checkpoint")
    return places


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {name} cannot be read: {error}") from None


Owners = list[tuple[nn.Module, str]]


def _parameters_with_owners(hf: nn.Module) -> list[tuple[nn.Parameter, Owners]]:
    """Every parameter once, with the places that hold it (several when tied)."""
    found: dict[int, tuple[nn.Parameter, Owners]] = {}
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _replace(owners: Owners, values: Tensor, like: nn.Parameter) -> nn.Parameter:
    """Put a real parameter in all places of the one it replaces."""
    parameter = nn.Parameter(values, requires_grad=like.requires_grad)
    for module, name in owners:
        module._parameters[name] = parameter
    return parameter


def _modules_with_initialiser(
    module: nn.Module, model: PreTrainedModel
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], Any]]]:
    """Children before parents, each with the initialisation of the innermost transformers model around it."""
    for child in module.children():
        yield from _modules_with_initialiser(child, child if isinstance(child, PreTrainedModel) else model)
    yield module, model._init_weights


def _some(names: list[str]) -> str:
    """A few of them, or none."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
