"""What the main rank shows and records while training.

A step's report as the metrics of the design document.
"""

import math
import resource
import time
from datetime import timedelta
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longrope2.config import to_plain
from longrope2.files.artifacts import MANIFEST_NAME, write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.shape import ModelShape
from longrope2.parallel.processes import Processes
from longrope2.rope.factors import Window
from longrope2.tracking.metrics import MetricsLog
from longrope2.training.config import TrainRoot, compute_dtype
from longrope2.training.forecast import Forecast, ForecastCheck, make_forecast, peak_tflops
from longrope2.training.plan import MachineKernels, TrainingPlan
from longrope2.training.step import StepReport

# Where the progress line cannot be redrawn (a job's log), a line now and then.
SECONDS_BETWEEN_LINES = 60.0
# Steps take from a tenth of a second to minutes: the time left is told from the last half hour.
SPEED_PERIOD_SECONDS = 1800.0


def step_metrics(
    report: StepReport,
    processes: Processes,
    shape: ModelShape,
    *,
    learning_rate: float,
    step_tokens: int,
    tokens: int,
    skipped_steps: int,
    peak_tflops: float | None,
) -> dict[str, float | int]:
    """Metrics of one step; a window that did not occur has no entry, and ``perf/mfu`` none without
    a peak.

    Args:
        report: What the step did.
        processes: For the number of processes and the device.
        shape: Sizes of the model; model/shape.py has the convention of ``perf/mfu``.
        learning_rate: Learning rate the step used.
        step_tokens: Tokens of this step, all processes.
        tokens: Tokens trained so far, all processes.
        skipped_steps: Steps refused since the start of the run.
        peak_tflops: Peak TFLOP/s of one device, or None when it is not known.
    """
    num_devices = processes.dims.world_size
    metrics: dict[str, float | int] = {
        "train/loss": report.loss,
        "train/grad_norm": report.gradient_norm,
        "train/learning_rate": learning_rate,
        "train/tokens": tokens,
        "train/skipped_steps": skipped_steps,
        "perf/tokens_per_second_per_gpu": step_tokens / num_devices / report.seconds,
        "perf/step_seconds": report.seconds,
        "perf/memory_peak_gib": memory_peak_gib(processes.device),
    }
    if peak_tflops is not None:
        flops_per_second = (
            shape.training_flops(step_tokens, report.squared_lengths) / report.seconds
        )
        metrics["perf/mfu"] = flops_per_second / (num_devices * peak_tflops * 1e12)
    for window in Window:
        if report.targets_by_window[window]:
            metrics[f"train/loss_{window.value}"] = report.loss_by_window[window]
            metrics[f"perf/micro_step_seconds_{window.value}"] = report.micro_step_seconds[window]
    return metrics


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far: GPU memory allocated by torch, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingObserver:
    """Progress line and metrics of one run, from ``with`` to the end of it; open on the main rank only."""

    def __init__(
        self,
        config: TrainRoot,
        plan: TrainingPlan,
        folder: Path,
        first: int,
        processes: Processes,
        kernels: MachineKernels,
    ) -> None:
        self._config = config
        self._folder = folder
        self._processes = processes
        self._shape = ModelShape.from_folder(plan.model_folder)
        bf16 = compute_dtype(config.training.precision, processes.device) is torch.bfloat16
        self._peak_tflops = peak_tflops(processes.device, config.training.peak_tflops, bf16=bf16)
        facts = {
            **to_plain(config),
            "attention_kernel": str(kernels.attention),
            "norm_kernel": str(kernels.norm),
        }
        self._metrics = MetricsLog(folder, config.tracking, config.run.name, "train", facts)
        write_text(folder / FACTORS_FILE, plan.factors.to_json())
        self._metrics.log_files("config", [folder / "config.yaml"])
        self._metrics.log_files("factors", [folder / FACTORS_FILE])
        self._metrics.log_files("segments", [plan.segments_folder / MANIFEST_NAME])
        columns = (
            TextColumn("train"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, speed_estimate_period=SPEED_PERIOD_SECONDS)
        self._last_line = time.monotonic()
        self._task = self._progress.add_task("", total=plan.total_steps, completed=first)
        self._check = ForecastCheck(self._forecast(plan), self._progress.console.print)

    def _forecast(self, plan: TrainingPlan) -> Forecast:
        """What the planner expects on this device."""
        return make_forecast(
            self._config,
            plan.model_folder,
            self._processes.dims.world_size,
            total_tokens=plan.total_steps * self._config.training.global_batch_tokens,
            long_share=len(plan.schedule.long_ids)
            / (len(plan.schedule.long_ids) + len(plan.schedule.short_ids)),
            device=self._processes.device,
        )

    def __enter__(self) -> "TrainingObserver":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
        self._metrics.close()

    def finished(self) -> None:
        """The product is complete: keep its manifest with the metrics."""
        self._metrics.log_files("manifest", [self._folder / MANIFEST_NAME])

    def record(self, steps_done: int, lr: float, report: StepReport, skipped_steps: int) -> None:
        """One metrics record and the progress line; a skipped step is always recorded."""
        on_gpu = self._processes.device.type == "cuda"
        self._check.see(
            steps_done, report, memory_peak_gib(self._processes.device) if on_gpu else None
        )
        parts = [
            f"{w.value} {loss:.3f}"
            for w, loss in report.loss_by_window.items()
            if not math.isnan(loss)
        ]
        self._progress.update(
            self._task, completed=steps_done, description="loss " + ", ".join(parts)
        )
        if (
            not self._progress.console.is_terminal
            and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            left = self._progress.tasks[self._task].time_remaining
            self._progress.console.print(
                f"{time.strftime('%F %T')}  step {steps_done}: loss {', '.join(parts)}; "
                f"{'time left not known yet' if left is None else f'{timedelta(seconds=int(left))} left'}"
            )
        if steps_done % self._config.training.log_steps == 0 or not report.applied:
            step_tokens = self._config.training.global_batch_tokens
            values = step_metrics(
                report,
                self._processes,
                self._shape,
                learning_rate=lr,
                step_tokens=step_tokens,
                tokens=steps_done * step_tokens,
                skipped_steps=skipped_steps,
                peak_tflops=self._peak_tflops,
            )
            self._metrics.log(values, step=steps_done)
