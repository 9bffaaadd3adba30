"""A proposal as an experiment file: YAML with the reason of every value above it."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.init.proposal import Proposal, Value, nested

_WIDTH = 100
_COMMANDS = ("data_prep.pack", "launch.search", "launch.train", "launch.evaluate", "launch.export")


def experiment_text(proposal: Proposal, experiment: str, made_by: str) -> str:
    """The file.

    Args:
        proposal: What it says.
        experiment: What ``experiment=`` takes for it, quoted for a shell.
        made_by: The command that made it.
    """
    lines = [*_comment(f"Made by {made_by}; change what you like. Then:")]
    lines += [f"#   python -m {command} experiment={experiment}" for command in _COMMANDS]
    lines += [line for warning in proposal.warnings for line in _comment(f"Note: {warning}.")]
    lines.append("defaults:")
    for group, value in proposal.choices.items():
        lines += _comment(value.reason, 2)
        lines.append(f"  - override /{group}: {value.value}")
    lines.append("  - _self_")
    return "\n".join([*lines, *_tree(nested(proposal.keys))]) + "\n"


def _tree(tree: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    """Lines of nested values."""
    for key, value in tree.items():
        if isinstance(value, Value):
            yield from _comment(value.reason, indent)
            yield f"{' ' * indent}{key}: {_yaml(value.value)}"
        else:
            yield f"{' ' * indent}{key}:"
            yield from _tree(value, indent + 2)


def _yaml(value: Any) -> str:
    """A plain value in YAML's flow style, which is JSON's; paths keep what OmegaConf would fill."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("${", "\\\\${")


def _comment(text: str, indent: int = 0) -> list[str]:
    """Comment lines."""
    mark = f"{' ' * indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark) if text else []


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        FileExistsError: it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
