"""A step's report as the metrics of the design document."""

import resource

import torch

from longrope2.parallel import Processes
from longrope2.rope import Window
from longrope2.training.flops import TrainingCost
from longrope2.training.step import StepReport

__all__ = ["memory_peak_gib", "step_metrics"]


def step_metrics(
    report: StepReport,
    processes: Processes,
    cost: TrainingCost,
    *,
    learning_rate: float,
    step_tokens: int,
    tokens: int,
    skipped_steps: int,
    peak_tflops: float | None,
) -> dict[str, float | int]:
    """Metrics of one step; a window that did not occur has no entry, and ``perf/mfu`` none without a peak.

    Args:
        report: What the step did.
        processes: For the number of processes and the device.
        cost: FLOPs of the model; the convention of ``perf/mfu`` is described in ``flops.py``.
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
        flops_per_second = cost.flops(step_tokens, report.squared_lengths) / report.seconds
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
