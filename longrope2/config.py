"""Configuration glue: typed Hydra schemas in, one checked object out. Only this module and the
mains know Hydra.

A root schema (``PackConfig``, ``TrainRoot``, ...) stands beside the code it configures. ``compose``
registers it, merges the YAML of ``conf/`` and the user's overrides into it, and turns every fault
into a ``ConfigError`` that names the key. The resolved configuration is written into the run
folder; ranks read that file and never compose.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longrope2.errors import ConfigError
from longrope2.files.artifacts import write_text

CONF_FOLDER = Path(__file__).parent.parent / "conf"
SHORTEST_WINDOW = 8
Root = TypeVar("Root")


@dataclass
class RunConfig:
    """Where the products of a run stand."""

    name: str = MISSING
    """Folder name under ``root``, may contain slashes; every stage of one extension shares it."""
    root: str = "runs"
    """Folder of all runs."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.name


@dataclass
class ModelConfig:
    """The pre-trained model to extend."""

    name: str = MISSING
    """Short name, used in run names and reports."""
    path: str = MISSING
    """Folder or hub id of a Hugging Face model."""
    original_len: int = MISSING
    """L0: pre-trained window in tokens. A setting of ours, never guessed from config.json."""
    config_folder: str | None = None
    """Folder with the model's config.json alone: what a dry run plans from where the model itself
    is not."""
    from_scratch: bool = False
    """Initialise the weights at random instead of loading them (pre-training a miniature)."""


@dataclass
class StageConfig:
    """What every stage's configuration holds."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    target_len: int = MISSING
    """L: target window in tokens, a multiple of ``model.original_len``."""
    seed: int = 0
    """Seed of everything random in the stage."""
    dry_run: bool = False
    """Compose, check and print the plan, then stop without writing anything."""


def target_faults(model: ModelConfig, target_len: int, *, extends: bool = False) -> list[str]:
    """Why a target window does not fit the model's: it must be a multiple of it.

    Args:
        model: The pre-trained model.
        target_len: L in tokens.
        extends: Whether rescaling is the purpose (at least 2 L0), or L0 itself will do, as in
            pre-training a base at its own window.
    """
    original_len, least = model.original_len, 2 if extends else 1
    if original_len < SHORTEST_WINDOW:
        window = f"model.original_len={original_len} is not a window"
        return [f"{window}; give the pre-trained window in tokens"]
    if target_len >= least * original_len and target_len % original_len == 0:
        return []
    return [
        f"target_len={target_len} must be a multiple of model.original_len={original_len}, "
        f"{'and at least twice that' if extends else 'and not below it'}; "
        f"use for example {max(least, round(target_len / original_len)) * original_len}"
    ]


def compose(root: type[Root], config_name: str, overrides: Sequence[str]) -> Root:
    """Compose ``conf/<config_name>.yaml`` with ``overrides`` into an object of the schema ``root``.

    Raises:
        ConfigError: unknown key, wrong type, missing value, or unknown group member; names the key.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=root)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base="1.3"):
            composed = hydra_compose(config_name=config_name, overrides=list(overrides))
        return _to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_explain(error)]) from None


def dump(config: Any, path: Path) -> None:
    """Write a configuration object as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load(root: type[Root], path: Path) -> Root:
    """Read a ``config.yaml`` that ``dump`` wrote back into an object of ``root``.

    Raises:
        ConfigError: the file is missing or does not fit the schema.
    """
    if not path.is_file():
        raise ConfigError(
            [f"--config {path}: no such file; run the stage once without --config to write it"]
        )
    try:
        return _to_object(OmegaConf.merge(OmegaConf.structured(root), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {_explain(error)}"]) from None


def claim_folder(folder: Path, config: Any, changeable: Sequence[str] = ()) -> None:
    """Write ``config.yaml`` into a product folder, unless another configuration already made the
    product there.

    A key that the file does not have came later: its default was in force. Where the runs stand
    (``run.root``) is no part of what was made: a run may be moved.

    Args:
        folder: Product folder.
        config: Configuration object of the stage.
        changeable: Dotted keys (or their parents) that may differ from the configuration found.

    Raises:
        ConfigError: the folder holds a product of another configuration; names each key that
            differs.
    """
    path = folder / "config.yaml"
    if path.is_file():
        found = _flatten(OmegaConf.to_container(OmegaConf.load(path)))
        wanted = _flatten(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
        defaults = _flatten(
            OmegaConf.to_container(OmegaConf.structured(type(config)), enum_to_str=True)
        )
        free = ("run.root", *changeable)
        faults = [
            f"{key} is {wanted.get(key)}, but {path} was made with {found.get(key, defaults.get(key))}"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key, defaults.get(key)) != wanted.get(key)
            and not any(f"{key}.".startswith(f"{c}.") for c in free)
        ]
        if faults:
            raise ConfigError(
                [*faults, f"use another run.name, or remove {folder} to make it again"]
            )
    dump(config, path)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested containers -> dotted keys."""
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {
        k: v for name, child in node.items() for k, v in _flatten(child, f"{prefix}{name}.").items()
    }


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration object as plain JSON values, for manifests."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _to_object(composed: Any) -> Any:
    """Structured config -> dataclass instance, refusing missing values first."""
    assert isinstance(composed, DictConfig)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError([f"{key} is not set; give it as {key}=VALUE" for key in missing])
    return OmegaConf.to_object(composed)


def _explain(error: Exception) -> str:
    """One line for a user from a Hydra or OmegaConf error: the key, what was given, what is allowed."""
    if (
        isinstance(error, MissingConfigException)
        and error.missing_cfg_file
        and error.options is not None
    ):
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice} does not exist; choose {group}= one of {', '.join(sorted(error.options))}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '([^']+)')", "\n".join(lines))
    if unknown:
        return _explain_unknown_key(
            lines, unknown.group(1), getattr(cause, "full_key", None), cause
        )
    kept = [
        line
        for line in lines
        if not line.startswith(("object_type", "reference_type", "In '", "You may be able"))
    ]
    return " ".join(dict.fromkeys(kept))


def _explain_unknown_key(
    lines: list[str], key: str, full_key: str | None, cause: BaseException
) -> str:
    """Name the unknown key in full and list its neighbours when the schema is known."""
    named = next(
        (line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")),
        full_key or key,
    )
    schema = getattr(cause, "object_type", None)
    text = f"unknown key {named}"
    if isinstance(schema, type) and dataclasses.is_dataclass(schema):
        allowed = ", ".join(f.name for f in dataclasses.fields(schema))
        return f"{text}; keys beside it: {allowed}"
    if schema is dict:
        return f"{text}; to add it, put + in front: +{named}=VALUE"
    return text
