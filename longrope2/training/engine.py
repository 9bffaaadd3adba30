"""The DeepSpeed engine around the windowed model."""

from typing import Any

import torch

from longrope2.model import WindowedModel, load_windowed_model
from longrope2.parallel import Processes
from longrope2.training.config import Recompute, TrainRoot, compute_dtype
from longrope2.training.deepspeed_settings import deepspeed_settings
from longrope2.training.optimizer import make_optimizer
from longrope2.training.plan import TrainingPlan

__all__ = ["make_engine"]


def make_engine(config: TrainRoot, plan: TrainingPlan, processes: Processes) -> Any:
    """Load the model and wrap it; every rank calls this."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    torch.manual_seed(config.seed)
    dtype = compute_dtype(config.training.precision, processes.device)
    model: WindowedModel = load_windowed_model(
        plan.model_folder,
        plan.factors,
        device=processes.device,
        dtype=dtype,
        from_scratch=config.model.from_scratch,
    )
    if config.training.recompute is Recompute.full:
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    micro_steps = plan.schedule.segments_per_step // processes.dims.data
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.training, offloaded=config.zero.offload_optimizer),  # type: ignore[arg-type]
        config=deepspeed_settings(
            config.training, config.parallel, config.zero, micro_steps=micro_steps, bf16=dtype is torch.bfloat16
        ),
        mpu=processes.mpu,
    )
    return engine
