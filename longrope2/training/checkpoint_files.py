"""How the files of a checkpoint come to disk: DeepSpeed says what is in them, this module writes them.

DeepSpeed 0.19.8 has engines of its own that write beside the training (``DecoupledCheckpointEngine``, DataStates). They are
not used: the first hands the live tensors to another process and must be done before the next update, reports a writer that
died by writing nothing, and neither hashes nor fsyncs; the second needs a package that is not on the Python index.
Here DeepSpeed's own ``save_checkpoint`` runs as ever, and only its last act is replaced: the state is serialised into
memory, which fixes it, and a thread writes the bytes while training goes on.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longrope2.artifacts import atomic_path, sha256_of_bytes, sha256_of_file, write_text

__all__ = ["RankFiles", "collect_hashes"]

POLL_SECONDS = 0.05


class RankFiles:
    """The files that one rank contributes to one checkpoint."""

    def __init__(self, rank: int, *, in_memory: bool) -> None:
        """Files of rank ``rank``; ``in_memory`` keeps their bytes until ``write``, else they are written at once."""
        self._rank = rank
        self._in_memory = in_memory
        self._waiting: dict[Path, io.BytesIO] = {}
        self._hashes: dict[str, str] = {}
        self._folder = Path()

    @contextlib.contextmanager
    def taken_from(self, engine: Any, folder: Path) -> Iterator[None]:
        """While open, the engine's checkpoint files, which belong in ``folder``, come here.

        The engine is without its sequence-parallel groups meanwhile: it would note their size as a tensor-parallel one, and
        stages 1 and 2 could not be converted.
        """
        self._folder = folder
        saver, mpu = engine.checkpoint_engine, engine.mpu
        saver.save, engine.mpu = self._take, None  # the former hides the method of its class
        try:
            yield
        finally:
            del saver.save
            engine.mpu = mpu

    def write(self) -> None:
        """Write what waits in memory, read it back, and leave the list of all hashes for the rank that publishes."""
        for path, buffer in self._waiting.items():
            data = buffer.getbuffer()
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            digest = sha256_of_bytes(data)
            if sha256_of_file(path) != digest:
                raise OSError(f"{path} reads back otherwise than it was written")
            self._hashes[path.name] = digest
            del data
            buffer.close()
        self._waiting.clear()
        write_text(_list_of(self._folder, self._rank), json.dumps(self._hashes))

    def _take(self, state_dict: Any, path: str) -> None:
        """In place of the engine's ``save``."""
        if self._in_memory:
            self._waiting[Path(path)] = buffer = io.BytesIO()
            torch.save(state_dict, buffer)
        else:
            with atomic_path(Path(path)) as temporary:
                try:
                    torch.save(state_dict, temporary)
                except RuntimeError as error:  # torch's word for a disk that takes no more
                    raise OSError(f"{path}: {error}") from error
            self._hashes[Path(path).name] = sha256_of_file(Path(path))


def collect_hashes(folder: Path, num_ranks: int) -> dict[str, str]:
    """Wait until every rank has written its files into ``folder``; file name -> SHA-256 of all of them.

    Ranks tell each other by files, not by collectives: those belong to the training thread. A rank that failed leaves no
    list; it ends the run itself.
    """
    hashes: dict[str, str] = {}
    for rank in range(num_ranks):
        path = _list_of(folder, rank)
        while not path.is_file():
            time.sleep(POLL_SECONDS)
        hashes |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return dict(sorted(hashes.items()))


def _list_of(folder: Path, rank: int) -> Path:
    """Where a rank lists its hashes until they are in the manifest."""
    return folder / f"rank_{rank:05d}.json"
