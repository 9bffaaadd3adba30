"""A command line, read one argument at a time against a schema of keys."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from longrope2.errors import ConfigError, closest, guess
from longrope2.help import (
    UnknownKeyError,
    accepts,
    as_whole_numbers,
    find_key,
    key_parts,
    list_keys,
)

# More keys than these are no guess.
_MOST_MEANT = 3
# Keys that have another name now.
MOVED = {
    "cluster": "hardware",
    "corpus.plan": "mixture",
    "corpus.quotas": "quotas",
    "corpus.short_overlong": "short_overlong",
    "run.from": "run.from_run",
}


@dataclass(frozen=True)
class Setting:
    """One key of a command line and its value."""

    key: str
    value: Any
    adds: bool
    """Whether it is an entry of a dictionary that may not be there yet."""


def split_argument(argument: str) -> tuple[str, str, bool]:
    """``+key=text`` -> key, text, whether it adds an entry.

    Raises:
        ConfigError: it is no setting.
    """
    key, equals, text = argument.partition("=")
    if key in ("--multirun", "-m"):
        raise ConfigError([f"{argument}: sweeps are not supported; run once for each value"])
    if argument.startswith("-"):
        raise ConfigError([f"unknown flag {argument}; settings are key=value, --help lists them"])
    if argument.startswith("~"):
        fault = f"{argument}: keys cannot be removed; give {key[1:]}=VALUE, null for none"
        raise ConfigError([fault])
    adds, key = key.startswith("+"), key.lstrip("+")
    if not equals or not key:
        fault = f"{argument!r} is no setting; settings are key=value, --help lists them"
        raise ConfigError([fault])
    if key.startswith(("hydra.", "hydra/")):
        fault = f"{argument}: Hydra's own settings do nothing here; run.root and run.name say where"
        raise ConfigError([f"{fault} products stand"])
    return key, text, adds


def read_setting(
    root: type, key: str, text: str, adds: bool, groups: Collection[str] = ()
) -> Setting:
    """The value in ``key=text``.

    Text is taken as it stands (paths hold = and commas; a leading ~ is the home folder) unless it
    is quoted; everything else is read by Hydra's grammar, and 1e9 is the integer where one is due.
    ``groups`` are those of presets: a misspelt key may be meant for one.

    Raises:
        ConfigError: there is no such key, or the value cannot be read.
    """
    try:
        hint, in_dictionary = find_key(root, key)
    except UnknownKeyError as error:
        moved = [
            new + key[len(old) :] for old, new in MOVED.items() if f"{key}.".startswith(f"{old}.")
        ]
        beside = dict.fromkeys([*error.neighbours, *(groups if error.position == 0 else ())])
        fault = (
            f"unknown key {key}; it is {moved[0]} now"
            if moved
            else unknown_key(key, list(beside), error.position, elsewhere=_ending_in(root, key))
        )
        raise ConfigError([fault]) from None
    if adds and not in_dictionary:
        raise ConfigError([f"+{key}={text}: leave the + out; the key exists"])
    if accepts(hint, str) and text[:1] not in ("'", '"') and "\\" not in text:
        is_null = text == "null" and accepts(hint, type(None))
        return Setting(key, None if is_null else os.path.expanduser(text), adds)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        fault = f"{key}={text} cannot be read; put text in quotes inside the shell's own: '{key}="
        raise ConfigError([f'{fault}"TEXT"\'']) from None
    if parsed.is_sweep_override():
        fault = f"{key}={text}: takes one value, sweeps are not supported; run once for each value"
        raise ConfigError([f"{fault} (a list stands in brackets: [1,2])"])
    # A dictionary of whatever another program reads (model.config): its keys are no keys of ours.
    is_open = isinstance(parsed.value(), dict) and hint == dict[str, Any]
    return Setting(key, as_whole_numbers(parsed.value(), hint), adds or is_open)


def unknown_key(
    key: str, neighbours: Sequence[str], position: int = -1, *, elsewhere: Sequence[str] = ()
) -> str:
    """The fault of a key that no schema has.

    Args:
        key: Dotted.
        neighbours: Names that could stand at the part of it that is unknown.
        position: Which part that is.
        elsewhere: Whole keys that it may be short for.
    """
    parts = key_parts(key)
    close = closest(parts[position], neighbours)
    if close is not None:
        parts[position] = close
    meant = ".".join(parts) if close is not None else " or ".join(elsewhere) or None
    beside = f"; keys beside it: {', '.join(neighbours)}" if neighbours else ""
    return f"unknown key {key}{guess(meant)}{beside}"


def _ending_in(root: type, name: str) -> list[str]:
    """Keys that end in a name given without what stands above it; none where there are many."""
    keys = [key.name for key in list_keys(root, None) if key.name.endswith(f".{name}")]
    return keys if len(keys) <= _MOST_MEANT else []
