"""What the system answers when it refuses, as one line with the path and what helps.

The one place that knows it: commands end with these lines (``command.py``), and readers of corpora
put them into theirs. Errors that only a fault of this project explains, like a name that should be
there, are none of them.
"""

import errno
import os

_ROOT = "run.root=FOLDER writes elsewhere"
_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room there and run the same command again, what is "
    f"finished is kept; {_ROOT}",
    errno.EDQUOT: "your share of the disk is used up: make room there and run the same command "
    f"again, what is finished is kept; {_ROOT}",
    errno.EFBIG: "the file system or `ulimit -f` allows no file of this size: raise the limit, or "
    f"use another disk ({_ROOT})",
    errno.EROFS: f"the file system can only be read: {_ROOT}, LONGROPE2_CACHE=FOLDER keeps caches "
    "elsewhere",
    errno.EACCES: f"your user may not do that: change the permissions (ls -ld shows them); {_ROOT}",
    errno.EPERM: f"your user may not do that: change the permissions (ls -ld shows them); {_ROOT}",
    errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n 65536) and run "
    "the same command again",
    errno.ENFILE: "all of this machine's open files are in use: close other programs, or raise "
    "fs.file-max, and run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system: give a shorter run.name or path",
    errno.ELOOP: "links point at each other: mend them",
    errno.EIO: "the disk or its connection is faulty: see dmesg, then run the same command again",
    errno.ESTALE: "the network disk was replaced or remounted: run the same command again",
    errno.ENOTCONN: "the network disk is not connected: mount it and run the same command again",
    errno.EHOSTDOWN: "the network disk is not connected: mount it and run the same command again",
    errno.ETIMEDOUT: "the network disk does not answer: run the same command again",
    errno.ENOMEM: "there is no memory left: use fewer workers=N, or a larger machine",
    errno.ENOLCK: "the file system gives no locks: mount it with locks, or use another disk "
    f"({_ROOT})",
}


def explain(error: OSError) -> str | None:
    """The line for people, without a full stop; None where the error is no answer of the system."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    names = [name for name in (error.filename, error.filename2) if name is not None]
    places = " -> ".join(os.fsdecode(name) if not isinstance(name, int) else "" for name in names)
    said = os.strerror(error.errno or 0)
    return f"{places}: {said}: {remedy}" if places else f"{said}: {remedy}"
