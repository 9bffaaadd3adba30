"""Whether a product was made with the settings that are wanted now, and whose its folder is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope2.config import dump, plain_file, to_plain
from longrope2.errors import ArtifactError, ConfigError


def claim_folder(folder: Path, config: Any, changeable: Sequence[str] = ()) -> None:
    """Write ``config.yaml`` into a product folder that no other configuration has made.

    A key that the file does not have came later: its default was in force. Where the runs stand
    (``run.root``) is no part of what was made: a run may be moved. The other run that it takes from
    (``run.from_run``) is remembered.

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
        made = with_later_keys(plain_file(path), type(config))
        changes = differences(
            made, to_plain(config), free=("run.root", "run.from_run", *changeable)
        )
        if changes:
            fault = f"{'; '.join(changes)}: {path} was made with other settings; {remake(folder)}"
            if not any(change.startswith(("model.", "target_len")) for change in changes):
                source = f"run.from_run={config.run.name}"
                fault += f"; {source} lets the new run take this one's segments and factors"
            raise ConfigError([fault])
    config.run.remember()
    dump(config, path)


def with_later_keys(found: Any, root: type) -> dict[str, Any]:
    """Dotted keys of an older configuration, with the defaults of those that came later."""
    return _flatten(to_plain(root)) | _flatten(found)


def differences(
    made: Mapping[str, Any], wanted: Mapping[str, Any], *, free: Sequence[str] = ()
) -> list[str]:
    """What a product was made with and what is wanted now: a sentence for each key that differs.

    Args:
        made: Nested or flat, plain values.
        wanted: The same, now.
        free: Dotted keys (or their parents) that may differ.
    """
    old, new = without(made, free), without(wanted, free)
    return [
        f"{key} was {old.get(key)}, now it is {new.get(key)}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def without(values: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """Nested values as dotted keys, but for those of ``free`` (dotted keys, or their parents)."""
    flat = _flatten(values)
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{f}.") for f in free)}


def remake(folder: Path) -> str:
    """The way out where a product was made differently."""
    return f"use another run.name, or remove {folder} to make it again"


def require_same(
    what: str, made: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path
) -> None:
    """Refuse what was made from something else; ``what`` begins the message.

    Raises:
        ArtifactError: names each key that differs, and ``folder`` as what to remove.
    """
    if changes := differences(made, wanted):
        raise ArtifactError(f"{what}: {'; '.join(changes)}; {remake(folder)}")


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested containers -> dotted keys."""
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {
        k: v for name, child in node.items() for k, v in _flatten(child, f"{prefix}{name}.").items()
    }
