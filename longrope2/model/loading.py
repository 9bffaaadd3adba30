"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry.

A model can be built without memory on torch's meta device and get its weights one parameter at a
time, read from safetensors or drawn at random. Each is handed to ``take`` at once: under ZeRO-3
that keeps this rank's part and releases the rest, so that no rank ever holds more than its share
and one whole parameter.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError, FactorsError
from longrope2.model.folder import weight_files
from longrope2.model.shape import CONFIG_FILE, read_model_config
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import UNSCALED_TYPE, config_geometry, config_rope_type

_INDEX_FILE = "model.safetensors.index.json"
# Tables that old Llama checkpoints carry along; ours come from the factors.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
Take = Callable[[nn.Parameter], None]
_Owners = list[tuple[nn.Module, str]]


def _fill_from_safetensors(
    hf: PreTrainedModel, folder: Path, dtype: torch.dtype, take: Take, *, read: bool = True
) -> None:
    """Read every parameter of ``hf`` (on the meta device) from the folder's safetensors files.

    The names in the files must be the model's own, as in any checkpoint of a dense model that
    transformers saves. With an index, only the files it names are read. ``read=False`` gives
    ``take`` memory without values: for ranks that get them from another.

    Raises:
        ArtifactError: a file is damaged, or the files do not hold exactly the model's parameters.
    """
    places = _where_tensors_are(folder)
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {
        key: next((name for name in tied if name in places), None) for key, tied in names.items()
    }
    missing = [tied[0] for key, tied in names.items() if found[key] is None]
    known = {name for tied in names.values() for name in tied}
    extra = [name for name in places if name not in known and not name.endswith(_DERIVED_SUFFIX)]
    if missing or extra:
        raise ArtifactError(
            f"{folder} does not hold the parameters of {type(hf).__name__} under their own names "
            f"(missing: {_some(missing)}; unknown: {_some(extra)}): it cannot be read in shares; "
            "use parallel.zero_stage=2"
        )
    for parameter, owners in _parameters_with_owners(hf):
        name, shape = found[id(parameter)], parameter.shape
        assert name is not None
        path = places[name]
        values = _read(path, name).to(dtype) if read else torch.empty(shape, dtype=dtype)
        if values.shape != shape:
            raise ArtifactError(f"{path}: {name} has shape {[*values.shape]}, not {[*shape]}")
        take(_replace(owners, values, parameter))


@torch.no_grad()
def _fill_at_random(hf: PreTrainedModel, dtype: torch.dtype, take: Take) -> None:
    """Initialise every parameter of ``hf`` (on the meta device) as its class does.

    The values depend on torch's random state of the CPU alone: not on ``take`` or the ranks.
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
    """Name -> file of every tensor of a model folder."""
    index = folder / _INDEX_FILE
    try:
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in named.items()}
        places: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: its weights cannot be read: {error}") from None
    return places


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


def rope_geometry(folder: Path, original_len: int) -> RopeGeometry:
    """Rotary dimension and base from config.json, with the original window from our own settings.

    Honours ``head_dim`` and ``partial_rotary_factor``, reads either config layout, and takes what
    config.json leaves out from the model class.

    Raises:
        ArtifactError: the model has no RoPE base, or already carries a RoPE scaling that would be
            rescaled twice.
    """
    path = folder / CONFIG_FILE
    config = read_model_config(path)
    try:
        kind = config_rope_type(config)
        if kind != UNSCALED_TYPE:
            raise ArtifactError(
                f"{path} already has RoPE scaling {kind!r}; give model.path of the model before "
                "extension"
            )
        nested = config.get("rope_parameters") or {}
        if not (nested.get("rope_theta") or config.get("rope_theta")):
            raise ArtifactError(f"{path} has no rope_theta: only RoPE models can be extended")
        return config_geometry(config, original_len)
    except FactorsError as error:
        raise ArtifactError(f"{path}: {error}") from None


def load_windowed_model(
    folder: Path,
    factors: RescaleFactors,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    from_scratch: bool = False,
    take: Take | None = None,
    read: bool = True,
) -> WindowedModel:
    """Load or initialise the weights; attach the windowed rotary and attention.

    Args:
        folder: Model folder.
        factors: For the long window.
        device: Where the model goes; with ``take`` that decides.
        dtype: Number format of the weights.
        from_scratch: Random weights from torch's random state, the same with and without ``take``.
        take: Gets each parameter as soon as it is real and may keep a part of it (ZeRO-3).
        read: With ``take``, False leaves reading the values to another rank.

    Raises:
        ArtifactError: the folder has no weights, the factors do not fit the model's rotary
            dimension and base, or the model cannot be built in shares.
    """
    found = rope_geometry(folder, factors.geometry.original_len)
    if found != factors.geometry:
        raise ArtifactError(
            f"the factors are for {factors.geometry}, the model in {folder} has {found}"
        )
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    hf: Any
    if take is None and not from_scratch:
        weight_files(folder)
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model = WindowedModel(hf, factors)
    if hf.device.type == "meta":
        _refuse_derived_tensors(hf, folder)
        if from_scratch:
            _fill_at_random(hf, dtype, take or _keep)
        else:
            _fill_from_safetensors(hf, folder, dtype, take or _keep, read=read)
    return model if take else model.to(device)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """GPU in bf16, else CPU in fp32: bf16 products on a CPU are some hundred times slower."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def load_to_run(folder: Path, factors: RescaleFactors) -> WindowedModel:
    """``load_windowed_model`` for all but training: ``device_and_dtype``, evaluation mode."""
    device, dtype = device_and_dtype()
    return load_windowed_model(folder, factors, device=device, dtype=dtype).eval()


def _keep(parameter: nn.Parameter) -> None:
    """The whole parameter stays."""


def _refuse_derived_tensors(hf: nn.Module, folder: Path) -> None:
    """Tensors that are neither weights nor our rotary tables would stay without values."""
    names = [name for name, _ in hf.named_buffers()]
    if names:
        raise ArtifactError(
            f"{folder}: {type(hf).__name__} computes tensors of its own ({', '.join(names[:3])}), "
            "so it cannot be built in shares or from scratch; use parallel.zero_stage=2 and "
            "trained weights"
        )


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; text can never produce a special id.

    transformers sets the backend's ``encode_special_tokens`` anew at every call, from
    ``split_special_tokens``: only the latter holds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    return tokenizer
