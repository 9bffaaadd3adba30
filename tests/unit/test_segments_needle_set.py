"""Needle sets on disk."""

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
