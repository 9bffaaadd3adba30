"""``RescaleFactors``: the rescaled RoPE of both windows as one validated, immutable value.

theta'_i = theta_i / lambda_i [LongRoPE2, arXiv 2502.20082, sec. 2]. The long window uses
``factors``; the short window uses the original RoPE (factors 1, attention scale 1) unless
``short_factors`` says otherwise, as some published first generation LongRoPE models do.

Shape letters: I = cosine indices.

Rescale factors as text: this project's JSON, published arrays in JSON, and the CSV files of the
released searches.

CSV, as found in the authors' repository (microsoft/LongRoPE): one factor per line (LongRoPE2,
search results), or one row per layer with all rows equal, separated by commas or spaces (first
generation). Such a file holds factors and nothing else: which model, base and lengths they belong
to must be known from elsewhere.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import longrope_keys, read_factor_fields

JSON_HEADER: dict[str, Any] = {"kind": "rescale_factors", "version": 1}


def parse_factors_json(text: str) -> dict[str, Any]:
    """The fields of a factors file, without its kind and version; a published array is given the
    same fields.

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
    """The factors of a CSV text: one per line, or rows that are all equal; blank lines and one
    header are skipped.

    Raises:
        FactorsError: a line that is not numbers, a row that differs from the first (factors per
            layer), or no factors; names the line, counted from 1.
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
            raise FactorsError(
                f"line {number} of the factors CSV: {line.strip()[:60]!r} is not a list of numbers"
            )
    if not rows:
        raise FactorsError(
            "the factors CSV holds no numbers; give one factor per line, or one row of factors"
        )
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
            raise FactorsError(
                f"line {number} of the factors CSV has {len(values)} values, the lines before it one"
            )
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
    geometry = {
        name: fields.pop(name, None) for name in ("rotary_dim", "rope_base", "original_len")
    }
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        raise FactorsError(
            f"the published array has no {', '.join(missing)}; its setting must stand beside it"
        )
    fields.pop("partial_rotary_factor", None)  # said by rotary_dim
    attention_scale = fields.pop("attention_scale", 1.0)
    provenance = {name: str(fields.pop(name)) for name in ("model", "source") if name in fields}
    scales = {"short_attention_scale": attention_scale, "long_attention_scale": attention_scale}
    return {**fields, **scales, "geometry": geometry, "provenance": provenance}


class Window(StrEnum):
    """Which RoPE a sequence is computed with: the original one (short) or the rescaled one (long)."""

    SHORT = "short"
    LONG = "long"


@dataclass(frozen=True)
class RescaleFactors:
    """One rescale factor per cosine index, with everything needed to apply, store and compare it.

    No monotony and no lower bound of 1 is asked for: published arrays have ties and values below 1.

    Attributes:
        factors: lambda_i of the long window, dimensionless, finite, > 0.
        geometry: Rotary geometry of the pre-trained model.
        target_len: L, target window in tokens, at least ``geometry.original_len``.
        method: How the factors were made, e.g. ``yarn`` or ``longrope2``.
        critical_index: c, the critical dimension the factors were made with; None where the method
            has none.
        short_factors: lambda_i of the short window; None means all exactly 1.
        short_attention_scale: Multiplier on cos and sin in the short window.
        long_attention_scale: The same in the long window.
        provenance: Where the factors come from, free text by name.

    Raises:
        FactorsError: wrong count, or a value outside its range; names the index and the value.
    """

    factors: tuple[float, ...]
    geometry: RopeGeometry
    target_len: int
    method: str
    critical_index: int | None = None
    short_factors: tuple[float, ...] | None = None
    short_attention_scale: float = 1.0
    long_attention_scale: float = 1.0
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_list("factors", self.factors, self.geometry)
        if self.short_factors is not None:
            _check_list("short_factors", self.short_factors, self.geometry)
        if self.target_len < self.geometry.original_len:
            raise FactorsError(
                f"target_len={self.target_len} is below original_len={self.geometry.original_len}; "
                "give a target of at least the pre-trained window"
            )
        last = self.geometry.num_frequencies - 1
        if self.critical_index is not None and not 0 <= self.critical_index <= last:
            raise FactorsError(
                f"critical_index={self.critical_index}: must be a cosine index, 0 .. {last}"
            )
        for name in ("short_attention_scale", "long_attention_scale"):
            if not _positive(value := getattr(self, name)):
                raise FactorsError(f"{name}={value}: must be a finite number above 0")

    @property
    def scale(self) -> float:
        """Target length over original length, the s of the paper."""
        return self.target_len / self.geometry.original_len

    def window_factors(self, window: Window) -> tuple[float, ...]:
        """lambda_i of one window; the short window's default is all exactly 1."""
        if window is Window.LONG:
            return self.factors
        return self.short_factors or (1.0,) * self.geometry.num_frequencies

    def inverse_frequencies(self, window: Window) -> Tensor:
        """theta_i / lambda_i of one window, shape [I], float32, radians per token, on the CPU.

        Rounded in float32 in the order transformers rounds its ``longrope`` (and, with factors 1,
        its default RoPE), so that the short window is bit for bit the pre-trained model's and an
        export is bit for bit ours. Float64 followed by a cast would be closer to the formula and
        differ from both by up to one unit in the last place.
        """
        factors_I = torch.tensor(self.window_factors(window), dtype=torch.float32)
        rotary_dim = self.geometry.rotary_dim
        exponents_I = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / (factors_I * self.geometry.rope_base**exponents_I)

    def attention_scale(self, window: Window) -> float:
        """Multiplier on cos and sin in one window."""
        return self.long_attention_scale if window is Window.LONG else self.short_attention_scale

    def in_both_windows(self) -> "RescaleFactors":
        """The same rescaled RoPE at every length: no factor switch, as models trained without mixed windows are read."""
        return replace(
            self, short_factors=self.factors, short_attention_scale=self.long_attention_scale
        )

    def to_json(self) -> str:
        """JSON text that ``from_json`` turns back into an equal value (floats are written exactly)."""
        return json.dumps({**JSON_HEADER, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RescaleFactors":
        """Read what ``to_json`` wrote, or a published array with its setting beside it.

        Such an array is one flat object: ``factors``, ``rotary_dim``, ``rope_base``,
        ``original_len``, ``target_len``, ``method`` and, where known, ``critical_index``,
        ``attention_scale`` (of both windows), ``model``, ``source``.

        Raises:
            FactorsError: not JSON, not a factors file of this version, a field missing or unknown,
                or a bad value.
        """
        fields = parse_factors_json(text)
        try:
            fields["geometry"] = RopeGeometry(**fields["geometry"])
            fields["factors"] = tuple(float(value) for value in fields["factors"])
            if fields.get("short_factors") is not None:
                fields["short_factors"] = tuple(float(value) for value in fields["short_factors"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise FactorsError(
                f"the factors file has a missing, unknown or ill-typed field: {error}"
            ) from None

    def to_csv(self) -> str:
        """The long window's factors, one per line, each written exactly; everything else about them is left out."""
        return format_factors_csv(self.factors)

    @classmethod
    def from_csv(
        cls,
        text: str,
        geometry: RopeGeometry,
        target_len: int,
        *,
        critical_index: int | None = None,
        long_attention_scale: float = 1.0,
        provenance: dict[str, str] | None = None,
    ) -> "RescaleFactors":
        """Read factors as the released LongRoPE searches write them: one per line, or equal rows.

        Args:
            text: Numbers, with blank lines and one header line allowed.
            geometry: Rotary geometry of the model they were searched for; the file does not say.
            target_len: L in tokens they were searched for.
            critical_index: c, where known.
            long_attention_scale: Multiplier on cos and sin they were searched with.
            provenance: Where the file comes from.

        Raises:
            FactorsError: a line that is not numbers (named), factors that differ by layer, a wrong
                count, or a bad value.
        """
        return cls(
            factors=parse_factors_csv(text),
            geometry=geometry,
            target_len=target_len,
            method="from_file",
            critical_index=critical_index,
            long_attention_scale=long_attention_scale,
            provenance=provenance or {},
        )

    def to_hf_config(self, head_dim: int | None = None) -> dict[str, Any]:
        """Keys to merge into a Hugging Face config.json so that plain transformers applies these
        factors.

        Args:
            head_dim: Channels of a head; give it where only a part of them is rotated (Phi-4-mini),
                so that ``partial_rotary_factor`` is written too.

        Raises:
            FactorsError: the attention scale of the two windows differs: Hugging Face's longrope
                holds one only.
        """
        if self.short_attention_scale != self.long_attention_scale:
            raise FactorsError(
                f"attention scale is {self.short_attention_scale} in the short window and {self.long_attention_scale} "
                "in the long one; a Hugging Face longrope config holds a single attention_factor for both. Use factors "
                "with one attention scale (longrope2 has 1 in both)"
            )
        return longrope_keys(
            short_factors=self.window_factors(Window.SHORT),
            long_factors=self.factors,
            geometry=self.geometry,
            target_len=self.target_len,
            attention_scale=self.long_attention_scale,
            head_dim=head_dim,
        )

    @classmethod
    def from_hf_config(
        cls, config: dict[str, Any], original_len: int | None = None, target_len: int | None = None
    ) -> "RescaleFactors":
        """Read the factors of a Hugging Face config.json as transformers would apply them, either
        layout.

        Types: ``longrope`` (and its first name ``su``), ``linear``, ``dynamic``, ``yarn``,
        ``llama3``, unscaled. The static ones rescale the short window too, so ``short_factors`` is
        set; ``dynamic`` is read at the target length.

        Args:
            config: Parsed config.json.
            original_len: L0 in tokens; None takes the config's own, which ``linear`` does not have.
            target_len: L in tokens; None takes the config's own: ``max_position_embeddings``, or
                factor times L0 where that is more.

        Raises:
            FactorsError: a key is missing or out of range, or the RoPE type is another one.
        """
        return cls(**read_factor_fields(config, original_len, target_len))


def _positive(value: float) -> bool:
    """Finite and above zero."""
    return math.isfinite(value) and value > 0


def _check_list(name: str, values: tuple[float, ...], geometry: RopeGeometry) -> None:
    """One finite positive factor per cosine index."""
    if len(values) != geometry.num_frequencies:
        raise FactorsError(
            f"{name} has {len(values)} values; rotary_dim={geometry.rotary_dim} needs {geometry.num_frequencies}"
        )
    for index, value in enumerate(values):
        if not _positive(value):
            raise FactorsError(
                f"{name}[{index}]={value}: a rescale factor must be a finite number above 0"
            )
