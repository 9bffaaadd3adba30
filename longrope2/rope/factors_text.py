"""Rescale factors as text: this project's JSON, published arrays in JSON, and the CSV files of the released searches.

CSV, as found in the authors' repository (microsoft/LongRoPE): one factor per line (LongRoPE2, search results), or one row per
layer with all rows equal, separated by commas or spaces (first generation). Such a file holds factors and nothing else:
which model, base and lengths they belong to must be known from elsewhere.
"""

import json
from typing import Any

from longrope2.errors import FactorsError

__all__ = ["JSON_HEADER", "format_factors_csv", "parse_factors_csv", "parse_factors_json"]

JSON_HEADER: dict[str, Any] = {"kind": "rescale_factors", "version": 1}


def parse_factors_json(text: str) -> dict[str, Any]:
    """The fields of a factors file, without its kind and version; a published array is given the same fields.

    Raises:
        FactorsError: not JSON, another kind or version, or a published array without its setting.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise FactorsError(f"not a factors file: {error}") from None
    if isinstance(fields, dict) and "kind" not in fields and "factors" in fields:
        return _published_array(fields)
    if not isinstance(fields, dict) or fields.pop("kind", None) != JSON_HEADER["kind"]:
        raise FactorsError(f"not a factors file: its kind is not {JSON_HEADER['kind']!r}")
    if (version := fields.pop("version", None)) != JSON_HEADER["version"]:
        raise FactorsError(
            f"the factors file has version {version}, this program reads {JSON_HEADER['version']}; make it again"
        )
    return fields


def format_factors_csv(factors: tuple[float, ...]) -> str:
    """One factor per line, each written exactly; readable by the authors' programs."""
    return "".join(f"{factor!r}\n" for factor in factors)


def parse_factors_csv(text: str) -> tuple[float, ...]:
    """The factors of a CSV text: one per line, or rows that are all equal; blank lines and one header are skipped.

    Raises:
        FactorsError: a line that is not numbers, a row that differs from the first (factors per layer), or no factors;
            names the line, counted from 1.
    """
    rows: list[tuple[int, tuple[float, ...]]] = []
    has_header = False
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if not line.strip():
            continue
        values = _numbers(line)
        if values is not None:
            rows.append((number, values))
        elif not rows and not has_header and not _any_number(line):
            has_header = True
        else:
            raise FactorsError(f"line {number} of the factors CSV: {line.strip()[:60]!r} is not a list of numbers")
    if not rows:
        raise FactorsError("the factors CSV holds no numbers; give one factor per line, or one row of factors")
    first_number, first = rows[0]
    if len(first) == 1:
        return _column(rows)
    for number, values in rows:
        if values != first:
            raise FactorsError(
                f"line {number} of the factors CSV differs from line {first_number}: rows are layers, and factors that "
                "differ by layer are not supported; give one factor per line, or one row"
            )
    return first


def _column(rows: list[tuple[int, tuple[float, ...]]]) -> tuple[float, ...]:
    """One factor from each line."""
    for number, values in rows:
        if len(values) != 1:
            raise FactorsError(f"line {number} of the factors CSV has {len(values)} values, the lines before it one")
    return tuple(values[0] for _, values in rows)


def _fields(line: str) -> list[str]:
    """Cells of a line, separated by commas, or by white space where there is no comma."""
    return [cell.strip() for cell in line.split(",")] if "," in line else line.split()


def _numbers(line: str) -> tuple[float, ...] | None:
    """The line's values, or None if any cell is not a number."""
    try:
        return tuple(float(cell) for cell in _fields(line))
    except ValueError:
        return None


def _any_number(line: str) -> bool:
    """Whether a cell of a line that is not numbers alone is a number: then it is damaged, not a header."""
    return any(_numbers(cell) for cell in _fields(line) if cell)


def _published_array(fields: dict[str, Any]) -> dict[str, Any]:
    """A published array with its setting, as the fields of a factors file."""
    geometry = {name: fields.pop(name, None) for name in ("rotary_dim", "rope_base", "original_len")}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise FactorsError(f"the published array has no {', '.join(missing)}; its setting must stand beside it")
    fields.pop("partial_rotary_factor", None)  # said by rotary_dim
    attention_scale = fields.pop("attention_scale", 1.0)
    provenance = {name: str(fields.pop(name)) for name in ("model", "source") if name in fields}
    scales = {"short_attention_scale": attention_scale, "long_attention_scale": attention_scale}
    return {**fields, **scales, "geometry": geometry, "provenance": provenance}
