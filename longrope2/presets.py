"""The presets of ``conf/``: a root YAML for each command, and folders of members for its groups.

``conf/`` and ``models/`` stand at the top of a checkout, and inside the package in a wheel.
"""

import itertools
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from longrope2.errors import ConfigError

_PACKAGED = Path(__file__).parent / "_data"
# conf/ and models/: in a wheel inside the package (setup.py), in a checkout at its top.
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent
CONF_FOLDER = SHIPPED / "conf"


def read_groups(config_name: str) -> dict[str, str | None]:
    """Groups of a root YAML, each with its member by default; None where there is none."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / f"{config_name}.yaml"))
    pairs = [next(iter(entry.items())) for entry in plain["defaults"] if isinstance(entry, dict)]
    return {group.removeprefix("optional "): member for group, member in pairs}


def experiment_fault(config_name: str, experiment: str | None) -> str | None:
    """Why an experiment cannot be chosen here: it overrides groups that the command does not have.

    Hydra names one of the groups and none of the commands that have them.
    """
    if not experiment:
        return None
    wanted: dict[str, None] = {}
    files = [experiment]
    for name in files:
        plain: Any = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / f"experiment/{name}.yaml"))
        for entry in plain.get("defaults", ()):
            if isinstance(entry, dict):
                wanted |= dict.fromkeys(key.removeprefix("override /") for key in entry)
            elif entry != "_self_":
                files.append(entry)  # the experiment it is a variation of
    foreign = [group for group in wanted if group not in read_groups(config_name)]
    if not foreign:
        return None
    commands = {}
    for root in sorted(CONF_FOLDER.glob("*.yaml")):
        groups = read_groups(root.stem)
        if "experiment" in groups and wanted.keys() <= groups.keys():
            commands[read_header(root).split()[3]] = None
    sets = f"experiment={experiment} chooses {', '.join(foreign)}, which this command does not have"
    return f"{sets}; it is for {', '.join(commands)}. Give model= and target_len= here instead"


def list_members(group: str) -> dict[str, str]:
    """Presets of a group, each with the comment at its top."""
    return {path.stem: read_header(path) for path in sorted((CONF_FOLDER / group).glob("*.yaml"))}


def read_header(path: Path) -> str:
    """Comment lines at the top of a YAML file, without directives."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
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
    chosen[group] = member
    if member not in list_members(group):
        chosen[group] = None
        raise ConfigError([no_member(group, member)])


def no_member(group: str, member: str) -> str:
    """The fault of a preset that does not exist."""
    why = "names several; run once for each" if "," in member else "does not exist"
    return f"{group}={member} {why}; choose {group}= one of {', '.join(list_members(group))}"


def merge_presets(root: type, config_name: str, chosen: dict[str, str | None]) -> DictConfig:
    """The schema under the root YAML and the chosen group members."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=root)
    GlobalHydra.instance().clear()
    choices = [f"{group}={member}" for group, member in chosen.items() if member]
    with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base="1.3"):
        return hydra_compose(config_name=config_name, overrides=choices)
