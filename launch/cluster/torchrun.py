"""Start a command's processes here with torchrun's agent, and read what each of them is given."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic

from launch.cluster.rank_environment import set_rank_environment
from longrope2.command import LAUNCHER_VARIABLE, rank_exit_code
from longrope2.config import Root, compose, load
from longrope2.errors import ConfigError
from longrope2.files.artifacts import write_text

CONFIG_FLAG = "--config"
_PREPARE_FLAG = "--prepare"
# The ranks decide about a stop (they may save first); torchrun's agent kills after 30 seconds.
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_AGENT_SIGNALS = "SIGHUP,SIGQUIT"
_CTRL_C = "Ctrl-C: the ranks save and end; once more ends them at once, without saving"


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
    the others, and when this process ends, however it does, they end too. Ctrl-C asks ranks that
    can save to do so; a second one, or one that comes while they cannot, kills them.

    Returns:
        0, or the exit code of the rank that failed first; 1 when a signal ended it.

    Raises:
        KeyboardInterrupt: Ctrl-C, and nothing was saved.
    """
    # torch loads for seconds.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    set_rank_environment()
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
    ctrl_c = _CtrlC()
    try:
        with _signals_go_to_ranks(ctrl_c), _ranks_know_this_process():
            elastic_launch(agent, sys.executable)("-u", "-m", module, CONFIG_FLAG, str(config_path))
    except ChildFailedError as error:
        if ctrl_c.killed:
            raise KeyboardInterrupt from None
        return rank_exit_code({rank: end.exitcode for rank, end in error.failures.items()})
    except SignalException:
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


@contextlib.contextmanager
def _ranks_know_this_process() -> Iterator[None]:
    """While open, processes that are started can tell whether this one is still there."""
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[LAUNCHER_VARIABLE]


@contextlib.contextmanager
def _signals_go_to_ranks(ctrl_c: "_CtrlC") -> Iterator[None]:
    """While open, a stop signal to this process goes on to the ranks, which decide when to end."""
    handlers: dict[int, Any] = dict.fromkeys(_FORWARDED_SIGNALS, _send_on)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        handlers[signal.SIGINT] = ctrl_c
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_on(number: int, frame: FrameType | None) -> None:
    """Signal handler; before there are ranks, the command ends as it would without a handler."""
    ranks = _ranks()
    _tell(ranks, number)
    if not ranks:
        sys.exit(128 + number)


class _CtrlC:
    """Handler of SIGINT, which the terminal sends to this process and not to the ranks.

    torchrun starts them in sessions of their own.
    """

    def __init__(self) -> None:
        self.killed = False
        """Whether the ranks were killed."""
        self._asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        ranks = _ranks()
        if not ranks:
            raise KeyboardInterrupt
        saves = not self._asked and all(map(_remembers_stop_signals, ranks))
        self._asked, self.killed = True, self.killed or not saves
        if saves:
            os.write(2, f"{_CTRL_C}\n".encode())  # print may be what was interrupted
        _tell(ranks, signal.SIGINT if saves else signal.SIGKILL)


def _ranks() -> list[Any]:
    """The ranks that torchrun's agent has started in this process."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if CONFIG_FLAG in child.cmdline():
                found.append(child)
    return found


def _tell(ranks: list[Any], number: int) -> None:
    import psutil

    # The agent would report as a failure that they end as asked.
    logging.disable(logging.ERROR)
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)


def _remembers_stop_signals(rank: Any) -> bool:
    """Whether a rank has come to where it catches stop signals (``StopSignals``); others would die.

    Python catches SIGINT in every process; SIGUSR1 only who asked for it.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{rank.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)
    return False
