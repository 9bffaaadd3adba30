"""What the planner expects of a run, said before it starts and compared with what is measured.

Memory is foretold under ZeRO-3, time where the GPU's rates are known; the node's size is what the
process sees, the network the planner's default.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from longrope2.model.shape import ASSUMED_LONG_SHARE, ModelShape, Workload
from longrope2.planning import hardware
from longrope2.planning.hardware import HardwareConfig, Machine
from longrope2.planning.memory import Layout, MemoryUse, predict_memory
from longrope2.planning.timing import predict_time
from longrope2.rope.factors import Window
from longrope2.training.machine import configured_layout
from longrope2.training.plan import ResolvedRun
from longrope2.training.step import StepReport

GIB = 2**30
_TOLERANCE = 0.15
# The first steps of a process allocate, compile and fill caches.
_WARM_UP_STEPS = 3
_MOMENTS = {"loss": "the loss", "layer": "the backward pass", "update": "the update"}
_HINTS = {
    "step time": "; its rates are assumptions (python -m launch.plan), "
    "but a kernel or the network may be slow",
    "GPU memory": "",
}


@dataclass(frozen=True)
class Forecast:
    """The planner's view of one run."""

    shape: ModelShape
    workload: Workload
    layout: Layout
    memory: MemoryUse | None
    """None without ZeRO-3, whose memory is the one that is modelled."""
    machine: Machine | None
    """None on hardware without known rates."""
    assumes_mix: bool = False
    """Whether there are no segments yet whose mix it would be of."""

    def line(self) -> str:
        """One line for the start of a run."""
        work = self.workload
        flops = work.step_tokens * work.mean_model_flops(self.shape)
        words = [
            f"{self.shape.parameters / 1e6:,.1f} M parameters",
            f"{flops:.3g} FLOPs a step with {100 * work.long_share:.0f} % long"
            f"{' (assumed: there are no segments yet)' if self.assumes_mix else ''}",
        ]
        if self.memory is not None:
            number_format, most = "bf16" if self.layout.bf16 else "fp32", self.memory.peak_moment
            gib = f"{self.memory.peak / GIB:.3g} GiB a process in {number_format}"
            words.append(f"{gib}, most in {_MOMENTS[most]}")
        if self.machine is None:
            words.append("time unknown: no rates for this device")
        else:
            time = predict_time(self.shape, work, self.layout, self.machine)
            words.append(f"{time.step_seconds:.3g} s a step on {self.machine.name}")
            words.append(f"{time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU")
            words += [f"{time.hours:.3g} h in all"] if work.total_tokens else []
        return f"planner    {'; '.join(words)}"

    def step_seconds(self, report: StepReport) -> float | None:
        """Expected of a step with the segments and documents it really had; None without rates."""
        if self.machine is None:
            return None
        work, targets = self.workload, report.targets_by_window
        share = targets[Window.LONG] / max(1, sum(targets.values()))
        num_long = round(share * work.segments_per_step)
        short_tokens = (work.segments_per_step - num_long) * work.target_len
        short_squares = report.squared_lengths - num_long * work.target_len**2
        documents = short_squares / short_tokens if short_tokens else work.short_document_tokens
        share = num_long / work.segments_per_step
        seen = replace(work, long_share=share, short_document_tokens=documents)
        return predict_time(self.shape, seen, self.layout, self.machine).step_seconds


class ForecastCheck:
    """Warns, once each, when step time or GPU memory is off by more than ``_TOLERANCE``."""

    def __init__(self, forecast: Forecast, warn: Callable[[str], None]) -> None:
        self._forecast, self._warn, self._steps_seen = forecast, warn, 0
        self._open = {"step time", "GPU memory"}

    def see(self, step: int, report: StepReport, memory_gib: float | None) -> None:
        """Compare one step.

        ``memory_gib`` is the peak of the GPU so far; None on a CPU, whose resident memory holds
        more than tensors.
        """
        self._steps_seen += 1
        if self._steps_seen <= _WARM_UP_STEPS or not report.applied:
            return
        expected = self._forecast.step_seconds(report)
        if expected is not None:
            self._compare("step time", report.seconds, expected, unit="s", step=step)
        if memory_gib is not None and self._forecast.memory is not None:
            peak = self._forecast.memory.peak / GIB
            self._compare("GPU memory", memory_gib, peak, unit="GiB", step=step)

    def _compare(
        self, what: str, measured: float, expected: float, *, unit: str, step: int
    ) -> None:
        """Warn the first time a measurement is out."""
        if what not in self._open or abs(measured / expected - 1) <= _TOLERANCE:
            return
        self._open.remove(what)
        percent = 100 * (measured / expected - 1)
        self._warn(
            f"warning: {what} at step {step} is {measured:.3g} {unit}, {percent:+.0f} % against "
            f"the planner's {expected:.3g} {unit}{_HINTS[what]}"
        )


def make_forecast(run: ResolvedRun) -> Forecast:
    """What to expect of a run; ``ASSUMED_LONG_SHARE`` where there are no segments yet to tell."""
    config, training, parallel = run.config, run.config.training, run.config.parallel
    layout = replace(
        configured_layout(
            config, run.world_size, bf16=run.machine.bf16, norm=run.machine.norm.kernel
        ),
        recompute_layers=run.recompute_layers,
    )
    share = run.schedule.long_share if training.mixed else 1.0
    workload = Workload(
        target_len=config.target_len,
        step_tokens=training.global_batch_tokens,
        total_tokens=run.total_steps * training.global_batch_tokens,
        long_share=ASSUMED_LONG_SHARE if share is None else share,
        short_document_tokens=config.model.original_len / 2,
    )
    shape = ModelShape.from_folder(run.model_folder)
    memory = predict_memory(shape, workload, layout) if parallel.zero_stage == 3 else None
    machine = _machine(run.machine.device, run.world_size) if layout.bf16 else None
    return Forecast(
        shape, workload, layout, memory=memory, machine=machine, assumes_mix=share is None
    )


def _machine(device: torch.device, world_size: int) -> Machine | None:
    """The cluster this process is part of, as far as it sees it."""
    kind = hardware.find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if kind is None:
        return None
    per_node = torch.cuda.device_count()
    gpus = HardwareConfig(gpu=kind, num_gpus=world_size, gpus_per_node=per_node)
    return hardware.make_machine(gpus)


def peak_tflops(device: torch.device, configured: float | None, *, bf16: bool) -> float | None:
    """Of one device: ``training.peak_tflops`` if given, else the bf16 peak of a known GPU."""
    if configured is not None or device.type != "cuda" or not bf16:
        return configured
    name = torch.cuda.get_device_name(device)
    peaks = hardware.PEAK_BF16_TFLOPS
    return next((peaks[part] for part in peaks if re.search(rf"\b{part}\b", name)), None)
