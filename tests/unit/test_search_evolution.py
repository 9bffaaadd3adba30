"""The search finds a planted optimum; stopping, resuming and journals never change its result."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError, FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.search.config import Pruning, SearchConfig, SearchedDims
from longrope2.search.evaluator import Evaluator, Race, Score
from longrope2.search.evolution import Evolution, critical_index_shares
from longrope2.search.journal import Journal
from longrope2.search.space import Candidate, SearchSpace

GEOMETRY = RopeGeometry(32, 1e4, 128)
PLANTED = Candidate(4, (1650, 1650, 1700, 1820, 1900, 1900, 2050, 2100, 2200, 2250, 2300, 2600))
NUM_SAMPLES = 4
HARDNESS = (1.0, 4.0, 2.0, 3.0)  # of the samples: the loss per unit of distance
HEADER = {"model": "synthetic"}


class PlantedLosses:
    """Losses that grow with the distance in log frequency from planted factors; counts itself."""

    def __init__(self, batch_size: int = 1, broken: frozenset[int] = frozenset()) -> None:
        self.best = (
            SearchSpace.from_config(SearchConfig(), GEOMETRY, 2048).to_factors(PLANTED).factors
        )
        self.batch_size = batch_size
        self.broken = broken
        self.num_computed = 0
        self.calls: list[tuple[tuple[float, ...], int]] = []

    @property
    def num_batches(self) -> int:
        return -(-NUM_SAMPLES // self.batch_size)

    @property
    def num_samples(self) -> int:
        return NUM_SAMPLES

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        self.calls.append((factors.factors, batch))
        distance = sum(
            abs(math.log(a / b)) for a, b in zip(factors.factors, self.best, strict=True)
        )
        numbers = range(batch * self.batch_size, min((batch + 1) * self.batch_size, NUM_SAMPLES))
        self.num_computed += len(numbers)
        is_broken = factors.factors[-1] > 28 and not self.broken.isdisjoint(numbers)
        return [math.nan if is_broken else HARDNESS[number] * distance + 0.01 for number in numbers]


def config_of(**changes: object) -> SearchConfig:
    settings = {"population": 24, "iterations": 12, "parents": 8, "num_samples": NUM_SAMPLES}
    settings |= changes  # type: ignore[arg-type]
    return SearchConfig(**settings)  # type: ignore[arg-type]


def search(
    folder: Path,
    config: SearchConfig,
    losses: PlantedLosses | None = None,
    stop_after: int | None = None,
    seed: int = 0,
) -> tuple[Evolution, Evaluator, PlantedLosses]:
    space = SearchSpace.from_config(config, GEOMETRY, 2048)
    losses = losses or PlantedLosses(config.batch_size or 1)
    with Journal(folder, HEADER) as journal:
        evaluator = Evaluator(
            losses,
            journal,
            num_scored_tokens=NUM_SAMPLES,
            is_pruning=config.pruning is not Pruning.none,
        )
        evolution = Evolution(space, config, evaluator, seed)
        for number, _ in enumerate(evolution.steps(), start=1):
            if number == stop_after:
                break
    return evolution, evaluator, losses


def num_known(folder: Path) -> int:
    """Sample losses on disk."""
    return Journal(folder, HEADER, writes=False).num_losses


def outcome(evolution: Evolution) -> list[tuple[float, Candidate]]:
    return [(ranked.loss_sum, ranked.candidate) for ranked in evolution.kept]


def account(evolution: Evolution) -> list[tuple[int, float, int, float, int]]:
    return [
        (r.iteration, r.best_value, r.best_critical_index, r.worst_kept_value, r.num_candidates)
        for r in evolution.rounds
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_a_planted_optimum(tmp_path: Path, seed: int) -> None:
    evolution, evaluator, _ = search(
        tmp_path, config_of(population=64, iterations=60, parents=32), seed=seed
    )
    assert evolution.best.candidate.critical_index == PLANTED.critical_index
    found = evolution.best.candidate.steps
    assert all(abs(a - b) <= 40 for a, b in zip(found, PLANTED.steps, strict=True)), found
    values = [finished.best_value for finished in evolution.rounds]
    assert values == sorted(values, reverse=True)
    # Not relative to the start: a straight line may come near the planted factors by itself.
    assert values[-1] == evaluator.value(evolution.best.loss_sum) < 1.2 < values[0]
    assert len(evolution.rounds) == 61


def test_perplexity_is_over_all_scored_tokens(tmp_path: Path) -> None:
    evolution, evaluator, _ = search(tmp_path, config_of(iterations=0))
    assert evaluator.value(evolution.best.loss_sum) == math.exp(
        evolution.best.loss_sum / NUM_SAMPLES
    )
    assert evaluator.value(math.inf) == evaluator.value(1e9) == math.inf


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dims", list(SearchedDims))
def test_early_termination_changes_nothing_but_the_cost(
    tmp_path: Path, batch_size: int, dims: SearchedDims
) -> None:
    full, _, all_losses = search(
        tmp_path / "full", config_of(pruning=Pruning.none, batch_size=batch_size, dims=dims)
    )
    short, _, fewer_losses = search(tmp_path / "short", config_of(batch_size=batch_size, dims=dims))
    assert outcome(short) == outcome(full)
    assert account(short) == account(full)
    assert short.num_terminated > 0
    assert full.num_terminated == 0
    assert fewer_losses.num_computed <= all_losses.num_computed - short.num_terminated
    assert fewer_losses.num_computed == num_known(tmp_path / "short") == short.num_losses
    assert all_losses.num_computed == NUM_SAMPLES * full.num_candidates


def test_the_hardest_sample_comes_first(tmp_path: Path) -> None:
    evolution, _, losses = search(tmp_path, config_of())
    first_of = {}
    for factors, batch in losses.calls:
        first_of.setdefault(factors, batch)
    order = list(first_of.values())
    assert order[0] == 0
    assert set(order[1:]) == {HARDNESS.index(max(HARDNESS))}
    assert evolution.num_terminated > 0


class GivenLosses:
    """The same losses for all factors, one sample a batch."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.num_batches = self.num_samples = len(losses)

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        return [self.losses[batch]]


@pytest.mark.parametrize(
    ("losses", "bound", "loss_sum", "is_complete", "num_computed"),
    [
        # Equal to the bound may still be kept, by its tie-break.
        ([1.0, 2.0, 3.0, 0.0], 6.0, 6.0, True, 4),
        ([1.0, 2.0, 6.5, 0.25], 10.0, 9.75, True, 4),
        ([1.0, 2.0, 3.0, 4.0], 5.5, 6.0, False, 3),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 1.0, False, 1),
        ([1.0, math.nan, 3.0, 4.0], math.inf, math.inf, True, 2),  # no further sample can mend it
        ([1.0, 2.0, 3.0, math.inf], math.inf, math.inf, True, 4),
    ],
)
def test_where_an_evaluation_stops(
    tmp_path: Path,
    losses: list[float],
    bound: float,
    loss_sum: float,
    is_complete: bool,
    num_computed: int,
) -> None:
    with Journal(tmp_path, HEADER) as journal:
        evaluator = Evaluator(GivenLosses(losses), journal, num_scored_tokens=4)
        score = evaluator.evaluate(_factors((16.0,) * 16), lambda: bound)
    found = (score.loss_sum, score.is_complete, score.num_losses)
    assert found == (loss_sum, is_complete, num_computed)
    assert num_known(tmp_path) == num_computed


def test_a_bound_that_falls_meanwhile_stops_an_evaluation(tmp_path: Path) -> None:
    bounds = iter([math.inf, 5.0, 1.5])
    with Journal(tmp_path, HEADER) as journal:
        evaluator = Evaluator(GivenLosses([1.0, 1.0, 1.0, 1.0]), journal, num_scored_tokens=4)
        score = evaluator.evaluate(_factors((16.0,) * 16), lambda: next(bounds))
    assert score == Score(2.0, False, 2, {0: 1.0, 1: 1.0})
    assert Score.from_numbers(score.to_numbers()) == score


def test_a_race_is_lost_behind_the_margin_only() -> None:
    race = Race.against({0: 1.0, 1: 4.0, 2: 2.0}, margin=0.1, least_batches=2)
    assert race.order == (1, 2, 0)
    assert race.limits == pytest.approx((math.inf, 6.6, 7.7))
    assert not race.is_lost({})
    assert not race.is_lost({1: 100.0})  # too early
    assert not race.is_lost({1: 4.0, 2: 2.6})
    assert race.is_lost({1: 4.0, 2: 2.7})
    assert not race.is_lost({1: 4.0, 0: 9.0})  # not the first two
    assert race.is_lost({1: 4.0, 2: 2.0, 0: 1.8})


@pytest.mark.parametrize("batch_size", [1, 2])
def test_racing_is_cheaper_and_resumes_like_the_exact_search(
    tmp_path: Path, batch_size: int
) -> None:
    exact, _, exact_losses = search(tmp_path / "exact", config_of(batch_size=batch_size))
    config = config_of(
        pruning=Pruning.racing, racing_samples=1, racing_margin=0.0, batch_size=batch_size
    )
    raced, _, raced_losses = search(tmp_path / "raced", config)
    assert raced_losses.num_computed < exact_losses.num_computed
    # Here every sample ranks candidates alike, so even the strictest race gives up none that would
    # have been kept.
    assert outcome(raced) == outcome(exact)
    _, _, first = search(tmp_path / "cut", config, stop_after=40)
    resumed, _, second = search(tmp_path / "cut", config)
    assert resumed.rounds == raced.rounds
    assert first.num_computed + second.num_computed == raced_losses.num_computed


def test_sums_do_not_depend_on_the_order(tmp_path: Path) -> None:
    losses = [0.1, 1e16, 0.2, 0.3]  # added one by one, the small ones would be lost in some orders
    with Journal(tmp_path, HEADER) as journal:
        evaluator = Evaluator(GivenLosses(losses), journal, num_scored_tokens=4)
        first = evaluator.evaluate(_factors((16.0,) * 16)).loss_sum
        second = evaluator.evaluate(_factors((17.0,) * 16)).loss_sum  # the hardest first, by now
    assert first == second == math.fsum(losses)


def test_kept_candidates_are_the_best_of_all_by_brute_force(tmp_path: Path) -> None:
    evolution, _, losses = search(tmp_path, config_of())
    candidates = dict.fromkeys(factors for factors, _ in losses.calls)
    sums = sorted(
        sum(losses(_factors(factors), batch)[0] for batch in range(NUM_SAMPLES))
        for factors in candidates
    )
    assert [ranked.loss_sum for ranked in evolution.kept] == pytest.approx(sums[:8], rel=1e-12)


def test_completed_candidates_are_those_kept_after_any_round(tmp_path: Path) -> None:
    """With their losses by batch, the same with and without early termination."""
    full, _, _ = search(tmp_path / "full", config_of(pruning=Pruning.none))
    short, _, losses = search(tmp_path / "short", config_of())
    assert full.completed == short.completed
    assert {ranked.candidate for ranked in short.kept} < short.completed.keys()
    for candidate, by_batch in short.completed.items():
        wanted = [losses(short.space.to_factors(candidate), batch)[0] for batch in range(4)]
        assert [by_batch[batch] for batch in range(4)] == wanted


@pytest.mark.parametrize(
    ("losses_NS", "critical_N", "shares"),
    [
        # Drawn twice from samples 0 and 1: the first wins only with sample 0 twice.
        ([[0.0, 3.0], [1.0, 1.0]], [5, 6], {5: 0.25, 6: 0.75}),
        # Equal sums: the first candidate.
        ([[1.0, 1.0], [1.0, 1.0]], [9, 8], {9: 1.0}),
        # One sample: every resample is that sample.
        ([[2.0], [1.0], [3.0]], [7, 8, 9], {8: 1.0}),
        ([[1.0, 5.0], [2.0, 2.0], [5.0, 1.0]], [3, 4, 3], {3: 0.5, 4: 0.5}),
        ([[math.inf, 0.0], [1.0, 1.0]], [3, 4], {3: 0.25, 4: 0.75}),
    ],
)
def test_shares_of_critical_indices_in_closed_form(
    losses_NS: list[list[float]], critical_N: list[int], shares: dict[int, float]
) -> None:
    found = critical_index_shares(losses_NS, critical_N, 4000, seed=1)
    assert list(found) == sorted(shares)
    assert found == pytest.approx(shares, abs=0.03)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert critical_index_shares(losses_NS, critical_N, 4000, seed=1) == found


def test_shares_of_critical_indices_by_brute_force() -> None:
    """Against all 4^4 resamples of four samples."""
    rng = random.Random(3)
    losses_NS = [[rng.gauss(1.0, 0.3) for _ in range(4)] for _ in range(6)]
    critical_N, wins = [3, 3, 4, 4, 5, 5], dict.fromkeys((3, 4, 5), 0)
    for drawn in itertools.product(range(4), repeat=4):
        sums = [math.fsum(losses[sample] for sample in drawn) for losses in losses_NS]
        wins[critical_N[sums.index(min(sums))]] += 1
    wanted = {index: count / 256 for index, count in wins.items() if count}
    found = critical_index_shares(losses_NS, critical_N, 8000, seed=0)
    assert found == pytest.approx(wanted, abs=0.025)


def _factors(values: tuple[float, ...]) -> RescaleFactors:
    return RescaleFactors(factors=values, geometry=GEOMETRY, target_len=2048, method="test")


@pytest.mark.parametrize("stop_after", [1, 17, 24, 25, 60])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_resume_repeats_nothing_and_ends_the_same(
    tmp_path: Path, stop_after: int, batch_size: int
) -> None:
    config = config_of(batch_size=batch_size)
    whole, _, whole_losses = search(tmp_path / "whole", config)
    _, _, first = search(tmp_path / "cut", config, stop_after=stop_after)
    resumed, _, second = search(tmp_path / "cut", config)
    assert outcome(resumed) == outcome(whole)
    assert resumed.rounds == whole.rounds
    assert first.num_computed + second.num_computed == whole_losses.num_computed
    again, _, third = search(tmp_path / "cut", config)
    assert third.num_computed == 0
    assert num_known(tmp_path / "cut") == whole_losses.num_computed
    assert again.rounds == whole.rounds


def test_a_journal_cut_anywhere_is_resumed(tmp_path: Path) -> None:
    whole, _, _ = search(tmp_path / "whole", config_of(iterations=2))
    written = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    for cut in (0, 5, len(written) // 3, len(written) // 2, len(written) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(written[:cut])
        resumed, _, _ = search(folder, config_of(iterations=2))
        assert resumed.rounds == whole.rounds
        assert (folder / "journal.jsonl").read_bytes() == written


def test_no_candidate_is_evaluated_twice(tmp_path: Path) -> None:
    evolution, _, losses = search(tmp_path, config_of())
    assert len(losses.calls) == len(set(losses.calls)) == evolution.num_losses
    assert len({factors for factors, _ in losses.calls}) == evolution.num_candidates


def test_a_wider_search_reuses_the_journal(tmp_path: Path) -> None:
    search(tmp_path, config_of(iterations=3))
    _, _, losses = search(tmp_path, config_of(iterations=6))
    _, _, alone = search(tmp_path / "alone", config_of(iterations=6))
    assert 0 < losses.num_computed < alone.num_computed


def test_nan_counts_as_worst_and_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of()
    space = SearchSpace.from_config(config, GEOMETRY, 2048)
    evolution, _, _ = search(tmp_path, config, PlantedLosses(broken=frozenset({0})))
    assert "gave a loss that is not finite; they count as worst" in caplog.text
    assert all(space.to_factors(ranked.candidate).factors[-1] <= 28 for ranked in evolution.kept)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("losses") == [None] for line in lines)
    assert "NaN" not in "".join(lines)
    assert "Infinity" not in "".join(lines)
    again, _, losses = search(tmp_path, config, PlantedLosses(broken=frozenset({0})))
    assert again.rounds == evolution.rounds
    assert losses.num_computed == 0


def test_no_finite_candidate(tmp_path: Path) -> None:
    config = config_of()
    with Journal(tmp_path, HEADER) as journal:
        evaluator = Evaluator(GivenLosses([math.inf]), journal, num_scored_tokens=NUM_SAMPLES)
        evolution = Evolution(SearchSpace.from_config(config, GEOMETRY, 2048), config, evaluator, 0)
        with pytest.raises(FactorsError, match="none of 24 candidates gave a finite loss"):
            list(evolution.steps())


def test_journal_is_on_disk_after_every_batch(tmp_path: Path) -> None:
    with Journal(tmp_path, HEADER) as journal:
        journal.add(_factors((16.0,) * 16), 3, [1.5, 2.5])
        last = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["batch"], last["losses"]) == (3, [1.5, 2.5])


def test_losses_are_known_by_all_that_shapes_the_long_window(tmp_path: Path) -> None:
    factors = _factors((16.0,) * 16)
    with Journal(tmp_path, HEADER) as journal:
        journal.add(factors, 0, [1.5])
        assert journal.losses(replace(factors, method="other", provenance={"a": "b"})) == {0: [1.5]}
        assert journal.losses(replace(factors, long_attention_scale=1.1)) == {}
        assert journal.losses(_factors((16.0,) * 15 + (16.01,))) == {}


def test_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    search(tmp_path, config_of(iterations=0))
    text = "belongs to another search: samples was None, now it is other; use another run.name, or "
    with pytest.raises(ArtifactError, match=text):
        Journal(tmp_path, {**HEADER, "samples": "other"})


def test_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"search_journal": 1}\n')
    with pytest.raises(
        ArtifactError, match="has version 1, this program reads 2; use another run.name, or remove"
    ):
        Journal(tmp_path, HEADER)


def test_workers_read_each_others_journals(tmp_path: Path) -> None:
    factors = _factors((16.0,) * 16)
    with Journal(tmp_path, HEADER) as first, Journal(tmp_path, HEADER, worker=2) as second:
        first.add(factors, 0, [1.0])
        second.add(factors, 1, [2.0])
        second.add(factors, 0, [1.0])  # both may have computed the same before a crash
    with (tmp_path / "journal.2.jsonl").open("ab") as torn:
        torn.write(b'{"factors": "abc"')
    with Journal(tmp_path, HEADER) as journal:
        assert journal.losses(factors) == {0: [1.0], 1: [2.0]}
        assert journal.num_losses == 2
    # Another worker's file.
    assert (tmp_path / "journal.2.jsonl").read_bytes().endswith(b'{"factors": "abc"')
    with Journal(tmp_path, HEADER, worker=2):
        assert (tmp_path / "journal.2.jsonl").read_bytes().endswith(b'"}\n')


def test_a_journal_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    with Journal(tmp_path, HEADER, worker=1, writes=False) as journal:
        journal.add(_factors((16.0,) * 16), 0, [1.0])
        assert journal.num_losses == 1
    assert not list(tmp_path.iterdir())


def test_journal_in_use_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, HEADER):
        text = "is in use by another search; wait for it, or end it"
        with pytest.raises(ArtifactError, match=text):
            Journal(tmp_path, HEADER)
    Journal(tmp_path, HEADER).__exit__()


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, b"{}\n"),
        (1, b"[1]\n"),
        (3, b"not json\n"),
        (3, b'{"factors": "abc"}\n'),
        (3, b'{"factors": "abc", "losses": [1.0]}\n'),
        (3, b'{"factors": "abc", "batch": 0, "losses": ["x"]}\n'),
    ],
)
def test_damaged_journal_is_refused(tmp_path: Path, number: int, line: bytes) -> None:
    search(tmp_path, config_of(iterations=0))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line
    path.write_bytes(b"".join(lines))
    text = f"is damaged at line {number}; remove that line and all after it"
    with pytest.raises(ArtifactError, match=text):
        Journal(tmp_path, HEADER)
    assert path.read_bytes() == b"".join(lines)
