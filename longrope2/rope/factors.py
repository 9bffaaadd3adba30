"""``RescaleFactors``: the rescaled RoPE of both windows as one validated, immutable value.

theta'_i = theta_i / lambda_i [LongRoPE2, arXiv 2502.20082, sec. 2]. The long window uses
``factors``; the short window uses the original RoPE (factors 1, attention scale 1) unless
``short_factors`` says otherwise, as some published first generation LongRoPE models do.

As text: this project's JSON, a published array in JSON with its setting beside it, and the CSV
files of the released searches (microsoft/LongRoPE): one factor per line (LongRoPE2), or one row per
layer with all rows equal, separated by commas or spaces (first generation). A CSV holds factors and
nothing else: which model, base and lengths they belong to must be known from elsewhere.

Shape letters: I = cosine indices.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.window import Window

if TYPE_CHECKING:
    from torch import Tensor

# Provenance entry of searched factors: how they did against closed forms on fresh samples.
VERDICT = "verdict"
JSON_HEADER: dict[str, Any] = {"kind": "rescale_factors", "version": 1}


@dataclass(frozen=True)
class RescaleFactors:
    """One rescale factor per cosine index, with everything needed to apply, store and compare it.

    No monotony and no lower bound of 1 is asked for: published arrays have ties and values below 1.

    Attributes:
        factors: lambda_i of the long window, dimensionless, finite, > 0.
        geometry: Rotary geometry of the pre-trained model.
        target_len: L, target window in tokens, at least ``geometry.original_len``.
        method: How the factors were made, e.g. ``yarn`` or ``longrope2``.
        critical_index: c, the critical dimension they were made with; None without one.
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
        for name in ("factors", "short_factors"):
            if (values := getattr(self, name)) is not None:
                _check_factor_list(name, values, self.geometry)
        self.geometry.scale_to(self.target_len)
        if self.critical_index is not None:
            self.geometry.check_critical_index(self.critical_index)
        for name in ("short_attention_scale", "long_attention_scale"):
            if not _positive(value := getattr(self, name)):
                raise FactorsError(f"{name}={value}: must be a finite number above 0")

    @property
    def scale(self) -> float:
        """Target length over original length, the s of the paper."""
        return self.geometry.scale_to(self.target_len)

    def window_factors(self, window: Window) -> tuple[float, ...]:
        """lambda_i of one window; the short window's default is all exactly 1."""
        if window is Window.LONG:
            return self.factors
        return self.short_factors or (1.0,) * self.geometry.num_frequencies

    def inverse_frequencies(self, window: Window) -> "Tensor":
        """theta_i / lambda_i of one window, shape [I], float32, radians per token, on the CPU.

        Rounded in float32 in the order transformers rounds its ``longrope`` (and, with factors 1,
        its default RoPE), so that the short window is bit for bit the pre-trained model's and an
        export is bit for bit ours. Float64 followed by a cast would be closer to the formula and
        differ from both by up to one unit in the last place.
        """
        import torch  # loads for seconds; a configuration is checked without it

        factors_I = torch.tensor(self.window_factors(window), dtype=torch.float32)
        rotary_dim = self.geometry.rotary_dim
        exponents_I = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return 1.0 / (factors_I * self.geometry.rope_base**exponents_I)

    def attention_scale(self, window: Window) -> float:
        """Multiplier on cos and sin in one window."""
        return self.long_attention_scale if window is Window.LONG else self.short_attention_scale

    def in_both_windows(self) -> "RescaleFactors":
        """The rescaled RoPE at every length, as models trained without mixed windows are read."""
        scale = self.long_attention_scale
        return replace(self, short_factors=self.factors, short_attention_scale=scale)

    def to_json(self) -> str:
        """JSON text that ``from_json`` turns back into an equal value (floats are exact)."""
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
        fields = _json_fields(text)
        fault = "the factors file has a missing, unknown or ill-typed field:"
        try:
            fields["geometry"] = RopeGeometry(**fields["geometry"])
            fields["factors"] = read_factor_list(fields["factors"], "factors", fault)
            if (short := fields.get("short_factors")) is not None:
                fields["short_factors"] = read_factor_list(short, "short_factors", fault)
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise FactorsError(f"{fault} {error}") from None

    def to_csv(self) -> str:
        """The long window's factors, one per line, each written exactly; nothing else."""
        return "".join(f"{factor!r}\n" for factor in self.factors)

    @classmethod
    def from_csv(
        cls, text: str, geometry: RopeGeometry, target_len: int, provenance: dict[str, str]
    ) -> "RescaleFactors":
        """Read factors as the released LongRoPE searches write them: one per line, or equal rows.

        Blank lines and one header line are skipped; model and target stand in no such file.

        Raises:
            FactorsError: a line that is not numbers, factors that differ by layer, a wrong count,
                or a bad value; names the line or the index.
        """
        factors = _csv_factors(text)
        return cls(factors, geometry, target_len, "from_file", provenance=provenance)


def read_factor_list(given: Any, key: str, fault: str) -> tuple[float, ...]:
    """A list of factors as JSON holds it; ``RescaleFactors`` checks its count and range.

    Raises:
        FactorsError: it is no list of numbers; the text begins with ``fault`` and names ``key``.
    """
    if isinstance(given, list) and all(map(is_number, given)):
        return tuple(map(float, given))
    raise FactorsError(f"{fault} {key}={str(given)[:60]}; it must be a list of numbers")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; Python counts ``true`` among the integers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_factor_list(name: str, values: tuple[float, ...], geometry: RopeGeometry) -> None:
    """One finite positive factor per cosine index."""
    if len(values) != geometry.num_frequencies:
        fault = f"{name} has {len(values)} values; rotary_dim={geometry.rotary_dim} needs"
        raise FactorsError(f"{fault} {geometry.num_frequencies}")
    for index, value in enumerate(values):
        if not _positive(value):
            fault = f"{name}[{index}]={value}: a rescale factor must be a finite number above 0"
            raise FactorsError(fault)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _json_fields(text: str) -> dict[str, Any]:
    """The fields of a factors file; a published array is given the same fields."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FactorsError(f"not a factors file: {error}") from None
    if isinstance(fields, dict) and "kind" not in fields and "factors" in fields:
        return _published_array(fields)
    if not isinstance(fields, dict) or fields.pop("kind", None) != JSON_HEADER["kind"]:
        raise FactorsError(f"not a factors file: its kind is not {JSON_HEADER['kind']!r}")
    if (version := fields.pop("version", None)) != JSON_HEADER["version"]:
        fault = f"the factors file has version {version}"
        raise FactorsError(f"{fault}, this program reads {JSON_HEADER['version']}; make it again")
    return fields


def _published_array(fields: dict[str, Any]) -> dict[str, Any]:
    """A published array with its setting, as the fields of a factors file."""
    names = ("rotary_dim", "rope_base", "original_len")
    geometry = {name: fields.pop(name, None) for name in names}
    if missing := [name for name, value in geometry.items() if value is None]:
        fault = f"the published array has no {', '.join(missing)}; its setting must stand beside it"
        raise FactorsError(fault)
    fields.pop("partial_rotary_factor", None)  # said by rotary_dim
    attention_scale = fields.pop("attention_scale", 1.0)
    provenance = {name: str(fields.pop(name)) for name in ("model", "source") if name in fields}
    scales = {"short_attention_scale": attention_scale, "long_attention_scale": attention_scale}
    return {**fields, **scales, "geometry": geometry, "provenance": provenance}


def _csv_factors(text: str) -> tuple[float, ...]:
    """The factors of a CSV text: one per line, or rows that are all equal."""
    rows: list[tuple[int, tuple[float, ...]]] = []
    has_header = False
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        cells = [cell.strip() for cell in line.split(",")] if "," in line else line.split()
        if not line.strip():
            continue
        if (values := _numbers(cells)) is not None:
            rows.append((number, values))
        # A line where only some cells are numbers is damaged, and no header.
        elif rows or has_header or any(_numbers([cell]) for cell in cells):
            fault = f"line {number} of the factors CSV"
            raise FactorsError(f"{fault}: {line.strip()[:60]!r} is not a list of numbers")
        else:
            has_header = True
    if not rows:
        fault = "the factors CSV holds no numbers; give one factor per line, or one row of factors"
        raise FactorsError(fault)
    first_number, first = rows[0]
    is_column = len(first) == 1
    for number, values in rows:
        if is_column and len(values) != 1:
            fault = f"line {number} of the factors CSV has {len(values)} values"
            raise FactorsError(f"{fault}, the lines before it one")
        if not is_column and values != first:
            raise FactorsError(
                f"line {number} of the factors CSV differs from line {first_number}: rows are "
                "layers, and factors that differ by layer are not supported; give one factor per "
                "line, or one row"
            )
    return tuple(values[0] for _, values in rows) if is_column else first


def _numbers(cells: list[str]) -> tuple[float, ...] | None:
    try:
        return tuple(map(float, cells))
    except ValueError:
        return None
