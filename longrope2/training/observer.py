"""What the main rank shows and records while training."""

import math
import time
from datetime import timedelta
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longrope2.artifacts import MANIFEST_NAME, write_text
from longrope2.config import to_plain
from longrope2.model import FACTORS_FILE
from longrope2.parallel import Processes
from longrope2.tracking import MetricsLog
from longrope2.training.config import TrainRoot, compute_dtype
from longrope2.training.flops import TrainingCost, peak_tflops
from longrope2.training.forecast import Forecast, ForecastCheck, make_forecast
from longrope2.training.machine import MachineKernels
from longrope2.training.plan import TrainingPlan
from longrope2.training.report import memory_peak_gib, step_metrics
from longrope2.training.step import StepReport

__all__ = ["TrainingObserver"]

# Where the progress line cannot be redrawn (a job's log), a line now and then.
SECONDS_BETWEEN_LINES = 60.0
# Steps take from a tenth of a second to minutes: the time left is told from the last half hour.
SPEED_PERIOD_SECONDS = 1800.0


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
        self._cost = TrainingCost.from_config(plan.model_folder)
        bf16 = compute_dtype(config.training.precision, processes.device) is torch.bfloat16
        self._peak_tflops = peak_tflops(processes.device, config.training.peak_tflops, bf16=bf16)
        facts = {**to_plain(config), "attention_kernel": str(kernels.attention), "norm_kernel": str(kernels.norm)}
        self._metrics = MetricsLog(folder, config.tracking, config.run.name, "train", facts)
        write_text(folder / FACTORS_FILE, plan.factors.to_json())
        self._metrics.log_files("config", [folder / "config.yaml"])
        self._metrics.log_files("factors", [folder / FACTORS_FILE])
        self._metrics.log_files("segments", [plan.segments_folder / MANIFEST_NAME])
        columns = (TextColumn("train"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                   TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
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
            long_share=len(plan.schedule.long_ids) / (len(plan.schedule.long_ids) + len(plan.schedule.short_ids)),
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
        self._check.see(steps_done, report, memory_peak_gib(self._processes.device) if on_gpu else None)
        parts = [f"{w.value} {loss:.3f}" for w, loss in report.loss_by_window.items() if not math.isnan(loss)]
        self._progress.update(self._task, completed=steps_done, description="loss " + ", ".join(parts))
        if not self._progress.console.is_terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = self._progress.tasks[self._task].time_remaining
            self._progress.console.print(
                f"{time.strftime('%F %T')}  step {steps_done}: loss {', '.join(parts)}; "
                f"{'time left not known yet' if left is None else f'{timedelta(seconds=int(left))} left'}"
            )
        if steps_done % self._config.training.log_steps == 0 or not report.applied:
            step_tokens = self._config.training.global_batch_tokens
            values = step_metrics(
                report, self._processes, self._cost, learning_rate=lr, step_tokens=step_tokens,
                tokens=steps_done * step_tokens, skipped_steps=skipped_steps, peak_tflops=self._peak_tflops,
            )  # fmt: skip
            self._metrics.log(values, step=steps_done)
