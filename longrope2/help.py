"""What a configuration schema says of itself: its keys, their types and docstrings, and ``--help``.

A schema is a tree of dataclasses. The docstring under a field is not kept at run time, so it is
read from the source. A key in a list of dataclasses is written ``subjects[].name``, one in a
dictionary ``quotas.NAME.short``.
"""

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from longrope2.errors import ConfigError, closest, guess

HELP_FLAGS = ("--help", "-h")
UNSET = "???"  # OmegaConf's word for a value that must be given
LEAST_WIDTH = 100
NAME_WIDTH, LEAST_VALUE_WIDTH = 40, 8


class UnknownKeyError(Exception):
    """A key that a schema does not have.

    ``position`` counts the part of it that nobody knows, ``neighbours`` are the names there.
    """

    def __init__(self, neighbours: Sequence[str], position: int) -> None:
        super().__init__()
        self.neighbours, self.position = tuple(neighbours), position


@dataclass(frozen=True)
class Key:
    """One key of a command."""

    name: str
    hint: Any
    default: Any
    doc: str

    @property
    def allowed(self) -> str:
        """Its type in words, or all its values where they can be listed."""
        return describe_type(self.hint)

    @property
    def value(self) -> str:
        """Its default as one would type it."""
        return "(must be given)" if self.default == UNSET else _as_typed(self.default)


@functools.cache
def _field_docs(schema: type) -> dict[str, str]:
    """Own fields, or members of an enum -> docstrings, by the source of the class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        value = after.value if isinstance(after, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            name = ast.unparse(field).split(":")[0].split(" =")[0]
            docs[name] = " ".join(value.value.split()).replace("``", "")
    return docs


def schema_fields(schema: type) -> Iterator[Key]:
    """The fields of one dataclass, those it inherits first."""
    hints = get_type_hints(schema)
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        docs |= _field_docs(base) if dataclasses.is_dataclass(base) else {}
    for field in dataclasses.fields(schema):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        yield Key(field.name, hints[field.name], default, docs.get(field.name, ""))


def find_key(schema: Any, name: str) -> tuple[Any, bool]:
    """Type of a dotted key, and whether it lies in a dictionary, to which entries may be added.

    Raises:
        UnknownKeyError: the schema has no such key.
    """
    hint, in_dictionary = schema, False
    for position, part in enumerate(key_parts(name)):
        hint = _without_none(hint)
        if get_origin(hint) in (dict, list):
            in_dictionary |= get_origin(hint) is dict
            hint = get_args(hint)[-1]
        elif dataclasses.is_dataclass(hint):
            fields = get_type_hints(hint)
            if part not in fields:
                raise UnknownKeyError(list(fields), position)
            hint = fields[part]
        else:
            raise UnknownKeyError([], position)
    return hint, in_dictionary


def key_parts(name: str) -> list[str]:
    """``a.b[0].c`` -> a, b, 0, c."""
    return re.sub(r"\[(\w+)\]", r".\1", name).split(".")


def list_keys(schema: Any, values: Any, prefix: str = "") -> Iterator[Key]:
    """Every key with a plain value, in order; ``values``, nested containers, are the defaults."""
    for field in schema_fields(schema):
        default = field.default
        if isinstance(values, Mapping) and field.name in values:
            default = values[field.name]
        key = dataclasses.replace(field, name=prefix + field.name, default=default)
        hint = _without_none(field.hint)
        if dataclasses.is_dataclass(hint):
            yield from list_keys(hint, default, f"{key.name}.")
            continue
        inner, mark = get_args(hint)[-1:], ".NAME." if get_origin(hint) is dict else "[]."
        yield key
        if inner and dataclasses.is_dataclass(inner[0]):
            yield from list_keys(inner[0], None, key.name + mark)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; anything else alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _without_none(hint: Any) -> Any:
    """``X | None`` -> X."""
    return next(option for option in _options(hint) if option is not type(None))


def accepts(hint: Any, kind: type) -> bool:
    """Whether a key of this type takes a value of ``kind``."""
    return kind in _options(hint)


def as_whole_numbers(value: Any, hint: Any) -> Any:
    """``value`` with 1000000000 for 1e9 wherever a key of this type takes integers alone."""
    hint = _without_none(hint)
    if isinstance(value, float) and hint is int and value.is_integer():
        return int(value)
    if isinstance(value, list) and get_origin(hint) is list:
        return [as_whole_numbers(item, get_args(hint)[0]) for item in value]
    if not isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
    else:
        inner = get_args(hint)[-1] if get_origin(hint) is dict else Any
        hints = dict.fromkeys(value, inner)
    return {key: as_whole_numbers(item, hints.get(key, Any)) for key, item in value.items()}


def describe_type(hint: Any) -> str:
    """A type in a user's words; an enum by its values."""
    if accepts(hint, type(None)):
        return f"{describe_type(_without_none(hint))} or null"
    inner = get_args(hint)
    if get_origin(hint) is list:
        return f"list of {describe_type(inner[0])}"
    if get_origin(hint) is dict:
        return f"NAME: {describe_type(inner[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(str(member.value) for member in hint)
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return {bool: "true|false", int: "integer", float: "number", str: "text"}.get(hint, str(hint))


def _as_typed(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_as_typed(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_typed, value)) + "]"
    return str(value) if value != "" else '""'


def help_topic(arguments: Sequence[str]) -> str | None:
    """What ``--help`` asks for: a key or group, "" for all of them, None without the flag."""
    place = next((i for i, argument in enumerate(arguments) if argument in HELP_FLAGS), None)
    if place is None:
        return None
    return next((a for a in arguments[place + 1 :] if not a.startswith("-") and "=" not in a), "")


def command_help(
    header: str,
    groups: Mapping[str, str | None],
    members: Mapping[str, Mapping[str, str]],
    keys: Sequence[Key],
) -> str:
    """All of a command: what it does, an example, its presets, and a line for every key.

    Args:
        header: Comments at the top of the command's root YAML, which hold its examples.
        groups: Group -> member chosen by default, None where there is none.
        members: Group -> member -> what it is.
        keys: Every key with its default.
    """
    examples = re.findall(r"^# (python -m .*)$", header, re.MULTILINE)
    lines = [_about(examples[0].split()[2]), "", *(f"Example: {example}" for example in examples)]
    lines += ["", "Presets, chosen by GROUP=NAME (--help GROUP describes them):"]
    for group, chosen in groups.items():
        lines += _wrap(f"{group}={chosen or ''}", f"one of {', '.join(members[group])}")
    lines += [
        "",
        "Keys with their defaults (--help KEY, or the part before a dot, tells all of it):",
    ]
    for key in keys:
        sentence = re.split(r"(?<!e\.g)(?<=\.) ", key.doc)[0]
        text = f"{key.allowed}: {sentence}"
        value = _shorten(key.value, max(LEAST_VALUE_WIDTH, NAME_WIDTH - len(key.name) - 1))
        named = f"{key.name}={value}"
        lines.append(_shorten(f"  {named:<{NAME_WIDTH}} {text}", _width()))
    return "\n".join(lines)


def topic_help(topic: str, members: Mapping[str, str], keys: Sequence[Key]) -> str:
    """One group or key in full.

    Raises:
        ConfigError: there is none of that name.
    """
    inside = [key for key in keys if f"{key.name}.".replace("[]", "").startswith(f"{topic}.")]
    if not inside and not members:
        tops = dict.fromkeys(re.split(r"[.\[]", key.name)[0] for key in keys)
        names = closest(topic, [*tops, *(key.name for key in keys)])
        fault = f"--help {topic}: no such key or group{guess(names)}"
        raise ConfigError([f"{fault}; there are {', '.join(tops)}"])
    lines = [f"Presets, chosen by {topic}=NAME:"] if members else []
    for member, text in members.items():
        lines += _wrap(member, text)
    for key in inside:
        lines += ["", f"{key.name}={key.value}   ({key.allowed})", *_indented(key.doc)]
        kind = _without_none(key.hint)
        for name, text in (
            _field_docs(kind) if isinstance(kind, type) and issubclass(kind, Enum) else {}
        ).items():
            lines += _wrap(f"  {name}", text)
    return "\n".join(lines)


def _about(module: str) -> str:
    """Docstring of a command's module, which is not imported for it."""
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.replace("``", "")


def _width() -> int:
    """Columns of a line."""
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns)


def _shorten(text: str, width: int) -> str:
    """Cut with dots where it is too long."""
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."


def _wrap(name: str, text: str) -> list[str]:
    """A name and what is said of it, in two columns."""
    first = f"  {name:<22} "
    lines = textwrap.wrap(text, _width(), initial_indent=first, subsequent_indent=" " * 25)
    return lines or [first.rstrip()]


def _indented(text: str) -> list[str]:
    """A paragraph below a key."""
    return textwrap.wrap(text, _width(), initial_indent="    ", subsequent_indent="    ")
