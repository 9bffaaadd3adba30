"""What a search is asked for: its configuration, the faults of it, and the plan in words."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.corpora import CorpusConfig, build_corpus
from longrope2.artifacts import resolve_model_folder
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.model import ForwardCost, RopeConfig, resolve_factors, rope_geometry
from longrope2.parallel import head_faults
from longrope2.rope import RescaleFactors, RopeGeometry, RopeMethod
from longrope2.search import Objective, SearchRoot, SearchSpace, most_candidates, projected_hours, search_faults

__all__ = ["SearchCommand", "check", "describe", "long_factors", "sample_len"]


@dataclass
class SearchCommand(SearchRoot):
    """Configuration of the command: the search and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def check(config: SearchCommand) -> tuple[Path, SearchSpace]:
    """Check everything that needs no forward pass.

    Returns:
        The model's folder and the search space.

    Raises:
        ConfigError: every fault found, together.
    """
    faults = search_faults(config.search)
    original_len = config.model.original_len
    if config.target_len <= original_len or config.target_len % original_len:
        faults.append(
            f"target_len={config.target_len}: must be a multiple, 2 or more, of model.original_len={original_len}"
        )
    try:
        build_corpus(config.corpus)
    except ConfigError as error:
        faults += error.faults
    try:
        model_folder = resolve_model_folder(config.model.path)
        geometry = rope_geometry(model_folder, original_len)
        faults += parallel_faults(config, model_folder)
        if not faults:
            long_factors(config, geometry)
            return model_folder, SearchSpace.from_config(config.search, geometry, config.target_len)
    except UserError as error:
        faults.append(str(error))
    raise ConfigError(faults)


def describe(config: SearchCommand, model_folder: Path, space: SearchSpace) -> str:
    """The plan in a few lines."""
    search, length = config.search, sample_len(config)
    num_candidates = most_candidates(search)
    num_forwards = num_candidates * search.num_samples
    scored = "the value of a needle" if search.objective is Objective.needle else "every token"
    hours = projected_hours(ForwardCost.from_config(model_folder), length, num_forwards, search)
    lowest, highest = (step / space.steps_per_unit for step in (space.lowest_step, space.highest_step))
    if space.is_bounded:
        critical = ", ".join(map(str, space.critical_indices))
        where = f"critical index {critical}; factors {lowest:g} .. {highest:g} from it up; dims={search.dims.value}"
    else:
        where = f"no critical index; every factor 1 .. {highest:g}"
    workers = config.parallel.processes // config.parallel.sequence
    return "\n".join([
        f"model      {config.model.name}, window {config.model.original_len} -> {config.target_len}",
        f"space      {where}",
        f"objective  {search.objective.value}: {scored}, {search.num_samples} samples of {length} tokens, "
        f"held out of corpus {config.corpus.name}",
        f"workers    {workers}, each of {config.parallel.sequence} processes",
        f"budget     at most {num_candidates:,} candidates, {num_forwards * length:,} forward tokens; about "
        f"{hours:.2g} h on {search.projected_gpus} GPUs at {search.projected_tflops:g} TFLOP/s each",
    ])  # fmt: skip


def parallel_faults(config: SearchCommand, model_folder: Path) -> list[str]:
    """Faults of the process grid."""
    parallel = config.parallel
    model = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    heads = model["num_attention_heads"]
    faults = head_faults(parallel.sequence, heads, model.get("num_key_value_heads") or heads)
    if parallel.processes < 1 or parallel.processes % parallel.sequence:
        faults.append(
            f"parallel.processes={parallel.processes}: must be a multiple of parallel.sequence={parallel.sequence}"
        )
    return faults


def long_factors(config: SearchCommand, geometry: RopeGeometry) -> RescaleFactors | None:
    """The long window's factors when the search is for the short window's.

    Raises:
        ArtifactError: ``search.short_window_of`` is missing, or for another model or target.
    """
    if config.search.short_window_of is None:
        return None
    rope = RopeConfig(method=RopeMethod.from_file, factors=config.search.short_window_of)
    try:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder)
    except ArtifactError as error:
        raise ArtifactError(f"search.short_window_of: {error}") from None


def sample_len(config: SearchCommand) -> int:
    """Tokens of a sample: L, or L0 for the short window's factors."""
    return config.target_len if config.search.short_window_of is None else config.model.original_len
