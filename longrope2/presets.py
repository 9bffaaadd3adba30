"""The presets of ``conf/``: a root YAML for each command, and folders of members for its groups.

``conf/`` and ``models/`` stand at the top of a checkout, and inside the package in a wheel. A
member may also be a YAML file of the user's own, anywhere (``model=/data/mine.yaml``), and an
experiment one of ``conf/experiment/`` in the current folder.

An experiment is read here, not by Hydra: it chooses members of groups and sets keys for several
commands, and each takes what it has. What no command has is a fault.
"""

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longrope2.errors import ConfigError, closest, guess

_PACKAGED = Path(__file__).parent / "_data"
# conf/ and models/: in a wheel inside the package (setup.py), in a checkout at its top.
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent
CONF_FOLDER = SHIPPED / "conf"
EXPERIMENT = "experiment"
# Where experiments of the user's own stand, below the current folder; ``launch.init`` writes there.
OWN_EXPERIMENTS = Path("conf") / EXPERIMENT
FILE_SUFFIXES = (".yaml", ".yml")
# What an experiment can set beside the groups: the keys at the top of any command's schema.
SECTIONS = frozenset(
    """align attention calibration checkpoint cluster corpus doctor documents dry_run evaluation
    export generate hardware keep_work mixture model parallel plan quotas retrieval rope run
    search seed segments short_overlong suite target_len tokens_per_shard tokens_per_unit
    tracking training verify verify_file workers zero""".split()
)
# An export has the RoPE of its training; its own ``rope`` is for one without, and given by hand.
_NOT_FROM_AN_EXPERIMENT = {"export": ("rope",)}
# What to write instead of a folder where a group takes the name of a preset.
_PATH_KEYS = {
    "model": "model=custom model.path={path} model.original_len=TOKENS (the window that it was "
    "trained with)",
    "corpus": "corpus=folder corpus.folder={path}",
}
_OVERRIDE = "override /"
# Hydra's words for what is in a ``defaults`` list and names no member.
_SELF = "_self_"
_GLOBAL = "# @package _global_"


@dataclass
class Experiment:
    """What an experiment says, with the experiments it is a variation of."""

    choices: dict[str, str] = field(default_factory=dict)
    """Group -> member."""
    bodies: list[DictConfig] = field(default_factory=list)
    """Keys, in the order in which they are merged."""


def read_groups(config_name: str) -> dict[str, str | None]:
    """Groups of a root YAML, each with its member by default; None where there is none."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / f"{config_name}.yaml"))
    pairs = [next(iter(entry.items())) for entry in plain["defaults"] if isinstance(entry, dict)]
    return {group.removeprefix("optional "): member for group, member in pairs}


def list_members(group: str) -> dict[str, str]:
    """Presets of a group, each with the comment at its top; experiments of the current folder."""
    folders = [CONF_FOLDER / group, *([OWN_EXPERIMENTS] if group == EXPERIMENT else [])]
    found = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    return {name: read_header(path) for name, path in sorted(found.items())}


def read_header(path: Path) -> str:
    """Comment lines at the top of a YAML file, without directives."""
    text = path.read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line for line in lines if not line.startswith("# @"))


def choose_member(chosen: dict[str, str | None], group: str, member: str, adds: bool) -> None:
    """Note the member of a group that the user chose; None for one that does not exist.

    Raises:
        ConfigError: there is no such member, or another was chosen before.
    """
    if adds:
        raise ConfigError([f"+{group}={member}: leave the + out"])
    if group in chosen:
        raise ConfigError([f"{group} is given twice: {chosen[group]} and {member}"])
    chosen[group] = None
    find_member(group, member)
    chosen[group] = member


def find_member(group: str, member: str) -> Path:
    """The file of a member: one of the user's own, or a preset.

    Raises:
        ConfigError: there is none.
    """
    if member.endswith(FILE_SUFFIXES):
        path = Path(os.path.expanduser(member))
        if path.is_file():
            return path
        raise ConfigError([f"{group}={member}: no such file; give {_allowed(group)}"])
    own = OWN_EXPERIMENTS / f"{member}.yaml"
    if group == EXPERIMENT and own.is_file():
        return own
    if member not in list_members(group):
        raise ConfigError([no_member(group, member)])
    return CONF_FOLDER / group / f"{member}.yaml"


def no_member(group: str, member: str) -> str:
    """The fault of a preset that does not exist."""
    if group in _PATH_KEYS and ("/" in member or Path(member).is_dir()):
        path = Path(os.path.expanduser(member))
        typed = shlex.quote(str(path))
        there = "is a path" if path.exists() else "is a path, where there is nothing"
        return f"{group}={member} {there}; give {_PATH_KEYS[group].format(path=typed)}"
    why = "names several; run once for each"
    if "," not in member:
        why = f"does not exist{guess(closest(member, list_members(group)))}"
    return f"{group}={member} {why}; choose {group}= {_allowed(group)}"


def _allowed(group: str) -> str:
    return f"one of {', '.join(list_members(group))}, or a file ending in {FILE_SUFFIXES[0]}"


def read_experiment(member: str, above: Sequence[Path] = ()) -> Experiment:
    """An experiment whole; its own choices and keys go before those of what it varies.

    Args:
        member: Its name, or a file.
        above: Files of its variations, on the way here.

    Raises:
        ConfigError: it or one that it names does not exist or cannot be read, or it chooses or
            sets what no command has; all faults of a file together.
    """
    path = find_member(EXPERIMENT, member)
    body, varied, choices = _read_own_file(path, f"{EXPERIMENT}={member}", above)
    faults = [
        f"{path} sets {key}, which no command has{guess(closest(str(key), SECTIONS))}; there are "
        f"{', '.join(sorted(SECTIONS))}"
        for key in body
        if key not in SECTIONS
    ]
    known = _all_groups()
    for group, chosen in choices.items():
        if group not in known:
            fault = f"{path} chooses {group}{guess(closest(group, known))}"
            faults.append(f"{fault}; there are {', '.join(sorted(known))}")
            continue
        try:
            find_member(group, chosen)
        except ConfigError as error:
            faults += [f"{path}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    whole = Experiment()
    for name in varied:
        base = read_experiment(name, (*above, path))
        whole.choices |= base.choices
        whole.bodies += base.bodies
    return Experiment(whole.choices | choices, [*whole.bodies, body])


def _read_own_file(
    path: Path, named: str, above: Sequence[Path]
) -> tuple[DictConfig, list[str], dict[str, str]]:
    """A file's keys, the members of its own group that it builds on, and what else it chooses."""
    if path in above:
        ring = " -> ".join(map(str, [*above[above.index(path) :], path]))
        raise ConfigError([f"{named} builds on itself: {ring}"])
    body = _read_yaml(path, named)
    plain: Any = OmegaConf.to_container(body)
    entries = plain.get("defaults") or []
    if not isinstance(entries, list) or not all(isinstance(e, str | dict) for e in entries):
        raise ConfigError(
            [f"{named}: defaults must be a list of NAME and '{_OVERRIDE}GROUP: NAME'"]
        )
    choices = {
        str(key).removeprefix(_OVERRIDE): str(member)
        for entry in entries
        if isinstance(entry, dict)
        for key, member in entry.items()
    }
    body.pop("defaults", None)
    return body, [e for e in entries if isinstance(e, str) and e != _SELF], choices


def _all_groups() -> set[str]:
    """The groups of any command, without experiments themselves."""
    roots = (path.stem for path in CONF_FOLDER.glob("*.yaml"))
    return {group for root in roots for group in read_groups(root)} - {EXPERIMENT}


def _read_yaml(path: Path, named: str) -> DictConfig:
    """A YAML file of keys; ``named`` begins the message.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        body = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        fault = f"{named} cannot be read as YAML: {' '.join(str(error).split())}"
        raise ConfigError([fault]) from None
    if not isinstance(body, DictConfig):
        raise ConfigError([f"{named} holds no keys; write KEY: VALUE lines"])
    return body


def merge_presets(root: type, config_name: str, chosen: dict[str, str | None]) -> DictConfig:
    """The schema under the root YAML, the chosen members, and then the experiment.

    Raises:
        ConfigError: the experiment or a file cannot be used, or two of them name the model.
        HydraException, OmegaConfBaseException: a value does not fit the schema.
    """
    groups, given = read_groups(config_name), {g: m for g, m in chosen.items() if m}
    name = given.pop(EXPERIMENT, None)
    experiment = Experiment() if name is None else read_experiment(name)
    if faults := _two_owners(f"{EXPERIMENT}={name}", experiment, given):
        raise ConfigError(faults)
    not_taken = _NOT_FROM_AN_EXPERIMENT.get(config_name, ())
    choices = {g: m for g, m in experiment.choices.items() if g in groups and g not in not_taken}
    choices |= given
    files = {g: _read_members(g, m) for g, m in choices.items() if m.endswith(FILE_SUFFIXES)}
    if "mixture" in groups and "mixture" not in choices and "corpus" in files:
        choices["mixture"] = _mixture_of(files["corpus"])
    named = {group: member for group, member in choices.items() if group not in files}
    config = _compose(root, config_name, named, without=[g for g in files if groups[g]])
    own = {key.name for key in fields(root)} - set(not_taken)
    bodies = [body for of_file in files.values() for body in of_file]
    bodies += [OmegaConf.masked_copy(body, list(own)) for body in experiment.bodies]
    for body in bodies:
        config = cast(DictConfig, OmegaConf.merge(config, body))
    return config


def _compose(
    root: type, config_name: str, choices: dict[str, str], without: Sequence[str]
) -> DictConfig:
    """The schema under the root YAML and presets; not those that are the default of a group."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=root)
    GlobalHydra.instance().clear()
    words = [f"~{group}" for group in without]
    words += [f"{group}={member}" for group, member in choices.items()]
    with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base="1.3"):
        return hydra_compose(config_name=config_name, overrides=words)


def _read_members(group: str, member: str, above: Sequence[Path] = ()) -> list[DictConfig]:
    """The keys of a file of the user's own, after those of the members it builds on."""
    path, named = find_member(group, member), f"{group}={member}"
    body, varied, choices = _read_own_file(path, named, above)
    if choices:
        chosen = ", ".join(f"{key}: {value}" for key, value in choices.items())
        raise ConfigError([f"{named} chooses {chosen}; only an experiment chooses groups"])
    is_global = _GLOBAL in path.read_text(encoding="utf-8").splitlines()[:1]
    packaged = body if is_global else OmegaConf.create({group: body})
    below = [found for name in varied for found in _read_members(group, name, (*above, path))]
    return [*below, packaged]


def _mixture_of(corpus: Sequence[DictConfig]) -> str:
    """The mixture of a corpus of the user's own: the one that is named like its kind."""
    kinds = [OmegaConf.select(body, "corpus.kind") for body in corpus]
    kind = next((str(kind) for kind in reversed(kinds) if kind is not None), "")
    if kind in list_members("mixture"):
        return kind
    fault = f"corpus.kind={kind} has no mixture of its own; give mixture= {_allowed('mixture')}"
    raise ConfigError([fault])


def _two_owners(named: str, experiment: Experiment, given: dict[str, str]) -> list[str]:
    """Choices of the command line that the experiment's keys would hide."""
    faults = []
    for group, member in given.items():
        if any(OmegaConf.select(body, f"{group}.name") for body in experiment.bodies):
            fault = f"{group}={member}, but {named} names a {group} itself; leave one of them out"
            faults.append(f"{fault}, or set {group}.* by key")
    return faults
