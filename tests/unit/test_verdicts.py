"""How often a verdict beside the paper's number is false, counted; and when there is none."""

import functools

import numpy as np
import pytest
from scipy import stats
from test_intervals import graded
from test_paper_report import cell, make_summary

from longrope2 import statistics
from longrope2.evaluation.schema import Cell, EffectiveLength, Protocol
from longrope2.report import paper as report
from longrope2.report import paper_values as paper
from longrope2.report.paper import (
    FEWEST_SAMPLES,
    PaperValue,
    mean_cell,
    paper_tables,
    paper_text,
    reached_text,
)
from longrope2.statistics import exact_interval, score_interval

SIZES = (1, 2, 5, 19, 20, 21, 25, 33, 50, 77, 100, 150, 200, 300, 400, 500)
PAPERS = 100


@pytest.fixture(autouse=True, scope="module")
def remembered_intervals():
    """Simulations ask for the same counts again and again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (statistics, report):
            patch.setattr(module, "exact_interval", functools.cache(exact_interval))
        yield


def judged(scores, papers_score, num_tasks=1):
    """The verdict on scores of ours, by the way that reports take."""
    share, sides = float(np.mean(scores)), {}
    interval = score_interval(scores)
    found = Cell("s", "ruler", "vt", 4096, len(scores), share, interval, sides=sides, scores=scores)
    return mean_cell([found] * num_tasks, PaperValue(100 * papers_score, PAPERS, True)).verdict


@pytest.mark.parametrize("num_samples", [n for n in SIZES if n <= 100])
def test_verdicts_on_right_and_wrong_answers_are_false_in_5_percent_at_most(num_samples):
    """Every outcome of both models of one accuracy, weighed by its probability: no luck in it."""
    ours, papers = np.arange(num_samples + 1), np.arange(PAPERS + 1)
    false_OP = np.zeros((len(ours), len(papers)))
    for right in ours:
        scores = (1.0,) * right + (0.0,) * (num_samples - right)
        for found in papers:
            false_OP[right, found] = judged(scores, found / PAPERS) in ("above", "below")
    for share in (0.01, 0.05, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995):
        weights_O = stats.binom.pmf(ours, num_samples, share)
        weights_P = stats.binom.pmf(papers, PAPERS, share)
        assert weights_O @ false_OP @ weights_P <= 0.05, share


@pytest.mark.parametrize("num_samples", [n for n in SIZES if n > 100])
def test_many_right_and_wrong_answers_are_judged_false_in_5_percent_at_most(num_samples):
    rng = np.random.default_rng(num_samples)
    for share in (0.05, 0.5, 0.9, 0.98):
        num_false, draws = 0, 400
        for _ in range(draws):
            right, papers = rng.binomial(num_samples, share), rng.binomial(PAPERS, share) / PAPERS
            scores = (1.0,) * right + (0.0,) * (num_samples - right)
            num_false += judged(scores, papers) in ("above", "below")
        # The border of 5 %, and three standard errors of the count.
        assert num_false / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5, share


@pytest.mark.parametrize("num_samples", [1, 2, 20, 50, 150, 500])
def test_verdicts_on_graded_answers_are_false_in_5_percent_at_most(num_samples):
    """From one sample the bootstrap was wrong in 22 %."""
    rng, draws = np.random.default_rng(num_samples), 40
    num_false = 0
    for draw, _ in graded(rng).values():
        for _ in range(draws):
            scores = tuple(draw(num_samples).tolist())
            num_false += judged(scores, draw(PAPERS).mean()) in ("above", "below")
    assert num_false / (6 * draws) <= 0.05


def test_a_difference_that_is_there_is_seen():
    """Else no verdict would be the best one."""
    assert judged((1.0,) * 100, 0.8) == "above" and judged((0.5, 0.75) * 50, 0.9) == "below"


def test_under_20_samples_a_cell_says_so():
    assert judged((1.0,) * (FEWEST_SAMPLES - 1), 0.1) == "too few samples"
    assert judged((1.0,) * FEWEST_SAMPLES, 0.1) == "above"
    few = make_summary([cell("extended", "ruler", "vt", 4096, 1.0, 2)])
    assert "vt 100.0 [15.8-100.0] (paper 98.8, too few samples); mean 100.0" in paper_text(few)


def ruler_tables(protocol, tasks=paper.RULER_COLUMNS):
    cells = [cell("extended", "ruler", task, 131072, 0.9) for task in tasks]
    summary = make_summary(cells, protocols=() if protocol is None else (protocol,))
    return paper_tables(summary), paper_text(summary)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (None, "ruler: not comparable with the paper (how it was asked is not recorded)"),
        (
            Protocol("ruler", ("our own wording", "13 tasks"), ("our own wording",)),
            "ruler: not comparable with the paper (our own wording): our own wording, 13 tasks",
        ),
    ],
)
def test_without_the_papers_protocol_there_is_no_verdict(protocol, said):
    (averages, by_task, *_), text = ruler_tables(protocol)
    found = dict(averages.rows)["extended"][0]
    assert (found.paper, found.verdict) == (82.03, "not comparable")
    assert {row.verdict for row in by_task.rows[0][1]} == {"not comparable"}
    assert averages.title == "RULER, mean of 13 tasks by length" and averages.basis == (said,)
    assert "(paper 82.03, not comparable)" in text and f"\n  {said}\n" in text
    assert "Table" not in text and "above" not in text.replace("RULER average above", "")


def test_two_tasks_are_no_table_2():
    protocol = Protocol("ruler", ("2 tasks",), ("2 of RULER's 13 tasks",))
    (averages, *_), text = ruler_tables(protocol, paper.RULER_COLUMNS[:2])
    assert averages.title == "RULER, mean of 2 tasks by length" and "Table" not in text
    (averages, *_), text = ruler_tables(Protocol("ruler", ("as RULER",)))
    assert averages.title == "Table 2: RULER, mean of 13 tasks by length"


def test_other_items_than_the_papers_are_not_compared():
    """A folder with some of a task's files is another task."""
    tasks = dict.fromkeys(paper.SHORT_COLUMNS, 0.5)
    counts = paper.NUM_SAMPLES | {"hellaswag": 10_041}
    cells = [cell("extended", "lm_eval", task, 0, tasks[task], counts[task]) for task in tasks]
    (table,) = paper_tables(make_summary(cells, averages=()))
    assert table.title == "short tasks" and table.basis == (
        "short: not comparable with the paper (hellaswag of 10,041 items instead of 10,042): as "
        "the paper",
    )
    assert {row.verdict for row in dict(table.rows)["extended"]} == {"not comparable"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (EffectiveLength("s", 8192, 8192), "8,192 tokens"),
        (EffectiveLength("s", 8192, 16384), "8,192 tokens, perhaps 16,384: more samples would"),
        (EffectiveLength("s", None, 4096), "not told at the shortest length, perhaps 4,096"),
        (EffectiveLength("s"), "below the shortest length"),
        (EffectiveLength("s", reason="2 of RULER's 13"), "not said, 2 of RULER's 13"),
    ],
)
def test_an_effective_length_is_said_as_far_as_it_is_known(found, said):
    assert reached_text(found).startswith(said)
    text = paper_text(make_summary([], effective_lengths=(found,)))
    assert f"effective length of s (RULER average above 85.6): {said}" in text
    own = (Protocol("ruler", (), ("our own wording",)),)
    text = paper_text(make_summary([], effective_lengths=(found,), protocols=own))
    assert "(RULER average above 85.6, not asked as RULER does)" in text
