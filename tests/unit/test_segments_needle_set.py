"""Needle sets on disk."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from longrope2.errors import ArtifactError
from longrope2.segments.needle_set import NeedleSample, NeedleSet


def sample(length=6, value_start=4):
    record = {"books": [{"id": "a", "num_tokens": 3}], "needle_start": 2}
    return NeedleSample(np.arange(length), value_start, "red-lamp", "1234567", 0.25, record)


def test_a_set_comes_back(tmp_path):
    NeedleSet([sample(), sample()], 6).save(tmp_path / "needles.arrow")
    loaded = NeedleSet.load(tmp_path / "needles.arrow")
    assert loaded.length == 6 and len(loaded.samples) == 2
    first = loaded.samples[0]
    assert np.array_equal(first.tokens, np.arange(6)) and first.record == sample().record
    assert (first.value_start, first.key, first.value, first.depth) == (
        4,
        "red-lamp",
        "1234567",
        0.25,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["needles.arrow", "needles.json"]


def test_how_many_needles_share_a_haystack_comes_back(tmp_path):
    samples = [replace(sample(), key=f"key-{n}") for n in range(6)]
    NeedleSet(samples, 6, needles_per_haystack=3).save(tmp_path / "needles.arrow")
    loaded = NeedleSet.load(tmp_path / "needles.arrow")
    assert [[s.key for s in haystack] for haystack in loaded.haystacks] == [
        ["key-0", "key-1", "key-2"],
        ["key-3", "key-4", "key-5"],
    ]
    assert loaded.describe()["needles_per_haystack"] == 3


def test_sets_from_before_haystacks_were_shared_have_one_each(tmp_path):
    NeedleSet([sample(), sample()], 6).save(tmp_path / "new.arrow")
    with pa.OSFile(str(tmp_path / "new.arrow")) as source:
        table = pa.ipc.open_stream(source).read_all()
    old = table.schema.with_metadata({"needle_length": "6"})
    with (
        pa.OSFile(str(tmp_path / "old.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, old) as writer,
    ):
        writer.write_table(table.cast(old))
    assert [len(haystack) for haystack in NeedleSet.load(tmp_path / "old.arrow").haystacks] == [
        1,
        1,
    ]


@pytest.mark.parametrize("shared", [0, 2])
def test_haystacks_that_are_not_whole_are_refused(shared):
    fault = f"3 needle samples are no whole number of haystacks of {shared}"
    with pytest.raises(ArtifactError, match=fault):
        NeedleSet([sample()] * 3, 6, needles_per_haystack=shared)


def test_samples_of_another_length_are_refused():
    with pytest.raises(ArtifactError, match="needle sample 1 has 7 tokens, not 6"):
        NeedleSet([sample(), sample(7)], 6)


@pytest.mark.parametrize("value_start", [0, 5])
def test_a_value_outside_the_sample_is_refused(value_start):
    with pytest.raises(ArtifactError, match=f"has its value at {value_start} of 6"):
        NeedleSet([sample(value_start=value_start)], 6)


def test_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(ArtifactError, match="is not a needle set"):
        NeedleSet.load(tmp_path / "missing")
    (tmp_path / "damaged").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="is not a needle set"):
        NeedleSet.load(tmp_path / "damaged")
    table = pa.table({"a": [1]})
    with (
        pa.OSFile(str(tmp_path / "foreign"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    with pytest.raises(ArtifactError, match="its columns are a"):
        NeedleSet.load(tmp_path / "foreign")
