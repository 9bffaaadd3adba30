"""The store of samples: whole or not there, found by content, whatever process made it."""

import os
import signal

import numpy as np
import pytest

from longrope2.errors import ArtifactError, DataError
from longrope2.evaluation.samples import SAMPLES_PER_FILE, Sample, SampleRecipe, SampleStore


def made(first, stop):
    return [
        Sample(
            np.arange(n, 2 * n + 3, dtype=np.int32),
            (f"answer {n}", "\u00e9"),
            7,
            {"depth": n / 7, "keys": ["a"]},
        )
        for n in range(first, stop)
    ]


def recipe(num_samples, make=made, **identity):
    return SampleRecipe("task", 64, num_samples, {"task": "task", **identity}, make)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_back_as_they_were_made(tmp_path, workers):
    wanted = recipe(2 * SAMPLES_PER_FILE + 3)
    seen = []
    store = SampleStore(tmp_path, workers)
    (found,) = store.samples([wanted], progress=lambda name, count: seen.append((name, count)))
    for sample, original in zip(found, made(0, 103), strict=True):
        assert sample.sha256 == original.sha256 and sample.facts == original.facts
        assert sample.prompt_T.dtype == np.int32 and not sample.prompt_T.flags.writeable
    assert sorted(seen) == [("task 64", 3), ("task 64", 50), ("task 64", 50)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_there_is_not_made_again(tmp_path):
    calls = []

    def counted(first, stop):
        calls.append((first, stop))
        return made(first, stop)

    store = SampleStore(tmp_path)
    store.samples([recipe(120, counted)])
    assert calls == [(0, 50), (50, 100), (100, 120)]
    store.samples([recipe(120, counted)])
    assert len(calls) == 3
    store.samples([recipe(100, counted)])  # the first hundred are files of their own
    assert len(calls) == 3
    store.file(recipe(120), 50, 100).unlink()  # as an interrupted run leaves it
    store.samples([recipe(120, counted)])
    assert calls[3:] == [(50, 100)]
    store.samples([recipe(10, counted, seed=1)])  # another identity
    assert calls[4:] == [(0, 10)]


@pytest.mark.parametrize("content", [b"", b"no arrow"])
def test_a_damaged_file_is_named(tmp_path, content):
    store = SampleStore(tmp_path)
    store.samples([recipe(3)])
    path = store.file(recipe(3), 0, 3)
    path.write_bytes(content)
    with pytest.raises(
        ArtifactError,
        match=r"samples-00000-00003.arrow is damaged .*; remove it, and it is made again",
    ):
        store.samples([recipe(3)])


def test_a_file_of_another_task_is_named(tmp_path):
    store = SampleStore(tmp_path)
    store.samples([recipe(3), recipe(3, seed=1)])
    store.file(recipe(3), 0, 3).write_bytes(store.file(recipe(3, seed=1), 0, 3).read_bytes())
    with pytest.raises(ArtifactError, match="does not hold what its name says; remove it"):
        store.samples([recipe(3)])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=f"samples cannot be written below {tmp_path}/file"):
        SampleStore(tmp_path / "file").samples([recipe(3)])


def failing(first, stop):
    if first:
        raise DataError("too few documents")
    return made(first, stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_task_and_length_and_keeps_what_is_finished(tmp_path, workers):
    store = SampleStore(tmp_path, workers)
    with pytest.raises(DataError, match="task at 64 tokens: too few documents"):
        store.samples([recipe(100, failing)])
    assert (
        store.file(recipe(100), 0, 50).is_file() and not store.file(recipe(100), 50, 100).is_file()
    )


def killed(first, stop):
    os.kill(os.getpid(), signal.SIGKILL)
    return made(first, stop)


def test_a_killed_worker_is_said_and_the_next_run_goes_on(tmp_path):
    with pytest.raises(
        DataError, match="was killed, probably for memory; run again with fewer workers"
    ):
        SampleStore(tmp_path, 2).samples([recipe(60, killed)])
    (found,) = SampleStore(tmp_path, 2).samples([recipe(60)])
    assert len(found) == 60
