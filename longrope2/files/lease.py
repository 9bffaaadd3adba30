"""One writer per product: whoever writes into a product's folder holds its lease.

A lease is two files of the run's folder. ``.leases/3_checkpoints.lock`` is locked with flock as
long as the writer lives: the system takes the lock away however the process ends.
``.leases/3_checkpoints.json`` says who that is, for the message that the second one gets, and its
modification time is touched every few seconds, because a lock does not reach everywhere: some file
systems know none, and some keep it to one machine. So

- a lock that is taken is a writer that lives;
- a lock that is free proves that a writer under the same kernel is gone, and nothing else;
- of any other writer that left its name, the file is watched: while it is touched, that writer
  lives, and what is not touched for ``WATCH_SECONDS`` (by this machine's own clock, so that clocks
  need not agree) was left by a crash.

Both files go when the writer ends in order, and the folders that were made for them if nothing else
came into them: a refused command leaves nothing.

A writer whose name is replaced by another's, because it was suspended for so long, ends at once: it
must not write beside the new one.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import write_text

_TOUCH_SECONDS = 5.0
WATCH_SECONDS = 30.0
"""Several touches: a file system may be slow."""
_SETTLE_SECONDS = 2.0
"""Without locks: of two that find no writer at the same moment, one has overwritten the other's
name by then."""
_LONG_AGO_SECONDS = 900.0
"""Clocks do not differ by so much: a file untouched since then needs no watching."""
_FOLDER = ".leases"
_USER_FAULT = 2
"""``USER_FAULT_EXIT_CODE`` of longrope2/command.py: no restart mends it."""
_KERNEL_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESS_IDS = Path("/proc/self/ns/pid")
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int
    kernel: str
    """Which boot of which machine: containers have host names of their own."""
    process_ids: str
    """Among which process ids ``pid`` counts: containers number theirs from 1."""
    command: str
    since: str
    token: str
    """Random: no other lease has it."""

    @classmethod
    def this_process(cls) -> "Holder":
        """As others will read it."""
        kernel = _KERNEL_ID.read_text().strip() if _KERNEL_ID.is_file() else socket.gethostname()
        ids = os.readlink(_PROCESS_IDS) if _PROCESS_IDS.exists() else ""
        job = os.environ.get("SLURM_JOB_ID")
        module = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).name
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            kernel=kernel,
            process_ids=ids,
            command=f"{module.removesuffix('.__main__')}{f' of job {job}' if job else ''}",
            since=time.strftime("%F %T"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        """As a message names it."""
        return f"{self.command} (host {self.host}, process {self.pid}, since {self.since})"

    def surely_ended(self, *, lock_was_free: bool) -> bool:
        """Whether it is certain that this writer is gone; False where nobody can tell."""
        here = Holder.this_process()
        if self.kernel != here.kernel:
            return False
        if lock_was_free:
            return True
        return self.process_ids == here.process_ids and not Path(f"/proc/{self.pid}").exists()


@contextlib.contextmanager
def only_writer(
    run_folder: Path, product: str, *, watch_seconds: float = WATCH_SECONDS
) -> Iterator[None]:
    """Hold the lease of a product of a run, ``3_checkpoints`` say, while open.

    Raises:
        ArtifactError: another process holds it, and is named.
    """
    lock, note = _files(run_folder, product)
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    file, locked = _open_locked(lock)
    with file:  # closing it gives the lock back
        if locked is False:
            raise _refusal(note, _read(note))
        _refuse_who_lives(note, bool(locked), watch_seconds)
        own = Holder.this_process()
        _write_own(note, own, settle=locked is None)
        stop = threading.Event()
        of_thread = {"target": _touch_often, "args": (note, own, stop), "name": "lease"}
        beat = threading.Thread(**of_thread, daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            if _read(note) == own:
                note.unlink(missing_ok=True)
                # Still locked: whoever opens the name from now on makes another file.
                lock.unlink(missing_ok=True)
            _remove_empty([lock.parent, *made])


def _open_locked(lock: Path) -> tuple[TextIO, bool | None]:
    """The lock file, open, and what ``take_lock`` says of it.

    Its former holder may remove it between the opening and the locking: then it is no lock.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a")
        except FileNotFoundError:  # the folder was just removed
            continue
        locked = take_lock(file.fileno())
        if not locked or _is_at(lock, file.fileno()):
            return file, locked
        file.close()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the inner ones first, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in dict.fromkeys(folders):
            folder.rmdir()


def refuse_second_writer(run_folder: Path, product: str) -> None:
    """Say that a product has a writer, before anything is computed or written.

    Raises:
        ArtifactError: as ``only_writer``.
    """
    with only_writer(run_folder, product):
        pass


def take_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process: True done, False taken, None if there are no locks here.

    The lock goes with the last descriptor of the open file, that is, with the process.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _files(run_folder: Path, product: str) -> tuple[Path, Path]:
    """What is locked, and what says who has done so."""
    folder = run_folder / _FOLDER
    return folder / f"{product}.lock", folder / f"{product}.json"


def _product(note: Path) -> Path:
    """What the lease is of, as a message names it."""
    return note.parent.parent / note.stem


def _refuse_who_lives(note: Path, lock_was_free: bool, watch_seconds: float) -> None:
    """Let pass who finds no name, or one that a writer left that is gone."""
    found = _read(note)
    if found is None or found.surely_ended(lock_was_free=lock_was_free):
        return
    seen = _touched(note)
    if seen is None or time.time() - seen > _LONG_AGO_SECONDS:
        return
    text = f"looks for {watch_seconds:g} s whether {found} still writes"
    print(f"{_product(note)}: {text}", file=sys.stderr)
    until = time.monotonic() + watch_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, watch_seconds / 10))
        if (now := _touched(note)) is None:  # it ended in order
            return
        if now != seen:
            raise _refusal(note, _read(note))


def _write_own(note: Path, own: Holder, *, settle: bool) -> None:
    """Leave this process's name; without locks, wait whether another one did so just now."""
    write_text(note, json.dumps(asdict(own)) + "\n")
    if settle:
        time.sleep(_SETTLE_SECONDS)
        if (found := _read(note)) != own:
            raise _refusal(note, found)


def _touch_often(note: Path, own: Holder, stop: threading.Event) -> None:
    """Show that this writer lives; end it when another has taken its place."""
    while not stop.wait(_TOUCH_SECONDS):
        with contextlib.suppress(OSError):  # a disk that is full or away for a while
            found = _read(note)
            if found is not None and found != own:
                _leave(note, found)
            os.utime(note)


def _leave(note: Path, found: Holder) -> None:
    """End at once: this process was taken for dead (suspended, or without its disk for long)."""
    text = f"error: {_product(note)} is written by {found} now; this process had not been heard of"
    print(f"{text} for {WATCH_SECONDS:g} s, and ends", file=sys.stderr, flush=True)
    os._exit(_USER_FAULT)


def _refusal(note: Path, holder: Holder | None) -> ArtifactError:
    who = "another process" if holder is None else str(holder)
    return ArtifactError(
        f"{_product(note)} is being written by {who}; wait until it has ended, or stop it, or give "
        "another run.name"
    )


def _read(note: Path) -> Holder | None:
    """Who left a name; None where nobody did, or no whole one."""
    try:
        return Holder(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _touched(note: Path) -> float | None:
    try:
        return note.stat().st_mtime
    except FileNotFoundError:
        return None
