"""Search of rescale factors and of the critical dimension, guided by needle perplexity."""

from longrope2.search.budget import SearchBudget, most_candidates, projected_hours
from longrope2.search.config import Algorithm, Objective, Pruning, SearchConfig, SearchedDims, search_faults
from longrope2.search.evaluator import BatchLosses, Evaluator, Race
from longrope2.search.evolution import Evolution, Ranked, Round
from longrope2.search.journal import JOURNAL_FILE, Journal
from longrope2.search.objective import (
    SampleLosses,
    ScoredSample,
    cut_documents,
    needle_samples,
    perplexity,
    samples_sha256,
)
from longrope2.search.outcome import BASELINE_METHODS, best_factors, search_history, value_name
from longrope2.search.run import HISTORY_FILE, NEEDLES_FILE, PreparedSearch, SearchRoot, run_search
from longrope2.search.selftests import (
    NeedleGuidance,
    check_factors_matter,
    check_needle_guidance,
    check_needle_labels,
)
from longrope2.search.space import Candidate, SearchSpace
from longrope2.search.workers import Score, TaskQueue, Workers

__all__ = [
    "BASELINE_METHODS",
    "HISTORY_FILE",
    "JOURNAL_FILE",
    "NEEDLES_FILE",
    "Algorithm",
    "BatchLosses",
    "Candidate",
    "Evaluator",
    "Evolution",
    "Journal",
    "NeedleGuidance",
    "Objective",
    "PreparedSearch",
    "Pruning",
    "Race",
    "Ranked",
    "Round",
    "SampleLosses",
    "Score",
    "ScoredSample",
    "SearchBudget",
    "SearchConfig",
    "SearchRoot",
    "SearchSpace",
    "SearchedDims",
    "TaskQueue",
    "Workers",
    "best_factors",
    "check_factors_matter",
    "check_needle_guidance",
    "check_needle_labels",
    "cut_documents",
    "most_candidates",
    "needle_samples",
    "perplexity",
    "projected_hours",
    "run_search",
    "samples_sha256",
    "search_faults",
    "search_history",
    "value_name",
]
