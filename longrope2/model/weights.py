"""A model's weights: found, checked against its class and tied the same way on every path.

Whatever reads them (one process, shares of ZeRO-3, search, evaluation, export, GGUF writer), the
files must hold exactly the parameters and saved buffers of the class: none missing, which would be
drawn at random, none unknown, which would be ignored, none twice. transformers then reads a whole
model; a model in shares is built without memory on torch's meta device and gets its parameters one
by one. Each is handed to ``take`` at once: under ZeRO-3 that keeps this rank's part and releases
the rest, so that no rank ever holds more than its share and one whole parameter.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import atomic_path
from longrope2.model.folder import weight_files

_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# Tables that old Llama checkpoints carry along; ours come from the factors.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_POINTER = b"version https://git-lfs"
Take = Callable[[nn.Parameter], None]
_Owners = list[tuple[nn.Module, str]]


@dataclass(frozen=True)
class Weights:
    """Checked weights of a model folder."""

    folder: Path
    places: dict[str, Path]
    """Tensor name -> file, of the tensors that the model reads."""
    converted: bool
    """Whether the files name them otherwise and transformers converts them (mixtures of experts,
    stored expert by expert)."""

    def by_file(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name of a file and the tensors in it that the model reads, one file in memory at a time.

        Raises:
            ArtifactError: a tensor cannot be read.
        """
        for path in sorted(set(self.places.values())):
            names = [name for name, place in self.places.items() if place == path]
            yield path.name, {name: _read(path, name) for name in names}


def check_weights(hf: PreTrainedModel, folder: Path) -> Weights:
    """Compare the files' headers with a model (on any device, the meta device too).

    Raises:
        ArtifactError: no weights, or a file that is damaged, a pointer, or missing; tensors that
            are missing, unknown, in two files, of another shape, or tied and different; by name.
    """
    places, names = _find_tensors(folder), _names_of_parameters(hf)
    known, saved = {name for tied in names.values() for name in tied}, saved_buffers(hf)
    ignored = [re.compile(pattern) for pattern in hf._keys_to_ignore_on_load_unexpected or ()]
    missing = [tied[0] for tied in names.values() if not any(name in places for name in tied)]
    missing += [name for name in saved if name not in places]
    unknown = [
        name
        for name in places
        if name not in known
        and name not in saved
        and not name.endswith(_DERIVED_SUFFIX)
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing or unknown:
        if get_model_conversion_mapping(hf, add_legacy=False):
            return Weights(folder, places, converted=True)
        raise ArtifactError(_mismatch(hf, folder, missing, unknown))
    places = {name: path for name, path in places.items() if name in known or name in saved}
    _check_shapes(hf, places)
    for tied in names.values():
        _refuse_two_values(folder, places, [name for name in tied if name in places])
    return Weights(folder, places, converted=False)


def read_whole(weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers loads it.

    Raises:
        ArtifactError: transformers found something missing, unknown or of another shape all the
            same (weights that it converts are only known then).
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        weights.folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=weights.converted,  # they are refused below, by name
    )
    hf, found = loaded
    wrong = {
        what: sorted(map(str, found.get(key) or ()))
        for what, key in (
            ("missing", "missing_keys"),
            ("unknown", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
            ("not read", "error_msgs"),
        )
    }
    if weights.converted and any(wrong.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise ArtifactError(
            f"{weights.folder} does not hold the parameters of {type(hf).__name__} ({listed})"
        )
    return hf


def fill_in_shares(
    hf: PreTrainedModel, weights: Weights, dtype: torch.dtype, take: Take, *, read: bool = True
) -> None:
    """Give every parameter of ``hf`` (on the meta device) its values, one at a time.

    Args:
        hf: The model, built on the meta device.
        weights: Checked for it.
        dtype: Number format of the parameters.
        take: Called with each parameter when it is real.
        read: False gives ``take`` memory without values: for ranks that get them from another.

    Raises:
        ArtifactError: a tensor cannot be read.
    """
    names = _names_of_parameters(hf)
    whole: dict[str, Tensor] = {}
    if weights.converted and read:  # transformers converts a whole model only
        whole = dict(read_whole(weights, dtype).named_parameters(remove_duplicate=False))
    for parameter, owners in _parameters_with_owners(hf):
        if not read:
            values = torch.empty(parameter.shape, dtype=dtype)
        elif weights.converted:
            values = whole[names[id(parameter)][0]].data
        else:
            name = next(name for name in names[id(parameter)] if name in weights.places)
            values = _read(weights.places[name], name).to(dtype)
        take(_replace(owners, values, parameter))


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one ``*.safetensors`` file, atomically.

    Raises:
        DiskFullError: there is no space for it.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # It tells the system's fault in its text alone.
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def saved_buffers(hf: nn.Module) -> dict[str, Tensor]:
    """The tensors that are no parameters and belong into its files all the same.

    A mixture of experts may correct its router with one (DeepSeek-V3, GLM-4.5).
    """
    parameters = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    return {name: values for name, values in hf.state_dict().items() if name not in parameters}


@torch.no_grad()
def fill_buffers(hf: PreTrainedModel, weights: Weights | None) -> None:
    """Give the tensors that are no parameters their values: from the files, else from the class.

    Args:
        hf: The model, built on the meta device; its parameters are left alone.
        weights: Checked for it; None where it starts at random.

    Raises:
        ArtifactError: neither has a value for one; whoever loads the model then reads whatever
            lies in memory, one process like many.
    """
    unset: dict[str, Tensor] = {}
    for prefix, module in hf.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                mark = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
                values = torch.full(buffer.shape, mark, dtype=buffer.dtype)
                unset[f"{prefix}.{name}".lstrip(".")] = module._buffers[name] = values
    for module, initialise in _modules_with_initialiser(hf, hf):
        if any(True for _ in module.buffers(recurse=False)):
            initialise(module)
    places, saved = {} if weights is None else weights.places, saved_buffers(hf)
    for name, buffer in hf.named_buffers():
        if name in saved and name in places:
            buffer.copy_(_read(places[name], name))
        elif name in unset and _is_unset(buffer):
            way_out = "use a version of transformers whose class sets it"
            if name in saved:
                way_out = f"start from weights that hold it, or {way_out}"
            raise ArtifactError(
                f"{type(hf).__name__} keeps {name}, which is no parameter, and neither its class "
                f"nor its weights say its value, which would be whatever lies in memory; {way_out}"
            )


def _is_unset(buffer: Tensor) -> bool:
    """Whether the mark of an unset value is still in it."""
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())


@torch.no_grad()
def fill_at_random(hf: PreTrainedModel, dtype: torch.dtype, take: Take) -> None:
    """Initialise every parameter of ``hf`` (on the meta device) as its class does.

    The values depend on torch's random state of the CPU alone: not on ``take``, nor on the number
    of ranks.

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


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor of a model folder, from the files' own headers."""
    index = folder / _INDEX_FILE
    if not index.is_file():
        places: dict[str, Path] = {}
        for path in weight_files(folder):
            for name in _tensors_in(path):
                if name in places:
                    raise ArtifactError(
                        f"{folder}: {name} is in {places[name].name} and {path.name}"
                    )
                places[name] = path
        others = sorted({path.name for path in places.values()} - {_WEIGHTS_FILE})
        if others:  # transformers would read _WEIGHTS_FILE alone, and draw the rest
            raise ArtifactError(
                f"{folder} holds {_some(others)} and no {_INDEX_FILE} that says what is in which "
                f"file; without it only {_WEIGHTS_FILE} is read: add the index or remove the rest"
            )
        return places
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        _ = content["metadata"]  # transformers asks for it
        stated: dict[str, str] = content["weight_map"]
        files = {file: folder / file for file in set(stated.values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index} is no index of weights: {error}") from None
    absent = sorted(file for file, path in files.items() if not path.is_file())
    if absent:
        raise ArtifactError(f"{index} names {_some(absent)}, which is not there; download it again")
    held = {file: set(_tensors_in(path)) for file, path in sorted(files.items())}
    first: dict[str, str] = {}
    for file, names in held.items():
        if doubled := sorted(names & first.keys()):
            raise ArtifactError(f"{folder}: {doubled[0]} is in {first[doubled[0]]} and {file}")
        first |= dict.fromkeys(names, file)
    lacking = [name for name, file in stated.items() if name not in held[file]]
    extra = sorted(set().union(*held.values()) - stated.keys())
    if lacking or extra:
        raise ArtifactError(
            f"{index} does not fit its files (named but not there: {_some(lacking)}; there but not "
            f"named: {_some(extra)})"
        )
    return {name: folder / file for name, file in stated.items()}


def _tensors_in(path: Path) -> list[str]:
    """Names in the header of one file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        if path.open("rb").read(len(_POINTER)) == _POINTER:
            raise ArtifactError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            ) from None
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}") from None


def _check_shapes(hf: PreTrainedModel, places: dict[str, Path]) -> None:
    """Refuse tensors of another shape than the class has."""
    wanted = dict(hf.named_parameters(remove_duplicate=False)) | saved_buffers(hf)
    faults = []
    for path in set(places.values()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if name in wanted and [*wanted[name].shape] != file.get_slice(name).get_shape():
                    found = file.get_slice(name).get_shape()
                    faults.append(f"{name} has shape {found}, not {[*wanted[name].shape]}")
    if faults:
        raise ArtifactError(f"{next(iter(places.values())).parent}: {_some(sorted(faults))}")


def _refuse_two_values(folder: Path, places: dict[str, Path], names: list[str]) -> None:
    """Tied parameters that a file holds several times must be equal."""
    for name in names[1:]:
        if not torch.equal(_read(places[names[0]], names[0]), _read(places[name], name)):
            raise ArtifactError(
                f"{folder}: config.json ties {names[0]} and {name} (tie_word_embeddings), but the "
                "weights hold two different ones; correct config.json"
            )


def _names_of_parameters(hf: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, several when tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _mismatch(hf: nn.Module, folder: Path, missing: list[str], unknown: list[str]) -> str:
    """What is wrong with the names, and a likely cause."""
    text = (
        f"{folder} does not hold the parameters of {type(hf).__name__} (missing: {_some(missing)}; "
        f"unknown: {_some(unknown)})"
    )
    for prefix in ("module.", "language_model.", "_orig_mod."):
        if unknown and all(name.startswith(prefix) for name in unknown):
            return f"{text}; every name begins with {prefix!r}: save the model without its wrapper"
    parameters, prefix = dict(hf.named_parameters()), f"{getattr(hf, 'base_model_prefix', '')}."
    if unknown and all(prefix + name in parameters for name in unknown):
        return f"{text}; the names lack {prefix!r}: save the whole {type(hf).__name__}"
    return f"{text}; a parameter without values would be random"


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {name} cannot be read: {error}") from None


def _parameters_with_owners(hf: nn.Module) -> list[tuple[nn.Parameter, _Owners]]:
    """Every parameter once, with the places that hold it (several when tied)."""
    found: dict[int, tuple[nn.Parameter, _Owners]] = {}
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _replace(owners: _Owners, values: Tensor, like: nn.Parameter) -> nn.Parameter:
    """Put a real parameter in all places of the one it replaces."""
    parameter = nn.Parameter(values, requires_grad=like.requires_grad)
    for module, name in owners:
        module._parameters[name] = parameter
    return parameter


def _modules_with_initialiser(
    module: nn.Module, model: PreTrainedModel
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], Any]]]:
    """Children before parents, each with the initialiser of the innermost transformers model."""
    for child in module.children():
        inner = child if isinstance(child, PreTrainedModel) else model
        yield from _modules_with_initialiser(child, inner)
    yield module, model._init_weights


def _some(names: list[str]) -> str:
    """A few of them, or none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"
