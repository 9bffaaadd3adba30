"""Start a command's processes here with torchrun's agent, and read what each of them is given."""

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Generic

from longrope2.command import rank_exit_code
from longrope2.config import Root, compose, load
from longrope2.errors import ConfigError
from longrope2.files.artifacts import write_text

CONFIG_FLAG = "--config"
_PREPARE_FLAG = "--prepare"
# The ranks decide about a stop (they may save first); torchrun's agent kills after 30 seconds.
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_AGENT_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"


@dataclass(frozen=True)
class Given(Generic[Root]):
    """What a command was given that runs in ranks."""

    config: Root
    is_rank: bool = False
    """Whether this is a rank, whose configuration was read."""
    note: Path | None = None
    """Of ``--prepare FILE``: compose, check, print the plan, write the configuration of the ranks
    and stop; FILE tells the job script where that is (``note_config_of_ranks``)."""


def read_arguments(root: type[Root], name: str, arguments: list[str], *, file: str) -> Given[Root]:
    """Compose ``conf/<name>.yaml``; ranks read what was written (``--config FILE``) instead.

    Raises:
        ConfigError: see ``compose``; a flag without its path; or no ``--config`` under torchrun,
            where it must be ``file``.
    """
    if arguments[:1] == [CONFIG_FLAG]:
        if len(arguments) != 2:
            got = " ".join(arguments[1:]) or "nothing"
            raise ConfigError([f"{CONFIG_FLAG} takes one path and no overrides; got {got}"])
        return Given(load(root, Path(arguments[1])), is_rank=True)
    if "RANK" in os.environ:
        fault = f"under torchrun, give {CONFIG_FLAG} {file}: ranks do not compose"
        raise ConfigError([fault])
    if arguments[:1] != [_PREPARE_FLAG]:
        return Given(compose(root, name, arguments))
    if len(arguments) < 2 or "=" in arguments[1]:
        usage = f"{_PREPARE_FLAG} FILE key=value ..."
        raise ConfigError([f"{_PREPARE_FLAG} takes a path before the overrides: {usage}"])
    return Given(compose(root, name, arguments[2:]), note=Path(arguments[1]))


def note_config_of_ranks(note: Path, config_path: Path | None) -> None:
    """Write the path that ranks get after ``--config`` into ``note``; none when all is done."""
    write_text(note, "" if config_path is None else f"{config_path}\n")


def run_under_torchrun(module: str, config_path: Path, processes: int) -> int:
    """Run ``python -m <module> --config <path>`` in processes of an agent that lives here.

    SIGTERM and SIGUSR1 are passed on to the ranks; when one rank ends with an error the agent stops
    the others.

    Returns:
        0, or the exit code of the rank that failed first; 1 when a signal ended it.
    """
    # torch loads for seconds.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # DeepSpeed uses torch names that are deprecated.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=_AGENT_SIGNALS,
    )
    try:
        with _signals_go_to_ranks():
            elastic_launch(agent, sys.executable)("-u", "-m", module, CONFIG_FLAG, str(config_path))
    except ChildFailedError as error:
        return rank_exit_code({rank: end.exitcode for rank, end in error.failures.items()})
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 1
    return 0


@contextlib.contextmanager
def _signals_go_to_ranks() -> Iterator[None]:
    """While open, a stop signal to this process goes on to the ranks, which decide when to end."""
    before = {number: signal.signal(number, _send_on) for number in _FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_on(number: int, frame: FrameType | None) -> None:
    """Signal handler; before there are ranks, the command ends as it would without a handler."""
    import psutil

    ranks = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if CONFIG_FLAG in child.cmdline():
                child.send_signal(number)
                ranks += 1
    if ranks == 0:
        sys.exit(128 + number)
