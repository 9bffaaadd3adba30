"""The DeepSpeed engine around the windowed model."""

from typing import Any

import torch

from longrope2.model import WindowedModel, load_windowed_model
from longrope2.parallel import Processes
from longrope2.training.config import Precision, Recompute, TrainRoot
from longrope2.training.optimizer import deepspeed_settings, make_optimizer
from longrope2.training.plan import TrainingPlan

__all__ = ["make_engine", "uses_bf16"]


def make_engine(config: TrainRoot, plan: TrainingPlan, processes: Processes) -> Any:
    """Load the model and wrap it; every rank calls this."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    torch.manual_seed(config.seed)
    bf16 = uses_bf16(config.training.precision, processes.device)
    model: WindowedModel = load_windowed_model(
        plan.model_folder,
        plan.factors,
        device=processes.device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        from_scratch=config.model.from_scratch,
    )
    if config.training.recompute is Recompute.full:
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    micro_steps = plan.schedule.segments_per_step // processes.dims.data
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.training),  # type: ignore[arg-type]
        config=deepspeed_settings(config.training, config.parallel, micro_steps=micro_steps, bf16=bf16),
        mpu=processes.mpu,
    )
    return engine


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto``: bf16 where the hardware is made for it."""
    return precision is Precision.bf16 or (precision is Precision.auto and device.type == "cuda")
