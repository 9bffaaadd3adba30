"""Samples of generation tasks (a prompt, its right answers, its score), and their store on disk.

Samples are made once and found again by the hash of everything they depend on: a task at a length
is a folder named by that hash, holding Arrow files of a few samples each. A file that is there is
whole; a run that was interrupted goes on with those that are missing. Sample n depends on its
task's description and n alone: neither the number of samples nor of processes changes it. Prompts
are memory-mapped when read, so a long suite takes no memory.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longrope2.errors import ArtifactError, DataError, UserError
from longrope2.files.artifacts import atomic_path, sha256_of_bytes

SCHEMA = pa.schema(
    [
        ("prompt", pa.large_list(pa.int32())),
        ("answers", pa.list_(pa.string())),
        ("max_new_tokens", pa.int32()),
        ("facts", pa.string()),
    ]
)
SAMPLES_PER_FILE = 50
_IDENTITY = b"identity"


@dataclass(frozen=True)
class Sample:
    """One prompt, ready to be read by a model; with its answer it fits into the task's length."""

    prompt_T: np.ndarray
    """Token ids, BOS included where the model has one; int32 [T]."""
    answers: tuple[str, ...]
    """Strings that the score is taken against; what they mean is the task's rule."""
    max_new_tokens: int
    """Upper bound on the answer's tokens."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known about the sample (realised depth, tokens left out, ...); plain JSON values."""

    @property
    def sha256(self) -> str:
        """Hash of all that an answer and its score depend on."""
        head = json.dumps([list(self.answers), self.max_new_tokens, len(self.prompt_T)]).encode()
        return sha256_of_bytes(head + np.ascontiguousarray(self.prompt_T, dtype="<i4").tobytes())


@dataclass(frozen=True)
class GenerationTask:
    """One task at one length, the same samples for every model."""

    suite: str
    """``ruler``, ``needle_map``, ``longbench``, ..."""
    name: str
    length: int
    """Tokens that prompt and answer may take together."""
    samples: tuple[Sample, ...]
    score: Callable[[Sample, str], float]
    """From a sample and the text a model answered to a number from 0 (wrong) to 1 (right)."""


@dataclass(frozen=True)
class SampleRecipe:
    """How the samples of one task at one length are made."""

    name: str
    length: int
    num_samples: int
    identity: dict[str, Any]
    """All that a sample depends on beside its number; plain JSON values."""
    make: Callable[[int, int], list[Sample]]
    """Samples first .. stop - 1: the same numbers give the same samples, whatever else is made."""
    whole: bool = False
    """All samples must be made in one go: they are drawn from one stream."""

    @property
    def sha256(self) -> str:
        """Hash of the identity."""
        return sha256_of_bytes(json.dumps(self.identity, sort_keys=True).encode())

    def ranges(self) -> list[tuple[int, int]]:
        """First sample of each file, and the first behind it."""
        size, most = self.num_samples if self.whole else SAMPLES_PER_FILE, self.num_samples
        return [(first, min(first + size, most)) for first in range(0, most, size)]


# What worker processes inherit when they are forked: recipes hold tokenized texts, which are not
# worth sending.
_FORKED: list[tuple["SampleStore", Sequence[SampleRecipe]]] = []


class SampleStore:
    """A folder of samples, made by forked processes, or with no ``workers`` in this one."""

    def __init__(self, folder: Path, workers: int = 0) -> None:
        self.folder, self.workers = folder, workers

    def samples(
        self, recipes: Sequence[SampleRecipe], progress: Callable[[str, int], None] | None = None
    ) -> list[tuple[Sample, ...]]:
        """The samples of every recipe, made where they are missing.

        ``progress`` is called with a task's name and a number of samples for every finished file.

        Raises:
            UserError: a recipe cannot be followed, named with its length; or a file is damaged or
                cannot be written.
        """
        missing = []
        for number, recipe in enumerate(recipes):
            places = (place for place in recipe.ranges() if not self.file(recipe, *place).is_file())
            missing += [(number, *place) for place in places]
        # The longest first.
        missing.sort(key=lambda job: -recipes[job[0]].length * (job[2] - job[1]))
        for number, first, stop in self._made(recipes, missing):
            if progress is not None:
                progress(f"{recipes[number].name} {recipes[number].length}", stop - first)
        return [self._read(recipe) for recipe in recipes]

    def file(self, recipe: SampleRecipe, first: int, stop: int) -> Path:
        """File of some samples of a recipe."""
        folder = self.folder / f"{recipe.name}-{recipe.length}-{recipe.sha256[:16]}"
        return folder / f"samples-{first:05d}-{stop:05d}.arrow"

    def write(self, recipe: SampleRecipe, first: int, stop: int) -> None:
        """Make samples first .. stop - 1 and write their file; raises as ``samples`` does."""
        try:
            rows = recipe.make(first, stop)
        except DataError as error:
            raise DataError(f"{recipe.name} at {recipe.length} tokens: {error}") from None
        columns = [
            [row.prompt_T for row in rows],
            [list(row.answers) for row in rows],
            [row.max_new_tokens for row in rows],
            [json.dumps(row.facts, sort_keys=True) for row in rows],
        ]
        schema = SCHEMA.with_metadata({_IDENTITY: recipe.sha256})
        arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        table = pa.table(arrays, schema=schema)
        try:
            with atomic_path(self.file(recipe, first, stop)) as temporary:
                with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
                    file.write_table(table)
        except OSError as error:
            raise ArtifactError(f"samples cannot be written below {self.folder}: {error}") from None

    def _made(
        self, recipes: Sequence[SampleRecipe], jobs: list[tuple[int, int, int]]
    ) -> Iterator[tuple[int, int, int]]:
        """Do all jobs, in this process or in forked ones; yields each when it is done."""
        if self.workers < 1 or len(jobs) < 2:
            for number, first, stop in jobs:
                self.write(recipes[number], first, stop)
                yield number, first, stop
            return
        _FORKED.append((self, recipes))
        workers, context = min(self.workers, len(jobs)), get_context("fork")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            futures = {pool.submit(_write_forked, *job): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            fault = "a process that makes samples was killed, probably for memory"
            way_out = "run again with fewer workers: finished samples are kept"
            raise DataError(f"{fault}; {way_out}") from None
        finally:
            pool.shutdown(cancel_futures=True)
            _FORKED.pop()

    def _read(self, recipe: SampleRecipe) -> tuple[Sample, ...]:
        """All samples of a recipe; prompts stay on disk until they are used."""
        found: list[Sample] = []
        for first, stop in recipe.ranges():
            path = self.file(recipe, first, stop)
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                fault = f"{path} is damaged ({error}); remove it, and it is made again"
                raise ArtifactError(fault) from None
            identity = (table.schema.metadata or {}).get(_IDENTITY)
            if identity != recipe.sha256.encode() or table.num_rows != stop - first:
                fault = f"{path} does not hold what its name says"
                raise ArtifactError(f"{fault}; remove it, and it is made again")
            found += _rows(table)
        return tuple(found)


def _rows(table: pa.Table) -> Iterator[Sample]:
    for batch in table.to_batches():
        prompts = batch.column(0)
        ids, offsets = prompts.values.to_numpy(zero_copy_only=True), prompts.offsets.to_numpy()
        answers, new_tokens, facts = (batch.column(i).to_pylist() for i in (1, 2, 3))
        for row in range(batch.num_rows):
            prompt = ids[offsets[row] : offsets[row + 1]]
            yield Sample(prompt, tuple(answers[row]), new_tokens[row], json.loads(facts[row]))


def _start_worker() -> None:
    """A process per core is enough; the tokenizer's threads do not survive the fork anyway."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _write_forked(number: int, first: int, stop: int) -> None:
    store, recipes = _FORKED[-1]
    try:
        store.write(recipes[number], first, stop)
    except UserError as error:
        # The parent must be able to unpickle it.
        raise type(error)(str(error)) from None
