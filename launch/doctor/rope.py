"""``launch.doctor rope``: what each rescaling method does to each RoPE dimension of a model.

Reads config.json and factors files only: no weights, no tokenizer. Prints a table, with where the
bound holds, and writes a figure.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.config import MISSING, ModelConfig, RunConfig, compose, target_faults
from longrope2.errors import ConfigError, FactorsError, UserError
from longrope2.files.artifacts import product_folder
from longrope2.help import help_topic
from longrope2.model.factors_source import FACTORS_FILE, read_factors
from longrope2.model.folder import given_config_file, look_before
from longrope2.model.shape import ModelShape, read_model_config
from longrope2.rope import hf_config
from longrope2.rope import methods as rescaling
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod

if TYPE_CHECKING:
    from launch.doctor.rope_view import RopeComparison

PLOT_FORMATS = (".svg", ".png")
SEARCHED, PUBLISHED = "searched", "published"


@dataclass
class RopeDoctorConfig:
    """What is compared, beside the run's own search result and the model's published scaling."""

    methods: list[RopeMethod] | None = None
    """Methods to compute; null means every closed form, and yarn_rcd and ntk_rcd where a critical
    index is known."""
    factors: list[str] = field(default_factory=list)
    """Further factors: JSON or CSV files, or published models (folder, config.json, hub id)."""
    plot: str | None = None
    """Figure to write, .svg or .png; null means ``rope.svg`` in the run folder."""


@dataclass
class DoctorRoot:
    """Configuration of the command."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    target_len: int = MISSING
    """L: target window in tokens, a multiple of ``model.original_len``."""
    doctor: RopeDoctorConfig = field(default_factory=RopeDoctorConfig)


def rope_command(arguments: list[str]) -> None:
    """Compose, compare, print the table, write the figure."""
    config = compose(DoctorRoot, "doctor", overrides(arguments))
    comparison = compare(config)
    from launch.doctor import rope_view  # only now: figures load for seconds

    print(rope_view.describe(comparison, config.model.name))
    rope_view.print_table(rope_view.comparison_table(comparison))
    path = Path(config.doctor.plot) if config.doctor.plot else config.run.folder / "rope.svg"
    rope_view.write_figure(comparison, config.model.name, path)
    print(f"figure: {path}")


def overrides(arguments: list[str]) -> list[str]:
    """Hydra overrides from the command line, where words without ``=`` are methods.

    Raises:
        ConfigError: methods given in both ways.
    """
    if help_topic(arguments) is not None:
        return arguments
    words = [argument for argument in arguments if "=" not in argument and argument[:1] != "-"]
    settings = [argument for argument in arguments if argument not in words]
    if not words:
        return settings
    if any(setting.startswith("doctor.methods=") for setting in settings):
        fault = f"give methods as words ({' '.join(words)}) or as doctor.methods=[...], not both"
        raise ConfigError([fault])
    return [*settings, f"doctor.methods=[{','.join(words)}]"]


def compare(config: DoctorRoot) -> "RopeComparison":
    """Read the model's config.json and every factors file, and compute the methods.

    Raises:
        ConfigError: every fault found, together.
    """
    look = look_before(config.model, takes_file=True)
    if faults := [*look.faults, *_setting_faults(look.with_its_window(config))]:
        raise ConfigError(faults)
    look.print_notes()
    # Only now: torch and transformers load for seconds.
    from launch.doctor.rope_view import RopeComparison
    from longrope2.model.given import published_rotary

    try:
        config_file = given_config_file(config.model, config.target_len)
        model_config = read_model_config(config_file)
        ModelShape.from_file(config_file)  # refuses what any other command would
        rotary, original_len = published_rotary(model_config), config.model.original_len
        if rotary is None:
            geometry = hf_config.config_geometry(model_config, original_len)
        else:
            geometry = RopeGeometry(*rotary, original_len)
    except UserError as error:
        raise ConfigError([_named(config.model.path, error)]) from None
    columns = _read_columns(config, model_config, geometry, faults)
    stated = (name for name, column in columns.items() if column.critical_index is not None)
    source = next(stated, "")
    critical_index = columns[source].critical_index if source else None
    computed = _computed_columns(config, geometry, critical_index, faults)
    if faults:
        raise ConfigError(faults)
    return RopeComparison(
        geometry,
        config.target_len,
        computed | columns,
        critical_index=critical_index,
        critical_source=source,
    )


def _setting_faults(config: DoctorRoot) -> list[str]:
    faults = target_faults(config.model, config.target_len, extends=True)
    if config.doctor.plot and Path(config.doctor.plot).suffix not in PLOT_FORMATS:
        faults.append(f"doctor.plot={config.doctor.plot}: must end in {' or '.join(PLOT_FORMATS)}")
    allowed = rescaling.CLOSED_FORMS + rescaling.CRITICAL_INDEX_METHODS
    computed = f"computed methods are {', '.join(method.value for method in allowed)}"
    return faults + [
        f"doctor.methods: {method.value} is read from a file, give it in doctor.factors; {computed}"
        for method in config.doctor.methods or []
        if method not in allowed
    ]


def _named(path: str, error: UserError) -> str:
    """The error's text, with the model's path where it does not name it."""
    return str(error) if path in str(error) else f"model.path={path}: {error}"


def _read_columns(
    config: DoctorRoot, model_config: dict, geometry: RopeGeometry, faults: list[str]
) -> dict[str, RescaleFactors]:
    """Factors that are read: of the run's search, of the files given, the model's own scaling."""
    columns: dict[str, RescaleFactors] = {}
    searched = product_folder(config.run.folder_with("factors"), "factors") / FACTORS_FILE
    sources = [(SEARCHED, str(searched), "run.name")] if searched.is_file() else []
    sources += [(_column_name(given), given, "doctor.factors") for given in config.doctor.factors]
    for name, given, key in sources:
        try:
            if name in columns:
                twice = f"doctor.factors: two files would both be called {name}; rename one"
                raise ConfigError([twice])
            columns[name] = read_factors(given, geometry, config.target_len, key)
        except ConfigError as error:
            faults += error.faults
        except UserError as error:
            faults.append(str(error))
    try:
        if hf_config.config_rope_type(model_config) != hf_config.UNSCALED_TYPE:
            columns[PUBLISHED] = hf_config.from_hf_config(
                model_config,
                geometry.original_len,
                config.target_len,
                (geometry.rotary_dim, geometry.rope_base),
            )
    except FactorsError as error:
        faults.append(_named(config.model.path, error))
    return columns


def _column_name(given: str) -> str:
    """A file's stem; a model's last name."""
    path = Path(given)
    return path.parent.name if path.name == "config.json" else path.stem


def _computed_columns(
    config: DoctorRoot, geometry: RopeGeometry, critical_index: int | None, faults: list[str]
) -> dict[str, RescaleFactors]:
    methods = config.doctor.methods
    if methods is None:
        methods = [m for m in rescaling.CLOSED_FORMS if m is not RopeMethod.none]
        methods += [] if critical_index is None else rescaling.CRITICAL_INDEX_METHODS
    columns, target = {}, config.target_len
    for method in methods:
        try:
            if method in rescaling.CLOSED_FORMS:
                columns[method.value] = rescaling.closed_form_factors(method, geometry, target)
            elif critical_index is None:
                needs = f"doctor.methods: {method.value} needs a critical index"
                run = f"run launch.search for run.name={config.run.name}"
                ways_out = f"{run}, or give doctor.factors=[FACTORS.json] of a finished search"
                faults.append(f"{needs}; {ways_out}")
            else:
                setting = (geometry, target, critical_index)
                columns[method.value] = rescaling.critical_index_factors(method, *setting)
        except FactorsError as error:
            faults.append(f"doctor.methods: {error}")
    return columns
