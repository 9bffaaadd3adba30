"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry.

Give weights to a model that was built without memory, one parameter at a time.

A model on torch's meta device costs nothing. Its parameters are made real one by one, read from
safetensors or drawn at random, and each is handed to ``take`` at once: under ZeRO-3 it keeps this
rank's part and releases the rest, so that no rank ever holds more than its share and one whole
parameter.
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
from longrope2.model.shape import CONFIG_FILE, read_model_config
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import UNSCALED_TYPE, config_geometry, config_rope_type

INDEX_FILE = "model.safetensors.index.json"
DERIVED_SUFFIX = ".rotary_emb.inv_freq"  # tables that old Llama checkpoints carry along; ours come from the factors
Take = Callable[[nn.Parameter], None]
Owners = list[tuple[nn.Module, str]]


def fill_from_safetensors(
    hf: PreTrainedModel, folder: Path, dtype: torch.dtype, take: Take, *, read: bool = True
) -> None:
    """Read every parameter of ``hf`` (on the meta device) from the folder's safetensors files.

    The names in the files must be the model's own, as in any checkpoint of a dense model that
    transformers saves.

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
    found = {
        key: next((name for name in tied if name in places), None) for key, tied in names.items()
    }
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
        values = (
            _read(places[name], name).to(dtype)
            if read
            else torch.empty(parameter.shape, dtype=dtype)
        )
        if values.shape != parameter.shape:
            raise ArtifactError(
                f"{places[name]}: {name} has shape {[*values.shape]}, not {[*parameter.shape]}"
            )
        take(_replace(owners, values, parameter))


@torch.no_grad()
def fill_at_random(hf: PreTrainedModel, dtype: torch.dtype, take: Take) -> None:
    """Initialise every parameter of ``hf`` (on the meta device) as its class does, from torch's
    random state of the CPU.

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
            return {
                n: folder / file
                for n, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            }
        places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: its weights cannot be read: {error}") from None
    if not places:
        raise ArtifactError(
            f"{folder} holds no *.safetensors weights; check model.path or the checkpoint"
        )
    return places


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {name} cannot be read: {error}") from None


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
        yield from _modules_with_initialiser(
            child, child if isinstance(child, PreTrainedModel) else model
        )
    yield module, model._init_weights


def _some(names: list[str]) -> str:
    """A few of them, or none."""
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
    )


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
                f"{path} already has RoPE scaling {kind!r}; give model.path of the model before extension"
            )
        if not (config.get("rope_parameters") or {}).get("rope_theta") and not config.get(
            "rope_theta"
        ):
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
    """Load the weights (or initialise them, ``from_scratch``) and attach the windowed rotary and
    attention.

    Args:
        folder: Model folder.
        factors: For the long window.
        device: Where the model goes; with ``take`` that decides.
        dtype: Number format of the weights.
        from_scratch: Random weights from torch's random state, the same with and without ``take``.
        take: Gets each parameter as soon as it is real and may keep a part of it: the model is
            never whole (ZeRO-3).
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
    if take is None and not from_scratch:
        if not any(folder.glob("*.safetensors")):
            raise ArtifactError(
                f"{folder} holds no *.safetensors weights; check model.path or the checkpoint"
            )
        hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return WindowedModel(hf.to(device), factors)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model = WindowedModel(hf, factors)
    _refuse_derived_tensors(hf, folder)
    if from_scratch:
        fill_at_random(hf, dtype, take or _keep)
    else:
        fill_from_safetensors(hf, folder, dtype, take or _keep, read=read)
    return model if take else model.to(device)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """GPU in bf16, else CPU in fp32: bf16 products on a CPU are some hundred times slower."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def load_to_run(folder: Path, factors: RescaleFactors) -> WindowedModel:
    """``load_windowed_model`` for everything but training: ``device_and_dtype``, evaluation mode."""
    device, dtype = device_and_dtype()
    return load_windowed_model(folder, factors, device=device, dtype=dtype).eval()


def _keep(parameter: nn.Parameter) -> None:
    """The whole parameter stays."""


def _refuse_derived_tensors(hf: nn.Module, folder: Path) -> None:
    """Tensors that are neither weights nor our rotary tables would stay without values.

    Raises:
        ArtifactError: there are some.
    """
    names = [name for name, _ in hf.named_buffers()]
    if names:
        raise ArtifactError(
            f"{folder}: {type(hf).__name__} computes tensors of its own ({', '.join(names[:3])}), so it cannot be built in "
            "shares or from scratch; use parallel.zero_stage=2 and trained weights"
        )


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; text can never produce a special id.

    transformers sets the backend's ``encode_special_tokens`` anew at every call, from
    ``split_special_tokens``: only the latter holds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    return tokenizer
