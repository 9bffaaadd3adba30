"""Train a tiny random Llama with steps that must be refused, beside a twin; write what came out.

Arguments: OUTPUT.json, then one ``zero_stage:precision`` per case; precision ``offload`` is fp32
with the optimizer on the CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from parity_worker import SegmentsInMemory, factors, tiny_llama
from torch import Tensor

from longrope2.model import windowed
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig, ParallelDims
from longrope2.parallel.processes import join_processes, leave_processes
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import load_rank_batch
from longrope2.training.config import TrainingConfig, ZeroConfig
from longrope2.training.engine import deepspeed_settings
from longrope2.training.optimizer import make_optimizer
from longrope2.training.step import StepGuard, run_step

KINDS = "SL"
MAX_NORM = 1e4
plain_loss = windowed.token_loss_sum


def nan_loss(hidden_TH: Tensor, *parts: Tensor, **options: Any) -> Tensor:
    return plain_loss(hidden_TH, *parts, **options) * float("nan")


def huge_loss(hidden_TH: Tensor, *parts: Tensor, **options: Any) -> Tensor:
    return plain_loss(hidden_TH, *parts, **options) * 1e6


def infinite_gradient(hidden_TH: Tensor, *parts: Tensor, **options: Any) -> Tensor:
    """An ordinary loss whose gradient overflows."""
    poisoned_TH = hidden_TH.clone()
    poisoned_TH.register_hook(lambda gradient_TH: gradient_TH * float("inf"))
    return plain_loss(poisoned_TH, *parts, **options)


def run(zero_stage: int, precision: str, losses: list[Any]) -> dict:
    """One optimizer step per loss function; the weights, the optimizer's state and the reports."""
    import deepspeed

    bf16, zero = (
        precision == "bf16",
        ZeroConfig(offload_optimizer=precision == "offload", pin_memory=False),
    )
    parallel = ParallelConfig(zero_stage=zero_stage, replicate_below=0)
    training = TrainingConfig(learning_rate=1e-2, gradient_clip=0.5)
    dims = ParallelDims.from_world(1, 1)
    model = WindowedModel(tiny_llama("2").to(torch.bfloat16 if bf16 else torch.float32), factors())
    store = SegmentsInMemory(KINDS)
    micro = [MicroStep(store.segment(i).window, (i,)) for i in range(len(KINDS))]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, training, fused=zero.offload_optimizer),
        config=deepspeed_settings(training, parallel, zero, micro_steps=len(micro), bf16=bf16),
    )
    guard = StepGuard(engine, MAX_NORM, clip=0.5)
    reports = []
    for loss in losses:
        with patch.object(windowed, "token_loss_sum", loss):
            batches = [load_rank_batch(store, m, dims, None) for m in micro]
            reports.append(run_step(guard, batches, dims, learning_rate=1e-2))
    weights = []
    for _, parameter in model.hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights.append(parameter.detach().double().sum().item())
    state = [
        {
            name: value.double().sum().item()
            for name, value in entry.items()
            if torch.is_tensor(value)
        }
        for entry in engine.basic_optimizer.state.values()
    ]
    return {
        "weights": weights,
        "state": state,
        "applied": [r.applied for r in reports],
        "losses": [r.loss for r in reports],
        "norms": [r.gradient_norm for r in reports],
    }


def main() -> None:
    torch.set_num_threads(1)
    join_processes(ParallelConfig())
    results = {}
    for case in sys.argv[2:]:
        stage, precision = case.split(":")
        results[case] = {
            "guarded": run(
                int(stage),
                precision,
                [plain_loss, nan_loss, infinite_gradient, huge_loss, plain_loss],
            ),
            "twin": run(int(stage), precision, [plain_loss, plain_loss]),
            "once": run(int(stage), precision, [plain_loss]),
        }
    Path(sys.argv[1]).write_text(json.dumps(results))
    leave_processes()


if __name__ == "__main__":
    main()
