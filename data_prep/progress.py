"""Progress of a stage on stderr: a bar with tokens a second and time left on a terminal, one line otherwise."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["StageProgress"]


class StageProgress:
    """Shows how far a stage is.

    Args:
        title: What is being done, a participle.
        num_units: Units of work.
        sizes: Size of each unit (bytes, tokens), where the bar and the time left go by size; all known or none.
    """

    def __init__(self, title: str, num_units: int, sizes: list[int] | None = None) -> None:
        self._title, self._num_units, self._sizes = title, num_units, sizes
        self._tokens = 0
        done = MofNCompleteColumn() if sizes is None else TextColumn("{task.percentage:.0f}%")
        columns = (TextColumn("{task.description}"), BarColumn(), done, TextColumn("{task.fields[rate]}"))
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )

    def __enter__(self) -> "StageProgress":
        total = self._num_units if self._sizes is None else max(1, sum(self._sizes))
        self._began = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None and self._num_units:
            print(f"{self._title}: {self._num_units} units, {self._rate()}", file=sys.stderr)

    def advance(self, number: int, tokens: int) -> None:
        """Unit ``number`` is done and had ``tokens`` tokens."""
        self._tokens += tokens
        step = 1 if self._sizes is None else self._sizes[number]
        self._bar.update(self._task, advance=step, rate=self._rate())

    def _rate(self) -> str:
        seconds = max(1e-6, time.monotonic() - self._began)
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"
