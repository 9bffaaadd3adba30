"""Where long tasks come from: rows from a folder, a zip or the hub, prompts from upstream's files.

The prompts are not ours to ship. They are read from a checkout of the benchmark (or the single
file), as data: Python files are parsed, never run. Each is checked against the hash of the version
that the scores are comparable with.
"""

import ast
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope2.errors import DataError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HASH_DIGITS = 16


def read_rows(
    key: str,
    location: str,
    names: Sequence[str],
    *,
    hub_file: str = "",
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file.

    ``location``, which stands at ``key``, is a folder or zip with the file (the first of ``names``
    that is there), or the id of a data set on the hub, whose ``hub_file`` is a zip or the lines.

    Raises:
        DataError: nothing there, no access, or a line that is no JSON; says what to do.
    """
    path = Path(location)
    if path.is_dir():
        found = _first_file(path, names)
        if found is None:
            fault = f"{key}={location} holds none of {', '.join(names)}"
            raise DataError(f"{fault}; give the folder that has the file")
        return _rows(found.read_bytes(), str(found))
    if not path.is_file():
        if not hub_file or not _HUB_ID.fullmatch(location):
            way_out = f"give a folder or zip that holds {names[0]}"
            raise DataError(f"{key}={location} does not exist; {way_out}")
        path = _download(key, location, hub_file, revision)
    return _rows_of_file(key, path, names)


def prompt_file(key: str, location: str | None, names: Sequence[str], repository: str) -> Path:
    """A file of upstream's that holds prompts: ``location`` itself, or one of ``names`` below it.

    Raises:
        DataError: not given, or not there.
    """
    if location is None:
        what = f"the prompts are read from a checkout of {repository}"
        raise DataError(f"{key} is not set: {what}; give its path")
    path = Path(location)
    if path.is_file():
        return path
    found = _first_file(path, names)
    if found is None:
        fault = f"{key}={location} is no checkout of {repository}"
        raise DataError(f"{fault}: it holds none of {', '.join(names)}")
    return found


def read_json_strings(path: Path) -> dict[str, str]:
    """Prompts of a JSON object; a DataError where the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON file: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object of prompts")
    return value


def python_strings(path: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """String constants of a Python file, and dictionaries of them, without running it.

    Understood are literals, ``"...".strip()``, concatenation, names assigned before, and
    ``module.NAME`` for a name in ``known``, the constants of a module that the file imports. Other
    assignments are left out.

    Raises:
        DataError: the file is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no Python file: {error}") from None
    found: dict[str, Any] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                value = _constant(expression, found, known or {})
                if value is not None:
                    found[name] = value
    return found


def check_prompts(
    key: str, path: Path, prompts: Mapping[str, str], hashes: Mapping[str, str]
) -> None:
    """Refuse prompts that are not those of ``hashes``.

    Raises:
        DataError: a prompt is missing or another one; names all of them.
    """
    faults = []
    for name, wanted in hashes.items():
        if not isinstance(prompts.get(name), str):
            faults.append(f"{name} is missing")
        elif (found := hashlib.sha256(prompts[name].encode()).hexdigest()[:_HASH_DIGITS]) != wanted:
            faults.append(f"{name} has SHA-256 {found}..., expected {wanted}...")
    if faults:
        what = f"the prompts of {path} are not the published ones"
        raise DataError(f"{key}: {what}: {'; '.join(faults)}")


def _constant(node: ast.expr, found: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """Value of an expression that ``python_strings`` understands, else None."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Name(id=name):
            return found.get(name)
        case ast.Attribute(value=ast.Name(), attr=name):
            return known.get(name)
        case ast.Call(func=ast.Attribute(value=inner, attr="strip"), args=[], keywords=[]):
            text = _constant(inner, found, known)
            return text.strip() if isinstance(text, str) else None
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = [_constant(left, found, known), _constant(right, found, known)]
            return "".join(parts) if all(isinstance(part, str) for part in parts) else None
        case ast.Dict(keys=keys, values=values):
            names = [_constant(key, found, known) if key else None for key in keys]
            parts = [_constant(value, found, known) for value in values]
            pairs = zip(names, parts, strict=True)
            return {k: v for k, v in pairs if isinstance(k, str) and v is not None}
        case _:
            return None


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _rows_of_file(key: str, path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, or of the one inside a zip."""
    if not zipfile.is_zipfile(path):
        return _rows(path.read_bytes(), str(path))
    with zipfile.ZipFile(path) as archive:
        for name in names:
            for member in archive.namelist():
                if f"/{member}".endswith(f"/{name}"):
                    return _rows(archive.read(member), f"{path}, {member}")
    raise DataError(f"{key}: {path} holds none of {', '.join(names)}")


def _rows(data: bytes, place: str) -> list[dict[str, Any]]:
    """Parse JSON lines; empty ones are left out."""
    rows = []
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                fault = f"{place}, line {number} is no JSON ({error})"
                raise DataError(f"{fault}; fetch the file again") from None
    if not rows:
        raise DataError(f"{place} is empty; fetch the file again")
    return rows


def _download(key: str, repo: str, file: str, revision: str | None) -> Path:
    """A file of a hub data set, from the cache where it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except GatedRepoError:
        terms = f"accept its terms on huggingface.co/datasets/{repo}"
        fault = f"{key}={repo} is gated: {terms} and log in with `hf auth login`"
        raise DataError(fault) from None
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fault = f"{key}={repo}: {file} cannot be fetched from the hub ({reason})"
        raise DataError(f"{fault}; fetch it elsewhere and give its folder") from None
