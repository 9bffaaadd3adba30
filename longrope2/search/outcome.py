"""What a finished search leaves behind: the best factors, and the history that reports are drawn from."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from longrope2.rope import RescaleFactors, RopeMethod, ten_period_index, theoretical_critical_index
from longrope2.search.budget import SearchBudget
from longrope2.search.config import Algorithm, Objective, SearchConfig
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.selftests import NeedleGuidance
from longrope2.search.space import SearchSpace

__all__ = ["BASELINE_METHODS", "best_factors", "search_history", "value_name"]

BASELINE_METHODS = (RopeMethod.none, RopeMethod.pi, RopeMethod.ntk, RopeMethod.yarn)


def _critical(config: SearchConfig) -> str:
    """Where the critical index came from."""
    if config.algorithm is Algorithm.longrope:
        return "none"
    return "searched" if config.critical is None else "fixed"


def value_name(objective: Objective) -> str:
    """Name of the objective's value in histories and metrics."""
    return "needle_ppl" if objective is Objective.needle else "ppl"


def best_factors(
    evolution: Evolution,
    evaluator: Evaluator,
    space: SearchSpace,
    config: SearchConfig,
    *,
    long_factors: RescaleFactors | None = None,
    **provenance: str,
) -> RescaleFactors:
    """The rescale factors of the best candidate, with what they were chosen by.

    With ``long_factors`` the candidate gives the short window's factors, and those are the long window's.
    """
    best = evolution.best
    found = space.to_factors(
        best.candidate,
        method=config.algorithm.value,
        objective=config.objective.value,
        dims=config.dims.value,
        critical=_critical(config),
        **{value_name(config.objective): repr(evaluator.value(best.loss_sum))},
        **provenance,
    )
    if long_factors is None:
        return found
    short = {f"short_{key}": value for key, value in found.provenance.items()}
    return replace(long_factors, short_factors=found.factors, provenance={**long_factors.provenance, **short})


def search_history(
    evolution: Evolution,
    evaluator: Evaluator,
    space: SearchSpace,
    config: SearchConfig,
    *,
    baselines: Mapping[str, float],
    guidance: NeedleGuidance | None,
    sample_len: int,
    budget: SearchBudget,
) -> dict[str, Any]:
    """Everything a report needs, as plain JSON values.

    All but ``budget`` and the costs in ``rounds`` is the same however often the search was interrupted and for any number
    of workers. Keys: ``algorithm``, ``objective`` and ``value_name``; ``sample_len``; ``budget`` (see ``SearchBudget``);
    ``best_value``, ``critical_index``, ``theoretical_critical_index``, ``ten_period_index``; ``baselines`` (method ->
    value on the same samples); ``rounds`` (see ``Round``); ``kept`` (best candidates: value, critical index, factors);
    ``needle_ppl_at_original`` and ``control_ppl_at_original`` of the self-test, null without one.
    """
    return {
        "algorithm": config.algorithm.value,
        "objective": config.objective.value,
        "value_name": value_name(config.objective),
        "best_value": evaluator.value(evolution.best.loss_sum),
        "critical_index": evolution.best.critical_index if space.is_bounded else None,
        "theoretical_critical_index": theoretical_critical_index(space.geometry),
        "ten_period_index": ten_period_index(space.geometry),
        "original_len": space.geometry.original_len,
        "target_len": space.target_len,
        "sample_len": sample_len,
        "budget": asdict(budget),
        "baselines": dict(baselines),
        "needle_ppl_at_original": guidance.needle_ppl if guidance else None,
        "control_ppl_at_original": guidance.control_ppl if guidance else None,
        "rounds": [asdict(finished) for finished in evolution.rounds],
        "kept": [
            {
                "value": evaluator.value(ranked.loss_sum),
                "critical_index": ranked.critical_index if space.is_bounded else None,
                "factors": list(space.to_factors(ranked.candidate).factors),
            }
            for ranked in evolution.kept
        ],
    }
