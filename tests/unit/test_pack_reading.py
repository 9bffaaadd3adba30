"""How much is read: strata by themselves, as much as the demand asks and little more."""

from itertools import pairwise

import numpy as np
import pytest

from data_prep.config import (
    BucketQuota,
    BucketTokens,
    DomainMix,
    MixtureConfig,
    PackConfig,
    ShortOverlong,
)
from data_prep.reading import FEWEST_BYTES, FIRST_ROUND, Readings
from data_prep.reading_plan import Needed, needed_reading
from data_prep.scan import GROUP_BYTES, StratumScan, divide_units, in_reading_order
from data_prep.token_files import LengthBuckets
from longrope2.corpora.corpus import Unit

LENGTHS = LengthBuckets(("short", "long"), (100, 10_000))
GIB = 2**30
LARGE = [Unit(f"u{n:03d}", "s", GIB) for n in range(200)]
SMALL = [Unit(f"u{n:03d}", "s", GROUP_BYTES) for n in range(200)]
WHOLE = ("s", None)


def readings_for(needed, *, cells, units=LARGE, max_units=None, pooled=ShortOverlong.drop):
    strata = divide_units(units, ["s"], 0)
    scans = {stratum: StratumScan(4.0, cells) for stratum in strata}
    readings = Readings(strata, scans, LENGTHS, pooled, max_units=max_units)
    readings.start({stratum: needed for stratum in strata})
    return readings


SCANNED = {"d": {"short": 200_000.0, "long": 10_000.0}}


def test_quotas_need_what_their_scarcest_bucket_needs():
    config = PackConfig(quotas={"s": BucketQuota(short=20_000, long=2_500)})
    (need,) = needed_reading(config, {WHOLE: SCANNED}, {}).values()
    assert need == Needed(0.25, {"short": 20_000, "long": 2_500})
    config.quotas["s"].long = None
    (need,) = needed_reading(config, {WHOLE: SCANNED}, {}).values()
    assert need.fraction == 1.0 and set(need.wanted.values()) == {float("inf")}
    assert needed_reading(config, {WHOLE: None}, {})[WHOLE].fraction == 1.0
    config.quotas["s"] = BucketQuota(short=0, long=0)
    assert needed_reading(config, {WHOLE: SCANNED}, {})[WHOLE].fraction == 0.0


def test_quotas_take_the_same_share_of_every_stratum():
    config = PackConfig(quotas={"s": BucketQuota(short=30_000, long=0)})
    estimate = {("s", "x"): {"x": {"short": 80_000.0}}, ("s", "y"): {"y": {"short": 20_000.0}}}
    needed = needed_reading(config, estimate, {})
    assert {s: n.fraction for s, n in needed.items()} == pytest.approx(dict.fromkeys(estimate, 0.3))
    assert needed["s", "x"].wanted["short"] == pytest.approx(24_000)


def test_large_strata_are_read_less_than_needed_at_first_and_the_others_thinned():
    readings = readings_for(Needed(0.25, {"short": 20_000, "long": 2_500}), cells=SCANNED)
    reading = readings.strata[WHOLE]
    assert reading.num_units == FIRST_ROUND * 50
    # 30 of 200 units hold 30,000 tokens of short documents.
    assert reading.shares == {"short": pytest.approx(1.25 * 20 / 30), "long": 1.0}
    tasks = readings.tasks()
    assert all(task.is_first for task in tasks) and len(tasks) == 30
    assert tasks[0].bands == {"short": (0.0, pytest.approx(1.25 * 20 / 30)), "long": (0.0, 1.0)}
    assert tasks[0].classes.of(400) == "short" and tasks[0].classes.of(401) == "long"


def test_small_strata_are_read_at_once():
    need = Needed(0.5, {"short": 20_000, "long": 5_000})
    assert readings_for(need, cells=SCANNED, units=SMALL).strata[WHOLE].num_units == 100


def test_some_megabytes_at_least_and_units_of_unknown_size():
    need = Needed(0.01, {"short": 10, "long": 10})
    fewest = FEWEST_BYTES // GROUP_BYTES
    assert readings_for(need, cells=SCANNED, units=SMALL).strata[WHOLE].num_units == fewest
    unknown = [Unit(f"u{n}", "s") for n in range(200)]
    assert readings_for(need, cells=SCANNED, units=unknown).strata[WHOLE].num_units == 32


def test_nothing_needed_reads_nothing():
    assert readings_for(Needed(0.0, {"short": 0, "long": 0}), cells=SCANNED).tasks() == []


def test_windows_cut_from_long_documents_pool_the_supply():
    config = PackConfig(
        quotas={"s": BucketQuota(short=31_500, long=10_500)}, short_overlong=ShortOverlong.split
    )
    needed = needed_reading(config, {WHOLE: SCANNED}, {})[WHOLE]
    assert needed.fraction == pytest.approx(0.2)
    readings = readings_for(needed, cells=SCANNED, units=SMALL, pooled=ShortOverlong.split)
    assert readings.strata[WHOLE].num_units == 64  # by FEWEST_BYTES
    shares = readings.strata[WHOLE].shares
    assert shares["short"] == shares["long"] == pytest.approx(1.25 * 0.2 / 0.32)


def test_later_rounds_read_only_what_is_missing():
    readings = readings_for(Needed(0.25, {"short": 20_000, "long": 2_500}), cells=SCANNED)
    first = readings.tasks()
    # The round found half as many long documents as the scan had said.
    measured = {"d": {"short": 200_000.0, "long": 5_000.0}}
    there = {WHOLE: {"d": {"short": 25_000.0, "long": 750.0}}}
    need = Needed(0.5, {"short": 20_000, "long": 2_500})
    assert readings.extend({WHOLE: need}, {WHOLE: measured}, there)
    assert readings.strata[WHOLE].num_units == 30 + FIRST_ROUND * 70
    # Of 72 units a smaller share is enough than of 30.
    assert readings.strata[WHOLE].shares["short"] == pytest.approx(1.25 * 20 / 72)
    second = readings.tasks()
    assert [t.unit for t in [*first, *second]] == list(
        divide_units(LARGE, ["s"], 0)[WHOLE].groups[:72]
    )
    assert {task.stem for task in first}.isdisjoint(task.stem for task in second)
    # Enough is read now, but not enough of it tokenized.
    there = {WHOLE: {"d": {"short": 10_000.0, "long": 2_600.0}}}
    enough = Needed(0.36, {"short": 20_000, "long": 2_500})
    assert readings.extend({WHOLE: enough}, {WHOLE: measured}, there)
    third = readings.tasks()
    # Both the units that had more tokenized and those that had less.
    assert len(third) == 72 and not any(task.is_first for task in third)
    bands = sorted({task.bands["short"] for task in third})
    share = pytest.approx(2 * 1.25**2 * 20 / 72)
    assert bands == [(pytest.approx(1.25 * 20 / 72), share), (pytest.approx(1.25 * 20 / 30), share)]
    there = {WHOLE: {"d": {"short": 20_000.0, "long": 2_500.0}}}
    assert not readings.extend({WHOLE: enough}, {WHOLE: measured}, there)


def test_the_last_part_is_read_at_once():
    readings = readings_for(Needed(0.25, {"short": 1, "long": 2_500}), cells=SCANNED)
    readings.tasks()
    supply = {WHOLE: {"d": {"short": 9.0, "long": 9.0}}}
    readings.extend({WHOLE: Needed(0.17, {"short": 1, "long": 9})}, {WHOLE: SCANNED}, supply)
    assert readings.strata[WHOLE].num_units == 35  # 34 and a margin


def test_short_quotas_grow_what_is_read_by_what_is_missing():
    readings = readings_for(Needed(0.25, {"short": 20_000, "long": 2_500}), cells=SCANNED)
    assert readings.grow("s", {"short": 1.1})
    assert readings.strata[WHOLE].shares["short"] == 1.0
    assert readings.grow("s", {"long": 1.5}) and readings.strata[WHOLE].num_units == 46
    while readings.grow("s", {"long": 1.5}):
        pass
    assert readings.strata[WHOLE].num_units == 200


def test_never_more_units_than_allowed():
    need = Needed(1.0, {"short": 1, "long": float("inf")})
    readings = readings_for(need, cells=SCANNED, max_units=40)
    assert readings.strata[WHOLE].num_units == 40
    readings.tasks()
    assert not readings.grow("s", {"long": 2.0})
    small = [Unit(f"u{n}", "s", GROUP_BYTES // 32) for n in range(640)]
    assert readings_for(need, cells=SCANNED, units=small, max_units=95).strata[WHOLE].num_units == 2
    assert readings_for(need, cells=SCANNED, units=small, max_units=1).strata[WHOLE].num_units == 1


def test_strata_are_the_domains_where_units_know_theirs():
    units = [Unit(f"{n}", "s", GIB, "xy"[n % 2]) for n in range(6)]
    assert list(divide_units(units, ["s"], 0)) == [("s", "x"), ("s", "y")]
    assert list(divide_units([*units, Unit("6", "s", GIB)], ["s"], 0)) == [("s", None)]
    many = [Unit(f"{n}", "s", GIB, f"d{n}") for n in range(129)]
    assert list(divide_units(many, ["s"], 0)) == [("s", None)]


def test_what_strata_hold_by_sizes_or_by_published_tokens():
    sized = [Unit("a", "s", 3 * GIB, "x", 50.0), Unit("b", "s", GIB, "x", 50.0)]
    (strata,) = divide_units(sized, ["s"], 0).values()
    first = strata.groups[0].name
    assert strata.fraction(1) == {"a": 0.75, "b": 0.25}[first] and strata.groups_for(0.9) == 2
    published = [Unit("a", "s", None, "x", 30.0), Unit("b", "s", None, "x", 10.0)]
    (strata,) = divide_units(published, ["s"], 0).values()
    assert strata.published_tokens == 40.0 and strata.fraction(1) == {"a": 0.75, "b": 0.25}[first]


def test_reading_order_depends_on_the_seed_only():
    units = [Unit(f"u{n:03d}", "s", GROUP_BYTES // 3 if n % 3 else None) for n in range(90)]
    shuffled = [*units[50:], *units[:50]]
    groups = in_reading_order(units, 3)
    assert groups == in_reading_order(shuffled, 3) != in_reading_order(units, 4)
    assert sorted((unit for group in groups for unit in group.units), key=lambda u: u.name) == units
    assert max(len(group.units) for group in groups) in (2, 3)
    assert all((group.size_bytes or 0) <= GROUP_BYTES for group in groups)
    assert all(len(group.units) == 1 for group in groups if group.size_bytes is None)


def least(densities, domain_tokens, bucket_tokens):
    """Least tokens to read of two domains, by trying; one cell decides a table of two by two."""
    (x_first, x_second), (y_first, y_second) = densities
    (x_tokens, y_tokens), (first, _) = domain_tokens, bucket_tokens
    x, y = np.meshgrid(np.linspace(0, 400, 801), np.linspace(0, 400, 801))
    lowest = np.maximum(x_tokens - x * x_second, first - y * y_first)
    lowest = np.maximum(lowest, max(0, first - y_tokens))
    highest = np.minimum(x * x_first, y * y_second + first - y_tokens)
    highest = np.minimum(highest, min(x_tokens, first))
    return (x + y)[lowest <= highest].min()


@pytest.mark.parametrize(("short", "x_long"), [(60, 0.5), (30, 0.5), (50, 0.2)])
def test_a_mixture_needs_the_least_reading_that_holds_its_table(short, x_long):
    """Domain x has long documents, y few: whether x or y is read more follows from the table."""
    mixture = MixtureConfig(
        sources={"s": 100},
        buckets=BucketTokens(short=short, mid=0, long=100 - short),
        domain_shares={"s": {"x": 0.7, "y": 0.3}},
    )
    estimate = {
        ("s", "x"): {"x": {"short": 1e6 * (1 - x_long), "long": 1e6 * x_long}},
        ("s", "y"): {"y": {"short": 9e5, "long": 1e5}},
    }
    needed = needed_reading(PackConfig(mixture=mixture), estimate, {})
    total = sum(1e6 * need.fraction for need in needed.values())
    expected = least([[1 - x_long, x_long], [0.9, 0.1]], (70, 30), (short, 100 - short))
    assert total == pytest.approx(expected, rel=0.02)


def test_everything_is_read_for_tokens_but_not_for_the_mix_of_domains():
    shares = {"s": {"x": 0.5, "y": 0.5}}
    mixture = MixtureConfig(sources={"s": 1000}, short_survival=1.0, domain_shares=shares)
    estimate = {("s", "x"): {"x": {"short": 500.0}}, ("s", "y"): {"y": {"short": 0.001, "mid": 1}}}
    needed = needed_reading(PackConfig(mixture=mixture), estimate, {})
    assert [need.fraction for need in needed.values()] == pytest.approx([1.0, 1.0])
    # Domain y is one token in a million of its stratum: not worth it.
    survival = MixtureConfig(sources={"s": 100}, short_survival=0.0, domain_shares=shares)
    estimate = {
        ("s", "x"): {"x": {"short": 0.0, "mid": 500.0}},
        ("s", "y"): {"y": {"short": 1e9, "mid": 1e3}},
    }
    needed = needed_reading(PackConfig(mixture=survival), estimate, {})
    assert needed["s", "x"].fraction == pytest.approx(0.2)  # the tokens of both
    assert needed["s", "y"].fraction == 0.0


def test_sources_whose_mix_does_not_matter_are_read_evenly():
    mixture = MixtureConfig(
        sources={"s": 100},
        buckets=BucketTokens(short=50, mid=0, long=50),
        domain_mix=DomainMix.ignore,
    )
    estimate = {
        ("s", "x"): {"x": {"short": 500.0, "long": 500.0}},
        ("s", "y"): {"y": {"short": 1000.0}},
    }
    needed = needed_reading(PackConfig(mixture=mixture), estimate, {})
    assert [need.fraction for need in needed.values()] == pytest.approx([0.1, 0.1])


def test_lengths_that_were_not_seen_are_looked_for_with_less_and_less_hope():
    mixture = MixtureConfig(sources={"s": 100}, buckets=BucketTokens(short=50, mid=0, long=50))
    config = PackConfig(mixture=mixture)
    estimate = {("s", "x"): {"x": {"short": 1e4, "long": 0.0}}}
    hope, read = {"short": 0.0, "long": 10.0}, []
    done = 0.01
    for _ in range(3):
        need = needed_reading(config, estimate, {("s", "x"): done}, hope)["s", "x"]
        assert need.wanted["long"] == float("inf")
        read.append(need.fraction - done)
        done = need.fraction
    assert all(later > earlier for earlier, later in pairwise(read))
    # Without hope there is none to find, and nothing more is read for it.
    assert needed_reading(config, estimate, {("s", "x"): 0.01})["s", "x"].fraction == 0.01
