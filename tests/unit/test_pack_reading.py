"""How much is read: rounds widen shares and add units only as far as the demand asks."""

import pytest

from data_prep.config import ShortOverlong
from data_prep.quotas import Demand
from data_prep.reading import GROUP_BYTES, Readings, SourceScan, in_reading_order
from data_prep.token_files import LengthBuckets
from data_prep.tokenizing import UnitGroup
from longrope2.corpora.corpus import Unit

LENGTHS = LengthBuckets(("short", "long"), (100, 10_000))
UNITS = [UnitGroup((Unit(f"u{n:03d}", "s", 10),)) for n in range(200)]


def readings_for(
    short, long, *, per_unit=None, units=UNITS, pooled=ShortOverlong.drop, max_units=None
):
    cells = {"d": {"short": 1000.0, "long": 50.0}} if per_unit is None else per_unit
    scan = SourceScan(len(units), 4.0, cells or None)
    readings = Readings({"s": units}, {"s": scan}, LENGTHS, pooled, max_units=max_units)
    readings.start(Demand({("s", "short"): short, ("s", "long"): long}))
    return readings


def test_the_scarcest_bucket_decides_the_units_and_the_others_are_thinned():
    readings = readings_for(20_000, 2_500)
    reading = readings.sources["s"]
    assert reading.num_units == 100  # twice 2,500 tokens at 50 a unit
    assert reading.shares == {"short": pytest.approx(0.4), "long": 1.0}
    tasks = readings.tasks()
    assert [task.unit for task in tasks] == UNITS[:100] and all(task.is_first for task in tasks)
    assert tasks[0].bands == {"short": (0.0, pytest.approx(0.4)), "long": (0.0, 1.0)}
    assert tasks[0].classes.of(400) == "short" and tasks[0].classes.of(401) == "long"


def test_all_there_is_reads_everything():
    reading = readings_for(None, 0).sources["s"]
    assert reading.num_units == 200 and set(reading.shares.values()) == {1.0}


def test_an_unknown_size_reads_everything():
    assert readings_for(10, 10, per_unit={}).sources["s"].shares == {"short": 1.0, "long": 1.0}


def test_nothing_wanted_reads_nothing():
    assert readings_for(0, 0).tasks() == []


def test_a_few_units_at_least():
    assert readings_for(10, 10).sources["s"].num_units == 32


def test_windows_cut_from_long_documents_pool_the_supply():
    reading = readings_for(30_000, 3_600, pooled=ShortOverlong.split).sources["s"]
    assert reading.num_units == 64 and reading.shares["short"] == reading.shares[
        "long"
    ] == pytest.approx(1.0)


def test_later_rounds_read_only_what_is_missing():
    readings = readings_for(20_000, 2_500)
    first = readings.tasks()
    assert readings.extend("s", {"short": 1.2})
    second = readings.tasks()
    assert [task.bands["short"] for task in second] == [
        (pytest.approx(0.4), pytest.approx(0.72))
    ] * 100
    assert all(task.bands["long"] == (1.0, 1.0) and not task.is_first for task in second)
    # All long documents of these units are read: more units.
    assert readings.extend("s", {"long": 1.5})
    third = readings.tasks()
    assert [task.unit for task in third] == UNITS[100:200] and all(task.is_first for task in third)
    assert {task.stem for task in first}.isdisjoint(task.stem for task in [*second, *third])
    assert not readings.extend("s", {"long": 1.5})


def test_never_more_units_than_allowed():
    readings = readings_for(20_000, 2_500, max_units=40)
    assert readings.sources["s"].num_units == 40
    readings.tasks()
    assert not readings.extend("s", {"long": 2.0})


def test_a_group_of_small_units_counts_with_all_of_them():
    groups = [UnitGroup(tuple(Unit(f"u{n}-{m}", "s", 10) for m in range(30))) for n in range(20)]
    assert readings_for(None, None, units=groups, max_units=95).sources["s"].num_units == 3
    assert readings_for(None, None, units=groups, max_units=1).sources["s"].num_units == 1


def test_reading_order_depends_on_the_seed_only():
    units = [Unit(f"u{n:03d}", "s", GROUP_BYTES // 3 if n % 3 else None) for n in range(90)]
    shuffled = [*units[50:], Unit("other", "t", 1), *units[:50]]
    groups = in_reading_order(units, "s", 3)
    assert groups == in_reading_order(shuffled, "s", 3) != in_reading_order(units, "s", 4)
    assert sorted((unit for group in groups for unit in group.units), key=lambda u: u.name) == units
    assert max(len(group.units) for group in groups) in (2, 3)
    assert all((group.size_bytes or 0) <= GROUP_BYTES for group in groups)
    assert all(len(group.units) == 1 for group in groups if group.size_bytes is None)
