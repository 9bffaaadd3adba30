"""Files of text read with one message for whatever is wrong with them, and never a traceback."""

import json
from pathlib import Path
from typing import Any

import yaml

from longrope2.errors import DamagedError


def read_object(path: Path, what: str, way_out: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        what: What it is, as the message names it, with its article.
        way_out: What to do about a damaged one.

    Raises:
        DamagedError: it cannot be read, is no UTF-8, no JSON, nested too deeply, or no object.
    """
    value = parse(read_text(path, what, way_out), f"{path} is not {what}", way_out)
    if isinstance(value, dict):
        return value
    raise DamagedError(f"{path} is not {what}: it holds no JSON object; {way_out}")


def read_settings(path: Path, way_out: str) -> dict[str, Any]:
    """The settings in a YAML file, such as the ``config.yaml`` of a product.

    Raises:
        DamagedError: it cannot be read, is no UTF-8, no YAML, nested too deeply, or no settings.
    """
    what = "the configuration of a stage"
    try:
        value = yaml.safe_load(read_text(path, what, way_out))
    except RecursionError:
        raise DamagedError(f"{path} is not {what}: nested too deeply; {way_out}") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split())
        raise DamagedError(f"{path} is not {what}: {said}; {way_out}") from None
    if isinstance(value, dict):
        return value
    raise DamagedError(f"{path} is not {what}: it holds no settings; {way_out}")


def read_text(path: Path, what: str, way_out: str) -> str:
    """The UTF-8 text of a file.

    Raises:
        DamagedError: it cannot be read, or is none.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}; {way_out}") from None
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not {what}: no UTF-8 ({error}); {way_out}") from None


def parse(text: str, fault: str, way_out: str) -> Any:
    """The value of a JSON text; a message begins with ``fault``.

    Raises:
        DamagedError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DamagedError(f"{fault}: it is nested too deeply; {way_out}") from None
    except ValueError as error:
        raise DamagedError(f"{fault}: {error}; {way_out}") from None
