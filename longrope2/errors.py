"""Errors meant for users: each says what was given, what is allowed, and which key to change.

Every command turns a ``UserError`` into one message on stderr and exit code 2, without a traceback.
Anything else is a fault of this project and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable, Sequence

from longrope2.system_errors import explain

# Below this share of common letters a name is another word, not a misspelt one.
_LEAST_LIKENESS = 0.7


class UserError(Exception):
    """Something the user gave cannot be used; the text says what to change."""


class ConfigError(UserError):
    """One or more configuration faults, each naming its key; several are reported as a list."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        several = f"the configuration has {len(self.faults)} fault(s):\n{lines}"
        super().__init__(self.faults[0] if len(self.faults) == 1 else several)


class ArtifactError(UserError):
    """A file or folder that a stage reads is missing, damaged, or belongs to something else."""


class DamagedError(ArtifactError):
    """A file that this project has written is not as it was written."""


class MissingError(ArtifactError):
    """What another command makes is not there yet: a dry run names it, a real one is refused."""


class DiskFullError(UserError, OSError):
    """A file could not be written for want of space; nothing of it was left."""

    def __init__(self, path: object, error: OSError) -> None:
        said = explain(OSError(error.errno, error.strerror, str(path)))
        super().__init__(f"{said}; nothing of the file was left behind")


def is_disk_full(error: BaseException) -> bool:
    """Whether the system had no space, or the user's share of it was used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class FactorsError(UserError):
    """Rescale factors that cannot be right; names the index and the value."""


class DataError(UserError):
    """Text, tokens or a corpus that cannot be used as asked."""


def waiting_lines(stage: str, missing: Sequence[str]) -> str:
    """The end of a dry run: what the ``stage`` will be refused for until it is made."""
    return "\n".join(
        [f"missing; the {stage} will not start without:", *(f"  {m}" for m in missing)]
    )


def closest(given: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is most like; None where none is."""
    return next(iter(difflib.get_close_matches(given, list(known), 1, _LEAST_LIKENESS)), None)


def guess(name: str | None) -> str:
    """How a message about a name that does not exist asks for another; "" for None."""
    return "" if name is None else f" (did you mean {name}?)"


def first_line(error: BaseException) -> str:
    """The first line of what a library raised, or its class where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
