"""The search space and its random moves: invariants, determinism, and every error text."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors, first_out_of_bound
from longrope2.search.config import Algorithm, Objective, SearchConfig, SearchedDims, search_faults
from longrope2.search.evolution import children, cross, first_population, moved, mutate
from longrope2.search.space import Candidate, SearchSpace

TINY = RopeGeometry(32, 1e4, 128)
PHI3 = RopeGeometry(96, 1e4, 2048)
TARGET_LEN = 2048


def space_of(
    config: SearchConfig | None = None, geometry: RopeGeometry = TINY, target_len: int = TARGET_LEN
) -> SearchSpace:
    return SearchSpace.from_config(config or SearchConfig(), geometry, target_len)


def assert_in_space(space: SearchSpace, candidate: Candidate) -> None:
    """The rules, checked on the rescale factors themselves."""
    factors = space.to_factors(candidate)
    values, scale, c = factors.factors, factors.scale, candidate.critical_index
    assert len(values) == space.geometry.num_frequencies
    assert c in space.critical_indices
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert first_out_of_bound(factors, c) is None
    assert values[-1] <= 2 * scale
    first = c if space.dims is SearchedDims.tail else 0
    assert all(
        round(value * 100) == pytest.approx(value * 100, abs=1e-9) for value in values[first:]
    )
    if space.dims is SearchedDims.tail:
        assert values[:c] == pytest.approx([values[c] ** (i / c) for i in range(c)], rel=1e-12)
    else:
        assert values[0] >= 1


@pytest.mark.parametrize(
    ("geometry", "target_len", "indices"),
    [
        (TINY, 2048, (2, 3, 4, 5, 6)),
        (PHI3, 131072, tuple(range(19, 32))),
        (RopeGeometry(128, 5e5, 8192), 131072, tuple(range(24, 36))),
        # Theoretically every dimension is trained.
        (RopeGeometry(128, 1e4, 65536), 131072, tuple(range(49, 64))),
    ],
)
def test_critical_indices(
    geometry: RopeGeometry, target_len: int, indices: tuple[int, ...]
) -> None:
    assert space_of(geometry=geometry, target_len=target_len).critical_indices == indices


def test_fixed_critical_index() -> None:
    assert space_of(SearchConfig(critical=9)).critical_indices == (9,)


def test_factors_of_a_candidate() -> None:
    steps = (1700, 1700, 1999, 2000, 2100, 2200, 2300, 2400, 2500, 2600, 2700, 3200)
    factors = space_of().to_factors(Candidate(4, steps), note="x")
    assert factors.factors[4:] == (
        17.0,
        17.0,
        19.99,
        20.0,
        21.0,
        22.0,
        23.0,
        24.0,
        25.0,
        26.0,
        27.0,
        32.0,
    )
    assert factors.factors[:4] == pytest.approx((1.0, 17**0.25, 17**0.5, 17**0.75), rel=1e-12)
    assert (factors.critical_index, factors.method, factors.provenance) == (
        4,
        "longrope2",
        {"note": "x"},
    )
    assert (factors.short_attention_scale, factors.long_attention_scale, factors.short_factors) == (
        1.0,
        1.0,
        None,
    )


def test_scale_off_the_grid_is_rounded_inwards() -> None:
    space = space_of(SearchConfig(grid=0.1), RopeGeometry(32, 1e4, 300), 1000)
    assert (space.lowest_step, space.highest_step) == (34, 66)


@pytest.mark.parametrize("dims", list(SearchedDims))
@pytest.mark.parametrize("critical", [None, 3])
def test_first_population_and_children_stay_in_space(
    dims: SearchedDims, critical: int | None
) -> None:
    space = space_of(SearchConfig(dims=dims, critical=critical))
    population = first_population(space, 64, 0.3, seed=1)
    assert len(set(population)) == 64
    assert {candidate.critical_index for candidate in population} == set(space.critical_indices)
    fresh = children(space, population, SearchConfig(), seed=1, iteration=1, seen=set(population))
    assert len(set(fresh)) == len(fresh) == 64
    assert not set(fresh) & set(population)
    for candidate in (*population, *fresh):
        assert_in_space(space, candidate)
        assert space.contains(candidate)


def test_first_lap_of_the_population_is_algorithm_1() -> None:
    space = space_of()
    seed_candidate, *lap = first_population(space, 6, 0.3, seed=5)
    assert seed_candidate == Candidate(
        6, (1600,) * 10
    )  # PI, YaRN and Llama 3 agree from the theoretical index up
    assert [candidate.critical_index for candidate in lap] == [2, 3, 4, 5, 6]
    assert all(len(set(candidate.steps)) == 1 for candidate in lap)
    assert len({candidate.steps[0] for candidate in lap}) == 5


def test_draws_depend_on_seed_round_and_parent_only() -> None:
    space = space_of()
    population = first_population(space, 20, 0.3, seed=1)
    assert first_population(space, 20, 0.3, seed=1) == population
    assert first_population(space, 12, 0.3, seed=1) == population[:12]
    assert first_population(space, 20, 0.3, seed=2) != population
    fresh = children(space, population[:4], SearchConfig(), seed=1, iteration=3, seen=set())
    assert (
        children(space, population[:2], SearchConfig(), seed=1, iteration=3, seen=set())
        == fresh[:2]
    )
    assert children(space, population[:4], SearchConfig(), seed=1, iteration=4, seen=set()) != fresh


def test_children_avoid_what_was_seen() -> None:
    space = space_of()
    parent = first_population(space, 3, 0.3, seed=0)[-1]
    first = children(space, [parent], SearchConfig(), seed=0, iteration=1, seen=set())
    second = children(space, [parent], SearchConfig(), seed=0, iteration=1, seen=set(first))
    assert len(second) == 1
    assert second != first


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_factors", [10, 31])
def test_a_mutation_changes_the_asked_share_of_flat_factors(share: float, num_factors: int) -> None:
    """Of 4,000 draws; the standard error is at most 0.5 / sqrt(4,000) = 0.008."""
    space = space_of(geometry=RopeGeometry(2 * (num_factors + 6), 1e4, 128))
    critical_index = space.critical_indices[-1]
    length = space.geometry.num_frequencies - critical_index
    parent = Candidate(critical_index, (2400,) * length)
    changed = 0
    for number in range(4000):
        child = mutate(space, parent, share, random.Random(number))
        assert child != parent
        assert space.contains(child)
        changed += sum(a != b for a, b in zip(child.steps, parent.steps, strict=True))
    assert changed / 4000 / length == pytest.approx(share, abs=0.02)


def test_at_least_one_factor_changes() -> None:
    parent = Candidate(6, (2400,) * 10)
    for number in range(100):
        child = mutate(space_of(), parent, 0.001, random.Random(number))
        assert sum(a != b for a, b in zip(child.steps, parent.steps, strict=True)) == 1


@pytest.mark.parametrize(
    "parent",
    [
        Candidate(6, (1600,) * 10),  # nothing can be lowered
        Candidate(6, (3200,) * 10),  # nothing can be raised
        Candidate(6, (1600,) * 5 + (3200,) * 5),
        Candidate(2, tuple(range(1600, 3000, 100))),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_mutation_changes_something_within_the_space(parent: Candidate, share: float) -> None:
    space = space_of()
    for number in range(500):
        child = mutate(space, parent, share, random.Random(number))
        assert child != parent
        assert space.contains(child)


def test_where_nothing_can_change_the_parent_comes_back() -> None:
    space = space_of(SearchConfig(highest_ratio=1.0))
    parent = Candidate(6, (1600,) * 10)
    assert mutate(space, parent, 0.3, random.Random(0)) == parent
    assert children(space, [parent], SearchConfig(), seed=0, iteration=1, seen=set()) == []


def test_a_mutation_can_raise_and_lower_every_factor_of_a_flat_parent() -> None:
    """What the drawing between unchanged neighbours could not: raise the first, move inner ones."""
    parent = Candidate(6, (2400,) * 10)
    raised, lowered = [0] * 10, [0] * 10
    for number in range(4000):
        child = mutate(space_of(), parent, 0.3, random.Random(number))
        for place, (before, after) in enumerate(zip(parent.steps, child.steps, strict=True)):
            raised[place] += after > before
            lowered[place] += after < before
    assert min(raised[0], lowered[-1]) > 40
    assert raised == sorted(raised)
    assert lowered == sorted(lowered, reverse=True)
    assert [(a + b) / 4000 for a, b in zip(raised, lowered, strict=True)] == pytest.approx(
        [(a + b) / 4000 for a, b in zip(raised[::-1], lowered[::-1], strict=True)], abs=0.05
    )  # neither end is favoured


def test_a_mutation_reaches_both_ends_of_the_range() -> None:
    space = space_of(SearchConfig(grid=1.0))
    drawn = {mutate(space, Candidate(6, (24,) * 10), 1.0, random.Random(n)) for n in range(4000)}
    assert {child.steps for child in drawn} == {(level,) * 10 for level in range(16, 33)} - {
        (24,) * 10
    }


def test_a_run_is_multiplied_and_the_rest_stays_or_moves_along() -> None:
    """Of a steep parent: children are what brute force makes of a run, a ratio and one rule."""
    parent = Candidate(6, (16, 18, 21, 24, 24, 24, 26, 28, 30, 32))
    space = space_of(SearchConfig(grid=1.0))
    # Where a product is rounded otherwise, and just beyond: all ratios between give the same.
    edges = {(n + 0.5) / step for step in parent.steps for n in range(step // 2, 2 * step)}
    allowed = set()
    for start, stop in itertools.combinations(range(11), 2):
        for ratio in (edge + 1e-9 for edge in edges):
            allowed |= _multiplied(parent.steps, start, stop, ratio)
    seen = {mutate(space, parent, 0.3, random.Random(n)).steps for n in range(2000)}
    assert seen <= allowed
    assert len(seen) > 100


def _multiplied(
    steps: tuple[int, ...], start: int, stop: int, ratio: float
) -> set[tuple[int, ...]]:
    """Pushing and yielding results of multiplying steps[start:stop] in [16, 32]."""
    way = 1 if ratio > 1 else -1
    moved_run = [
        step + way if round(step * ratio) == step else round(step * ratio) for step in steps
    ]
    results = set()
    for low, high in ((16, 32), ((*steps, 32)[start - 1] if start else 16, (*steps, 32)[stop])):
        run = [min(max(step, low), high) for step in moved_run[start:stop]]
        whole = [*steps[:start], *run, *steps[stop:]]
        if way > 0:
            results.add(tuple(itertools.accumulate(whole, max)))
        else:
            results.add(tuple(itertools.accumulate(whole[::-1], min))[::-1])
    return results


def test_attention_scale_of_a_candidate() -> None:
    space = space_of(SearchConfig(highest_attention_scale=1.29))
    assert space.highest_scale_step == 129
    assert space.to_factors(Candidate(6, (1600,) * 10, 129)).long_attention_scale == 1.29
    assert space.to_factors(Candidate(6, (1600,) * 10)).long_attention_scale == 1.0
    assert space.contains(Candidate(6, (1600,) * 10, 129))
    assert not space.contains(Candidate(6, (1600,) * 10, 130))
    assert not space.contains(Candidate(6, (1600,) * 10, 99))
    every = (SearchConfig(highest_attention_scale=1 + n / 100) for n in range(101))
    assert [space_of(config).highest_scale_step for config in every] == list(range(100, 201))


def test_attention_scales_are_drawn_and_mutated_in_their_range() -> None:
    config = SearchConfig(highest_attention_scale=1.3)
    space = space_of(config)
    population = first_population(space, 64, 0.3, seed=0)
    yarn = closed_form_factors(RopeMethod.yarn, TINY, TARGET_LEN).long_attention_scale
    scales = {candidate.scale_step for candidate in population}
    assert scales >= {100, round(100 * yarn)}  # those of PI and YaRN
    assert len(scales) > 20
    assert min(scales) == 100
    assert max(scales) <= 130
    fresh = children(space, population, config, seed=0, iteration=1, seen=set(population))
    assert all(space.contains(child) for child in fresh)
    parent = Candidate(6, tuple(range(1600, 2600, 100)), 130)
    mutated = [mutate(space, parent, 0.3, random.Random(n)) for n in range(4000)]
    rescaled = [child for child in mutated if child.scale_step != 130]
    assert len(rescaled) / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(child.steps == parent.steps for child in rescaled)
    assert {child.scale_step for child in rescaled} >= set(range(110, 130))
    assert parent not in mutated
    middle = replace(parent, scale_step=115)
    again = {mutate(space, middle, 0.3, random.Random(n)).scale_step for n in range(4000)}
    assert again == set(range(100, 131))
    assert moved(space, middle, -1).scale_step == 115


def test_a_fixed_attention_scale_stays() -> None:
    space = space_of()
    population = first_population(space, 64, 0.3, seed=0)
    fresh = children(space, population, SearchConfig(), seed=0, iteration=1, seen=set())
    assert {candidate.scale_step for candidate in (*population, *fresh)} == {100}


def test_crossover_takes_the_attention_scale_of_one_parent() -> None:
    first, second = Candidate(6, (16, 16), 100), Candidate(6, (16, 16), 120)
    crossed = {cross(first, second, random.Random(n)).scale_step for n in range(50)}
    assert crossed == {100, 120}


def test_further_laps_of_the_population_are_straight_lines() -> None:
    space = space_of()
    lines = first_population(space, 21, 0.3, seed=5)[6:]
    assert [candidate.critical_index for candidate in lines] == [2, 3, 4, 5, 6] * 3
    for candidate in lines:
        steps = candidate.steps
        rise = (steps[-1] - steps[0]) / (len(steps) - 1)
        wanted = [steps[0] + rise * place for place in range(len(steps))]
        assert steps == pytest.approx(wanted, abs=0.5)
    assert sum(len(set(candidate.steps)) > 2 for candidate in lines) >= 14


def test_line_is_exact_at_both_ends_and_scaled_below() -> None:
    candidate = space_of().line(6, 1600, 2500)
    assert candidate.steps == tuple(range(1600, 2501, 100))
    free = space_of(SearchConfig(dims=SearchedDims.all)).line(4, 1600, 2700, scale_step=100)
    assert free.steps == (100, 200, 400, 800, *range(1600, 2701, 100))


def test_an_exhausted_parent_gives_no_child() -> None:
    space = replace(space_of(SearchConfig(grid=1.0)), target_len=128)  # s = 1: factors 1 or 2
    parent = Candidate(6, (1,) * 10)
    every = {Candidate(6, (1,) * n + (2,) * (10 - n)) for n in range(11)}
    assert children(space, [parent], SearchConfig(), seed=0, iteration=0, seen=every) == []


def test_a_moved_critical_index_keeps_the_other_factors() -> None:
    space = space_of()
    parent = Candidate(4, tuple(range(1600, 2800, 100)))
    assert moved(space, parent, 1) == Candidate(5, tuple(range(1700, 2800, 100)))
    assert moved(space, parent, -1) == Candidate(3, (1600, *range(1600, 2800, 100)))
    assert moved(space, Candidate(6, (1600,) * 10), 1) == Candidate(
        6, (1600,) * 10
    )  # the end of the range
    free = space_of(SearchConfig(dims=SearchedDims.all))
    below = Candidate(4, (100, 100, 200, 400, *range(1600, 2800, 100)))
    assert moved(free, below, -1) == Candidate(3, (100, 100, 200, 1600, *range(1600, 2800, 100)))
    assert moved(free, below, 1) == Candidate(5, below.steps)


def test_the_critical_index_moves_as_often_as_asked() -> None:
    space = space_of()
    parents = [Candidate(4, tuple(range(1600 + n, 2800 + n, 100))) for n in range(400)]
    still = children(space, parents, SearchConfig(), seed=0, iteration=1, seen=set())
    assert {child.critical_index for child in still} == {4}
    config = SearchConfig(critical_move_probability=0.5)
    moving = children(space, parents, config, seed=0, iteration=1, seen=set())
    shares = [sum(child.critical_index == c for child in moving) / 400 for c in (3, 4, 5)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    assert all(space.contains(child) for child in moving)


def test_crossover_takes_every_factor_from_one_of_both_parents() -> None:
    first, second = Candidate(6, (16, 16, 18, 20, 22)), Candidate(6, (16, 19, 19, 21, 30))
    crossed = {cross(first, second, random.Random(n)).steps for n in range(500)}
    expected = set()
    for steps in itertools.product(*zip(first.steps, second.steps, strict=True)):
        expected.add(tuple(itertools.accumulate(steps, max)))
    assert crossed == expected


def test_crossovers_join_only_parents_of_one_critical_index() -> None:
    space = space_of()
    a, b = Candidate(5, tuple(range(1600, 2700, 100))), Candidate(5, tuple(range(1650, 2750, 100)))
    alone = Candidate(4, (1600,) * 12)
    config = SearchConfig(mutations=3, crossovers=5)
    fresh = children(space, [a, alone, b], config, seed=0, iteration=1, seen={a, b, alone})
    assert len(fresh) == 8
    mixed = [
        child
        for child in fresh
        if all(s in (x, y) for s, x, y in zip(child.steps, a.steps, b.steps, strict=False))
    ]
    assert len(mixed) == 5
    assert {child.critical_index for child in mixed} == {5}
    only = children(space, [a, alone], config, seed=0, iteration=1, seen=set())
    assert len(only) == 3  # nothing to cross
    assert [child.critical_index for child in only] == [5, 4, 5]  # parents in turn


def test_first_generation_space_has_no_bound_and_no_critical_index() -> None:
    config = SearchConfig(algorithm=Algorithm.longrope, dims=SearchedDims.all, highest_ratio=1.25)
    space = space_of(config)
    assert not space.is_bounded
    assert (space.highest_step, space.least_step(15, space.critical_indices[0])) == (2000, 100)
    population = first_population(space, 64, 0.3, seed=0)
    assert all(space.contains(candidate) for candidate in population)
    seeds = [space.to_factors(candidate).factors for candidate in space.closed_form_seeds()]
    for method in (RopeMethod.pi, RopeMethod.yarn, RopeMethod.ntk_aware):
        wanted = closed_form_factors(method, TINY, 2048).factors
        assert any(found == pytest.approx(wanted, abs=0.0051) for found in seeds)
    assert space.to_factors(population[-1]).critical_index is None
    assert any(candidate.steps[-1] < 1600 for candidate in population)  # what LongRoPE2 forbids


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(7, (1600,) * 9),  # critical index not allowed
        Candidate(6, (1600,) * 9),  # too few
        Candidate(6, (1599,) + (1600,) * 9),  # below s
        Candidate(6, (1600,) * 9 + (3201,)),  # above 2s
        Candidate(6, (1700,) + (1600,) * 9),  # decreasing
    ],
)
def test_what_the_space_does_not_contain(candidate: Candidate) -> None:
    assert not space_of().contains(candidate)


def test_space_errors() -> None:
    with pytest.raises(
        FactorsError, match="search.critical=16: must be null or a cosine index, 0 .. 15"
    ):
        space_of(SearchConfig(critical=16))
    with pytest.raises(
        FactorsError,
        match="every dimension turns ten times or more in original_len=8192: no critical",
    ):
        space_of(geometry=RopeGeometry(8, 10.0, 8192), target_len=16384)
    small = replace(space_of(SearchConfig(grid=1.0, critical=6)), target_len=128)
    with pytest.raises(
        FactorsError,
        match=r"search.population=64: the space holds too few distinct candidates \(11 f",
    ):
        first_population(small, 64, 0.3, seed=0)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (SearchConfig(population=0, parents=0), "search.population=0: must be at least 1"),
        (SearchConfig(iterations=-1), "search.iterations=-1: must be at least 0"),
        (SearchConfig(parents=0), "search.parents=0: must be at least 1"),
        (SearchConfig(num_samples=0), "search.num_samples=0: must be at least 1"),
        (SearchConfig(fresh_samples=2), "search.fresh_samples=2: must be 0, or even"),
        (SearchConfig(fresh_samples=9), "search.fresh_samples=9: must be 0, or even"),
        (SearchConfig(confidence=0.5), "search.confidence=0.5: must be above 0.5 and below 1"),
        (SearchConfig(confidence=0.9), "search.confidence=0.9: search.algorithm=longrope2"),
        (SearchConfig(lengths=[0.5]), r"search.lengths=\[0.5\]: 1 must be among them, none twice"),
        (SearchConfig(lengths=[1.0, 2.0]), "search.lengths=.*: give one or more shares"),
        (SearchConfig(algorithm=Algorithm.halving, grid=0.1), "search.grid=0.1: search.alg"),
        (
            SearchConfig(algorithm=Algorithm.halving, critical=3),
            "search.critical and search.dims=all",
        ),
        (
            SearchConfig(objective=Objective.perplexity, clip_losses=True),
            "search.clip_losses=true: .*; set search.clip_losses=false or search.objective=needle",
        ),
        (SearchConfig(batch_size=0), "search.batch_size=0: must be null"),
        (SearchConfig(parents=65), "search.parents=65: must be at most search.population=64"),
        (
            SearchConfig(mutation_probability=0.0),
            "search.mutation_probability=0.0: must be above 0 and at most 1",
        ),
        (
            SearchConfig(grid=0.03),
            "search.grid=0.03: 1 / grid must be a whole number, e.g. 0.01 or 0.1",
        ),
        (SearchConfig(depths=[]), r"search.depths=\[\]: give one or more numbers from 0 to 1"),
        (SearchConfig(depths=[0.0, 1.5]), "search.depths="),
        (
            SearchConfig(mutations=-1),
            r"search.mutations=-1: must be null \(one per parent\) or at least 0",
        ),
        (
            SearchConfig(crossovers=-1),
            r"search.crossovers=-1: must be null \(an eighth of parents\) or at least 0",
        ),
        (
            SearchConfig(mutations=0),
            "search.mutations=0 and search.crossovers=0: a round would give no new candidate",
        ),
        (
            SearchConfig(critical_move_probability=1.5),
            "search.critical_move_probability=1.5: must be from 0 to 1",
        ),
        (SearchConfig(highest_ratio=0.5), "search.highest_ratio=0.5: must be at least 1"),
        (
            SearchConfig(num_keys=0),
            r"search.num_keys=0: must be null \(a key for every sample\) or at least 1",
        ),
        (SearchConfig(needles_per_haystack=0), "search.needles_per_haystack=0: must be at least 1"),
        (
            SearchConfig(needles_per_haystack=4, objective=Objective.perplexity),
            "search.needles_per_haystack=4: search.objective=perplexity hides none; leave it 1",
        ),
        (
            SearchConfig(needles_per_haystack=4, num_keys=3),
            "search.needles_per_haystack=4: needs as many keys, search.num_keys is 3; set it to "
            "null or raise it",
        ),
        (SearchConfig(racing_samples=0), "search.racing_samples=0: must be at least 1"),
        (SearchConfig(racing_margin=-0.1), "search.racing_margin=-0.1: must be at least 0"),
        (SearchConfig(projected_gpus=0), "search.projected_gpus=0: must be null "),
        (SearchConfig(projected_tflops=0.0), "search.projected_tflops=0.0: must be above 0"),
        (
            SearchConfig(algorithm=Algorithm.longrope),
            "search.dims=tail: search.algorithm=longrope searches all",
        ),
        (
            SearchConfig(algorithm=Algorithm.longrope, dims=SearchedDims.all, critical=3),
            "search.critical and search.critical_move_probability: search.algorithm=longrope has "
            "no critical dimension",
        ),
        (
            SearchConfig(short_window_of="x.json"),
            "search.short_window_of: only LongRoPE rescales the short window",
        ),
        (
            SearchConfig(highest_attention_scale=0.9),
            "search.highest_attention_scale=0.9: must be null",
        ),
        (
            SearchConfig(highest_attention_scale=2.1),
            "search.highest_attention_scale=2.1: must be null",
        ),
        (
            SearchConfig(short_window_of="x.json", highest_attention_scale=1.2),
            "search.highest_attention_scale=1.2: search.short_window_of searches the short window, "
            "which has none; leave it 1",
        ),
        (
            SearchConfig(max_needle_ppl_at_original=1.0),
            "search.max_needle_ppl_at_original=1.0: must be above 1",
        ),
    ],
)
def test_setting_faults(config: SearchConfig, text: str) -> None:
    faults = search_faults(config)
    assert any(re.match(text, fault) for fault in faults), faults
    assert search_faults(SearchConfig()) == []
