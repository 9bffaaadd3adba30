"""Configuration glue: typed schemas in, one checked object out.

A root schema (``PackConfig``, ``TrainRoot``, ...) stands beside the code it configures. ``compose``
merges the YAML of ``conf/`` and the user's settings into it, and turns every fault into a
``ConfigError`` that names the key. The resolved configuration is written into the run folder; ranks
read that file and never compose. Only this module, ``presets.py`` and ``command_line.py`` know
Hydra.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longrope2.command_line import Setting, read_setting, split_argument, unknown_key
from longrope2.errors import ConfigError
from longrope2.files.artifacts import (
    SOURCE_FILE,
    find_segments,
    product_folder,
    run_with,
    source_of,
    write_text,
)
from longrope2.files.checked import read_settings
from longrope2.help import UNSET, command_help, help_topic, list_keys, topic_help
from longrope2.presets import (
    CONF_FOLDER,
    SHIPPED,
    choose_member,
    list_members,
    merge_presets,
    no_member,
    read_groups,
    read_header,
)

SHORTEST_WINDOW = 8
_WAY_OUT = "bring it back, or remove it: the stage that is run with the same settings writes it"
# user:password@ in any address, user@ in one of the web (a token, mostly).
_PASSWORD = re.compile(r"(?:(?<=://)[^/@\s]*:[^/@\s]*|(?<=https://)[^/@\s]+|(?<=http://)[^/@\s]+)@")
Root = TypeVar("Root")


@dataclass
class RunConfig:
    """Where the products of a run stand."""

    name: str = MISSING
    """Folder name under ``root``, may contain slashes; every stage of one extension shares it."""
    root: str = "runs"
    """Folder of all runs."""
    from_run: str | None = None
    """Name of another run under ``root``: its segments (those given to its training, if any were)
    and its factors count where this run has none of its own. The run remembers it; later commands
    need not give it again."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.name

    def folder_with(self, product: str) -> Path:
        """The run folder whose segments or factors a stage reads: this one or ``from_run``'s."""
        own = product_folder(self.folder, product).exists() or self.from_run is None
        return self.folder if own else run_with(Path(self.root) / str(self.from_run), product)

    @property
    def segments_folder(self) -> Path:
        """Where the run's segments stand: its own, or what ``from_run`` has or was given."""
        found = find_segments(self.folder)
        if found is None and self.from_run is not None:
            found = find_segments(Path(self.root) / self.from_run)
        return found or product_folder(self.folder, "segments")

    def describe_source(self) -> str:
        """What is taken from another run, in words; "" where nothing is."""
        segments, factors = self.segments_folder, self.folder_with("factors")
        taken = []
        if self.from_run is not None and segments != product_folder(self.folder, "segments"):
            run = segments.parent
            is_of_run = product_folder(run, "segments") == segments
            taken.append(f"segments {f'of {run}' if is_of_run else f'in {segments}'}")
        if factors != self.folder and product_folder(factors, "factors").exists():
            taken.append(f"factors of {factors}")
        return ", ".join(taken)

    def remembered(self) -> str | None:
        """``from_run`` as the run was begun with."""
        source = source_of(self.folder)
        return None if source is None else os.path.relpath(source, self.root)

    def remember(self) -> None:
        """Note ``from_run`` in the run folder, as a path from there."""
        if self.from_run is not None and source_of(self.folder) is None:
            source = os.path.relpath(Path(self.root) / self.from_run, self.folder)
            write_text(self.folder / SOURCE_FILE, f"{source}\n")

    def faults(self) -> list[str]:
        """Names that are no folders of their own below ``root``, or a source that cannot be one."""
        faults = []
        if not _is_below(self.name):
            fault = f"run.name={self.name} must name a folder below run.root={self.root}"
            faults.append(f"{fault}; set run.root to have it elsewhere")
        return faults if self.from_run is None else faults + self._source_faults(self.from_run)

    def _source_faults(self, name: str) -> list[str]:
        given, remembered = f"run.from_run={name}", self.remembered()
        if not _is_below(name):
            return [f"{given} must name a run below run.root={self.root}"]
        if remembered not in (None, name):
            return [f"{given}, but {self.folder} takes from {remembered}; use another run.name"]
        source: Path | None = Path(self.root) / name
        if not source.is_dir():
            return [f"{given}: {source} does not exist; give the name of a run in {self.root}"]
        while source is not None:
            if source == self.folder:
                return [f"{given} takes from {self.name} itself; name another run"]
            source = source_of(source)
        return []


class SlidingWindow(Enum):
    """What becomes of a sliding window that a model's config.json asks for."""

    keep = "keep"
    """It stays; one below ``target_len`` is refused, because attention here has none."""
    drop = "drop"
    """Every layer attends to everything, in training, evaluation and export."""


class DocumentStart(Enum):
    """What stands in front of every document (``corpora/tokenizer.py`` applies it)."""

    auto = "auto"
    bos = "bos"
    none = "none"


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
    config: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json that replace or join the model's own, in every stage and in what it
    writes; the model's folder stays as it is."""
    sliding_window: SlidingWindow = SlidingWindow.keep
    """Of a sliding window below ``target_len``: ``keep`` refuses the model, ``drop`` runs it with
    full attention, which exports say."""
    dropout: float | None = None
    """null refuses a model whose config.json draws dropout in training; 0 trains it without."""
    document_start: DocumentStart = DocumentStart.auto
    """What starts a document, in segments, samples and prompts: ``auto``, BOS where the tokenizer
    itself adds one to a text, else nothing (Qwen has no BOS); ``bos``; ``none``. EOS ends it."""

    # No annotation, so that it is no key: what a preset says of the model at its own path, which is
    # not the one given (``model/facts.py``). Field -> value, the preset's path among them.
    foreign = MappingProxyType[str, Any]({})


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
    original_len, least = model.original_len, _least_scale(extends)
    if original_len < SHORTEST_WINDOW:
        window = f"model.original_len={original_len} is not a window"
        return [f"{window}; give the pre-trained window in tokens"]
    if target_len >= least * original_len and target_len % original_len == 0:
        return []
    return [
        f"target_len={target_len} must be a multiple of model.original_len={original_len}, "
        f"{'and at least twice that' if extends else 'and not below it'}; "
        f"use for example {nearest_target(model, target_len, extends=extends)}"
    ]


def nearest_target(model: ModelConfig, target_len: int, *, extends: bool = False) -> int:
    """The window nearest to ``target_len`` that ``target_faults`` takes."""
    original_len = max(model.original_len, SHORTEST_WINDOW)
    return max(_least_scale(extends), round(target_len / original_len)) * original_len


def _least_scale(extends: bool) -> int:
    return 2 if extends else 1


def _is_below(name: str) -> bool:
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def find_shipped(path: str) -> Path:
    """Where a path of a preset (``models/tiny``) stands: here, or else beside the presets."""
    path = os.path.expanduser(path)
    shipped = SHIPPED / path
    elsewhere = _is_of_preset(path) and not Path(path).exists() and shipped.exists()
    return shipped if elsewhere else Path(path)


def where_looked(path: str) -> str:
    """The end of a message about a preset's path that is in neither place; "" for other paths."""
    return f"; looked for in {Path.cwd()} and {SHIPPED}" if _is_of_preset(path) else ""


def _is_of_preset(path: str) -> bool:
    return Path(path).parts[:1] in (("conf",), ("models",))


def compose(root: type[Root], config_name: str, arguments: Sequence[str]) -> Root:
    """Compose ``conf/<config_name>.yaml`` and a command line into an object of the schema ``root``.

    ``--help [GROUP]`` prints what there is to set, under the other arguments, and ends the process.

    Raises:
        ConfigError: unknown keys, flags and group members, wrong types, missing values: all faults
            of the command line together, each naming its key and the way out.
    """
    topic = help_topic(arguments)
    groups = read_groups(config_name)
    chosen: dict[str, str | None] = {}
    settings: list[Setting] = []
    faults: list[str] = []
    for argument in arguments if topic is None else [a for a in arguments if "=" in a]:
        try:
            key, text, adds = split_argument(argument)
            if key in groups:
                choose_member(chosen, key, text, adds)
            else:
                settings.append(read_setting(root, key, text, adds, groups))
        except ConfigError as error:
            faults += error.faults
    try:
        config = merge_presets(root, config_name, chosen)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*faults, _explain(error)]) from None
    preset = str(OmegaConf.select(config, "model.name", throw_on_missing=False))
    for setting in settings:
        try:
            config = _open_parents(config, setting.key)
            OmegaConf.update(config, setting.key, setting.value, merge=True, force_add=setting.adds)
        except OmegaConfBaseException as error:
            faults.append(_explain(error))
    if topic is not None and not faults:
        print(_help(root, config_name=config_name, config=config, groups=groups, topic=topic))
        sys.exit(0)
    open_groups = {group: chosen.get(group, "") for group, member in groups.items() if not member}
    faults += _value_faults(config, open_groups)
    if faults:
        raise ConfigError(faults)
    made = _to_object(config)
    if isinstance(model := getattr(made, "model", None), ModelConfig):
        given = {setting.key for setting in settings}
        model.foreign = MappingProxyType(_foreign_facts(preset, model, given))
    return made


def _foreign_facts(name: str, model: ModelConfig, given: Collection[str]) -> dict[str, Any]:
    """What stands in ``model`` because the preset ``name`` says it of the model at another path."""
    preset = CONF_FOLDER / "model" / f"{name}.yaml"
    stated: Any = OmegaConf.to_container(OmegaConf.load(preset)) if preset.is_file() else {}
    if stated.get("path", model.path) == model.path:
        return {}
    plain = to_plain(model)
    kept = [key for key in stated if f"model.{key}" not in given and plain[key] == stated[key]]
    return {"path": stated["path"], **{key: stated[key] for key in kept}}


def _help(
    root: type, config_name: str, config: DictConfig, groups: dict[str, str | None], topic: str
) -> str:
    """Text of ``--help [TOPIC]``."""
    keys = list(list_keys(root, OmegaConf.to_container(config, enum_to_str=True)))
    if topic:
        members = list_members(topic) if topic in groups else {}
        plain = {name: text.replace("# ", "").replace("\n", " ") for name, text in members.items()}
        return topic_help(topic, plain, keys)
    header = read_header(CONF_FOLDER / f"{config_name}.yaml")
    return command_help(header, groups, {group: list_members(group) for group in groups}, keys)


def _open_parents(config: Any, key: str) -> Any:
    """The configuration with defaults in the group that is null above ``key``: ``rope.method``."""
    above = key.rpartition(".")[0]
    if not above or "[" in above or OmegaConf.select(config, above, default=MISSING) is not None:
        return config
    opened: Any = {}
    for part in reversed(above.split(".")):
        opened = {part: opened}
    return OmegaConf.merge(config, opened)


def dump(config: Any, path: Path) -> None:
    """Write a configuration object as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load(root: type[Root], path: Path) -> Root:
    """Read a ``config.yaml`` that ``dump`` wrote back into an object of ``root``.

    Raises:
        ConfigError: the file is missing or does not fit the schema.
        DamagedError: it is no configuration.
    """
    if not path.is_file():
        raise ConfigError(
            [f"--config {path}: no such file; run the stage once without --config to write it"]
        )
    return from_plain(root, plain_file(path), str(path))


def from_plain(root: type[Root], plain: Any, where: str) -> Root:
    """An object of ``root`` from plain values, as ``to_plain`` makes them.

    Raises:
        ConfigError: they do not fit the schema; messages begin with ``where``.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(root), plain)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{where}: {_explain(error)}"]) from None
    if faults := _value_faults(merged):
        raise ConfigError(faults)
    return _to_object(merged)


def plain_file(path: Path) -> Any:
    """Plain values of a ``config.yaml`` that ``dump`` wrote, of whatever version.

    Raises:
        DamagedError: it is none.
    """
    read_settings(path, _WAY_OUT)
    return OmegaConf.to_container(OmegaConf.load(path))  # knows more numbers than plain YAML does


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration object as plain JSON values, for manifests."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _to_object(config: Any) -> Any:
    """Structured config without missing values -> dataclass instance, with a run folder."""
    try:
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([_explain(error)]) from None
    run = getattr(made, "run", None)
    if isinstance(run, RunConfig):
        if faults := run.faults():
            raise ConfigError(faults)
        run.from_run = run.from_run or run.remembered()
    return made


def _value_faults(config: Any, open_groups: Mapping[str, str | None] | None = None) -> list[str]:
    """Values that must be given, and a run's name that is no folder below its root.

    Args:
        config: Structured configuration.
        open_groups: Groups without a default -> what the user chose: "" for nothing, None for a
            member that does not exist. What is missing there is one fault a group.
    """
    plain: Any = OmegaConf.to_container(config)
    missing = list(_missing_keys(plain))
    faults = []
    for group, member in (open_groups or {}).items():
        keys = [key for key in missing if key.startswith(f"{group}.") and not member]
        missing = [key for key in missing if key not in keys]
        if keys and member is not None:
            fault = (
                f"{group} is not chosen; give {group}=NAME, one of {', '.join(list_members(group))}"
            )
            faults.append(f"{fault} (or set {', '.join(keys)})")
    faults += [f"{key} is not set; give it as {key}=VALUE" for key in missing]
    faults += _secret_faults(plain)
    return faults + (RunConfig(**plain["run"]).faults() if "run" in plain else [])


def _secret_faults(plain: Any) -> Iterator[str]:
    """Addresses that hold a password: configurations are kept, shown and sent to W&B."""
    for key, text in _texts(plain):
        if _PASSWORD.search(text):
            yield (
                f"{key}={_PASSWORD.sub('...@', text)} holds a user or password, which config.yaml, "
                "manifests, logs and W&B would show; take it out, and give it where its reader "
                "looks: ~/.netrc, `hf auth login`, ~/.aws/credentials, or an environment variable"
            )


def _texts(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of plain containers and their texts."""
    if isinstance(node, str):
        yield prefix, node
    pairs = node.items() if isinstance(node, dict) else ()
    pairs = enumerate(node) if isinstance(node, list) else pairs
    for name, child in pairs:
        yield from _texts(child, f"{prefix}.{name}".removeprefix("."))


def _missing_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of plain containers that hold OmegaConf's word for a missing value."""
    if node == UNSET:
        yield prefix
    pairs = node.items() if isinstance(node, dict) else ()
    pairs = enumerate(node) if isinstance(node, list) else pairs
    for name, child in pairs:
        yield from _missing_keys(child, f"{prefix}.{name}".removeprefix("."))


def _explain(error: Exception) -> str:
    """One line for a user from a Hydra or OmegaConf error: key, what was given, what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, member = error.missing_cfg_file.rpartition("/")
        return no_member(group, member)  # a default made of another choice: mixture=${corpus}
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '([^']+)')", "\n".join(lines))
    named = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    if unknown:
        full_key = next(iter(named), getattr(cause, "full_key", None) or unknown.group(1))
        schema = getattr(cause, "object_type", None)
        if schema is dict:
            return f"unknown key {full_key}; to add it, put + in front: +{full_key}=VALUE"
        if isinstance(schema, type) and dataclasses.is_dataclass(schema):
            return unknown_key(full_key, [f.name for f in dataclasses.fields(schema)])
        return unknown_key(full_key, [])
    dropped = ("object_type", "reference_type", "full_key", "In '", "You may be able")
    kept = dict.fromkeys(line for line in lines if not line.startswith(dropped))
    return ": ".join([*dict.fromkeys(named), " ".join(kept)])
