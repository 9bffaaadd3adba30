"""Search of rescale factors and of the critical dimension, guided by needle perplexity."""

from longrope2.search.config import Objective, SearchConfig, SearchedDims, search_faults
from longrope2.search.evaluator import Evaluator, Score
from longrope2.search.evolution import Evolution, Ranked, Round
from longrope2.search.journal import Journal
from longrope2.search.objective import (
    SampleLosses,
    ScoredSample,
    cut_documents,
    needle_samples,
    perplexity,
    samples_sha256,
    token_nll,
)
from longrope2.search.outcome import BASELINE_METHODS, best_factors, search_history, value_name
from longrope2.search.run import HISTORY_FILE, JOURNAL_FILE, NEEDLES_FILE, PreparedSearch, SearchRoot, run_search
from longrope2.search.selftests import (
    NeedleGuidance,
    check_factors_matter,
    check_needle_guidance,
    check_needle_labels,
)
from longrope2.search.space import Candidate, SearchSpace

__all__ = [
    "BASELINE_METHODS",
    "HISTORY_FILE",
    "JOURNAL_FILE",
    "NEEDLES_FILE",
    "Candidate",
    "Evaluator",
    "Evolution",
    "Journal",
    "NeedleGuidance",
    "Objective",
    "PreparedSearch",
    "Ranked",
    "Round",
    "SampleLosses",
    "Score",
    "ScoredSample",
    "SearchConfig",
    "SearchRoot",
    "SearchSpace",
    "SearchedDims",
    "best_factors",
    "check_factors_matter",
    "check_needle_guidance",
    "check_needle_labels",
    "cut_documents",
    "needle_samples",
    "perplexity",
    "run_search",
    "samples_sha256",
    "search_faults",
    "search_history",
    "token_nll",
    "value_name",
]
