"""What a finished search leaves behind: the best factors, and the history that reports are drawn from."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from longrope2.rope import RescaleFactors, RopeMethod, ten_period_index, theoretical_critical_index
from longrope2.search.config import Objective, SearchConfig
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.selftests import NeedleGuidance
from longrope2.search.space import SearchSpace

__all__ = ["BASELINE_METHODS", "best_factors", "search_history", "value_name"]

BASELINE_METHODS = (RopeMethod.none, RopeMethod.pi, RopeMethod.ntk, RopeMethod.yarn)


def value_name(objective: Objective) -> str:
    """Name of the objective's value in histories and metrics."""
    return "needle_ppl" if objective is Objective.needle else "ppl"


def best_factors(
    evolution: Evolution, evaluator: Evaluator, space: SearchSpace, config: SearchConfig, **provenance: str
) -> RescaleFactors:
    """The rescale factors of the best candidate, with what they were chosen by."""
    best = evolution.best
    return space.to_factors(
        best.candidate,
        objective=config.objective.value,
        dims=config.dims.value,
        critical="searched" if config.critical is None else "fixed",
        **{value_name(config.objective): repr(evaluator.value(best.loss_sum))},
        **provenance,
    )


def search_history(
    evolution: Evolution,
    evaluator: Evaluator,
    space: SearchSpace,
    config: SearchConfig,
    *,
    baselines: Mapping[str, float],
    guidance: NeedleGuidance | None,
) -> dict[str, Any]:
    """Everything a report needs, as plain JSON values; the same however often the search was interrupted.

    Keys: ``objective`` and ``value_name``; ``best_value``, ``critical_index``, ``theoretical_critical_index``,
    ``ten_period_index``; ``baselines`` (method -> value on the same samples); ``rounds`` (see ``Round``); ``kept``
    (best candidates: value, critical index, factors); ``needle_ppl_at_original`` and ``control_ppl_at_original`` of
    the self-test, null without one.
    """
    return {
        "objective": config.objective.value,
        "value_name": value_name(config.objective),
        "best_value": evaluator.value(evolution.best.loss_sum),
        "critical_index": evolution.best.critical_index,
        "theoretical_critical_index": theoretical_critical_index(space.geometry),
        "ten_period_index": ten_period_index(space.geometry),
        "original_len": space.geometry.original_len,
        "target_len": space.target_len,
        "baselines": dict(baselines),
        "needle_ppl_at_original": guidance.needle_ppl if guidance else None,
        "control_ppl_at_original": guidance.control_ppl if guidance else None,
        "rounds": [asdict(finished) for finished in evolution.rounds],
        "kept": [
            {
                "value": evaluator.value(ranked.loss_sum),
                "critical_index": ranked.critical_index,
                "factors": list(space.to_factors(ranked.candidate).factors),
            }
            for ranked in evolution.kept
        ],
    }
