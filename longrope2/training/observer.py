"""What the main rank shows and records while training: a step's report as the design's metrics."""

import math
import resource
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from rich import progress

from longrope2.config import to_plain
from longrope2.files.artifacts import MANIFEST_NAME, write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.shape import ModelShape
from longrope2.rope.factors import Window
from longrope2.tracking.metrics import MetricsLog, progress_line, read_metrics
from longrope2.training.forecast import ForecastCheck, make_forecast, peak_tflops
from longrope2.training.plan import ResolvedRun
from longrope2.training.step import StepReport

# Where the progress line cannot be redrawn (a job's log), a line now and then.
_SECONDS_BETWEEN_LINES = 60.0
# Steps take from a tenth of a second to minutes: the time left is told from the last half hour.
_SPEED_PERIOD_SECONDS = 1800.0


def step_metrics(
    report: StepReport,
    shape: ModelShape,
    *,
    num_devices: int,
    tokens: int,
    memory_gib: float,
    peak: float | None,
) -> dict[str, float | int]:
    """Metrics of one step; a window that did not occur has no entry.

    ``tokens`` are one step's, of all processes; ``memory_gib`` is this process's peak so far;
    without ``peak`` TFLOP/s of a device there is no ``perf/mfu`` (convention: model/shape.py).
    """
    metrics: dict[str, float | int] = {
        "train/loss": report.loss,
        "train/grad_norm": report.gradient_norm,
        "train/learning_rate": report.learning_rate,
        "train/tokens": report.step * tokens,
        "train/skipped_steps": report.skipped_steps,
        "perf/tokens_per_second_per_gpu": tokens / num_devices / report.seconds,
        "perf/step_seconds": report.seconds,
        "perf/memory_peak_gib": memory_gib,
    }
    if peak is not None:
        flops_per_second = shape.training_flops(tokens, report.squared_lengths) / report.seconds
        metrics["perf/mfu"] = flops_per_second / (num_devices * peak * 1e12)
    for window in Window:
        if report.targets_by_window[window]:
            metrics[f"train/loss_{window.value}"] = report.loss_by_window[window]
            metrics[f"perf/micro_step_seconds_{window.value}"] = report.micro_step_seconds[window]
    return metrics


def _going_on(first: int, total: int, repeated: int) -> str:
    """What a resumed run says: from where, and what has to be done again."""
    text = f"going on after step {first} of {total}"
    if repeated:
        text += f"; {repeated} later metric records are removed: their steps are trained again"
    return text


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingObserver:
    """Progress line and metrics of one run, while it is open; on the main rank only."""

    def __init__(self, run: ResolvedRun, first: int) -> None:
        config, machine, folder = run.config, run.machine, run.folder
        self._run, self._shape = run, ModelShape.from_folder(run.model_folder)
        # The first record after a resume carries where it began.
        self._resumed_after = {"train/resumed_after_step": first} if first else {}
        peak = config.training.peak_tflops
        self._peak = peak_tflops(machine.device, peak, bf16=machine.bf16)
        facts = to_plain(config) | machine.kernels()
        self._metrics = MetricsLog(
            folder, tracking=config.tracking, run_name=config.run.name, stage="train", config=facts
        )
        repeated = self._metrics.forget_after(first)
        write_text(folder / FACTORS_FILE, run.factors.to_json())
        self._metrics.log_files("config", [folder / "config.yaml"])
        self._metrics.log_files("factors", [folder / FACTORS_FILE])
        self._metrics.log_files("segments", [run.segments_folder / MANIFEST_NAME])
        counted = progress.TextColumn("{task.completed:.0f}/{task.total:.0f}")
        self._progress = progress_line("train", counted, _SPEED_PERIOD_SECONDS)
        self._last_line = time.monotonic()
        self._task = self._progress.add_task("", total=run.total_steps, completed=first)
        self._check = ForecastCheck(make_forecast(run), self._progress.console.print)
        if first or repeated:
            self._progress.console.print(_going_on(first, run.total_steps, repeated))

    def __enter__(self) -> "TrainingObserver":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
        self._metrics.close()

    def finished(self) -> None:
        """The product is complete: keep its manifest with the metrics."""
        self._metrics.log_files("manifest", [self._run.folder / MANIFEST_NAME])

    def record_before(self, heldout: Mapping[str, float]) -> None:
        """A record of the held-out losses before the first step; once, whoever starts again."""
        if all(record.get("step") != 0 for record in read_metrics(self._run.folder)):
            self._metrics.log({"train/tokens": 0, **heldout}, step=0)

    def record(self, report: StepReport, heldout: Mapping[str, float]) -> None:
        """One metrics record and the progress line.

        A skipped step, and one after which held-out text was measured, is always recorded.
        """
        device, training = self._run.machine.device, self._run.config.training
        memory = memory_peak_gib(device)
        self._check.see(report.step, report, memory if device.type == "cuda" else None)
        self._show(report)
        if report.step % training.log_steps == 0 or not report.applied or heldout:
            values = step_metrics(
                report,
                self._shape,
                num_devices=self._run.world_size,
                tokens=training.global_batch_tokens,
                memory_gib=memory,
                peak=self._peak,
            )
            self._metrics.log({**values, **heldout, **self._resumed_after}, step=report.step)
            self._resumed_after = {}

    def _show(self, report: StepReport) -> None:
        """The progress line; now and then a line of its own where that cannot be redrawn."""
        losses = report.loss_by_window.items()
        loss = ", ".join(f"{w.value} {loss:.3f}" for w, loss in losses if not math.isnan(loss))
        self._progress.update(self._task, completed=report.step, description=f"loss {loss}")
        silent = time.monotonic() - self._last_line
        if self._progress.console.is_terminal or silent < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        seconds = self._progress.tasks[self._task].time_remaining
        left = "time left not known yet"
        if seconds is not None:
            left = f"{timedelta(seconds=int(seconds))} left"
        line = f"{time.strftime('%F %T')}  step {report.step}: loss {loss}; {left}"
        self._progress.console.print(line)
