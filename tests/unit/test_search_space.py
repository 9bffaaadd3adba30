"""The search space and its random moves: invariants, determinism, and every error text."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors, first_out_of_bound
from longrope2.search.config import Algorithm, SearchConfig, SearchedDims, search_faults
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


def test_mutation_keeps_unchanged_factors_and_changes_the_asked_share() -> None:
    space = space_of()
    parent = Candidate(2, tuple(range(1600, 3000, 100)))
    changed = [0] * 14
    for number in range(2000):
        child = mutate(space, parent, 0.3, random.Random(number))
        for place, (before, after) in enumerate(zip(parent.steps, child.steps, strict=True)):
            changed[place] += before != after
    assert all(share / 2000 == pytest.approx(0.3, abs=0.05) for share in changed)


def test_mutation_reaches_both_ends_of_every_range() -> None:
    space = space_of(SearchConfig(grid=1.0))
    children_seen = {
        mutate(space, Candidate(6, (24,) * 10), 1.0, random.Random(n)).steps for n in range(4000)
    }
    assert {steps[0] for steps in children_seen} >= {16, 20}
    assert {steps[-1] for steps in children_seen} >= {28, 32}


def test_a_factor_moves_freely_between_its_unchanged_neighbours() -> None:
    parent = Candidate(6, (16, 18, 21, 24, 24, 24, 26, 28, 30, 32))
    space = space_of(SearchConfig(grid=1.0))
    drawn = set()
    for number in range(4000):
        steps = mutate(space, parent, 0.1, random.Random(number)).steps
        if steps[:2] == parent.steps[:2] and steps[3:] == parent.steps[3:]:
            drawn.add(steps[2])
    assert drawn == {18, 19, 20, 21, 22, 23, 24}


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
        (SearchConfig(batch_size=0), "search.batch_size=0: must be at least 1"),
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
        (SearchConfig(crossovers=-1), "search.crossovers=-1: must be at least 0"),
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
        (SearchConfig(racing_samples=0), "search.racing_samples=0: must be at least 1"),
        (SearchConfig(racing_margin=-0.1), "search.racing_margin=-0.1: must be at least 0"),
        (SearchConfig(projected_gpus=0), "search.projected_gpus=0: must be at least 1"),
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
            SearchConfig(max_needle_ppl_at_original=1.0),
            "search.max_needle_ppl_at_original=1.0: must be above 1",
        ),
    ],
)
def test_setting_faults(config: SearchConfig, text: str) -> None:
    faults = search_faults(config)
    assert any(re.match(text, fault) for fault in faults), faults
    assert search_faults(SearchConfig()) == []
