"""A step's report as the metrics of the design document, and the FLOPs convention behind them."""

import resource

import torch

from longrope2.parallel import Processes
from longrope2.rope import Window
from longrope2.training.config import TrainRoot
from longrope2.training.step import StepReport

__all__ = ["memory_peak_gib", "step_metrics"]


def step_metrics(
    report: StepReport, lr: float, tokens: int, skipped_steps: int, config: TrainRoot, processes: Processes
) -> dict[str, float | int]:
    """Metrics of one step; a window that did not occur has no entry.

    Args:
        report: What the step did.
        lr: Learning rate it used.
        tokens: Tokens trained so far, all processes.
        skipped_steps: Steps refused since the start of the run.
        config: For the batch size.
        processes: For the number of processes and the device.
    """
    per_process = config.training.global_batch_tokens / processes.dims.world_size
    metrics: dict[str, float | int] = {
        "train/loss": report.loss,
        "train/grad_norm": report.gradient_norm,
        "train/learning_rate": lr,
        "train/tokens": tokens,
        "train/skipped_steps": skipped_steps,
        "perf/tokens_per_second_per_gpu": per_process / report.seconds,
        "perf/step_seconds": report.seconds,
        "perf/memory_peak_gib": memory_peak_gib(processes.device),
    }
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
