"""The DeepSpeed engine around the windowed model."""

from typing import Any

import torch

from longrope2.model import WindowedModel, choose_norm, load_windowed_model, use_norm
from longrope2.parallel import Processes
from longrope2.training.config import TrainRoot, compute_dtype
from longrope2.training.deepspeed_settings import deepspeed_settings
from longrope2.training.optimizer import make_optimizer
from longrope2.training.plan import TrainingPlan
from longrope2.training.recompute import apply_recompute
from longrope2.training.shares import RankShares

__all__ = ["make_engine", "take_in_shares", "wrap_model"]


def make_engine(config: TrainRoot, plan: TrainingPlan, processes: Processes) -> Any:
    """Load the model and wrap it; every rank calls this. Under ZeRO-3 no rank ever holds the whole model."""
    torch.manual_seed(config.seed)
    dtype = compute_dtype(config.training.precision, processes.device)
    micro_steps = plan.schedule.segments_per_step // processes.dims.data
    shares = _shares(config, processes, micro_steps, dtype)
    model = load_windowed_model(
        plan.model_folder,
        plan.factors,
        device=processes.device,
        dtype=dtype,
        from_scratch=config.model.from_scratch,
        take=shares.take if shares else None,
        read=processes.is_main,
    )
    return wrap_model(model, config, processes, micro_steps=micro_steps, dtype=dtype)


def take_in_shares(
    model: WindowedModel, config: TrainRoot, processes: Processes, *, micro_steps: int, dtype: torch.dtype
) -> None:
    """Under ZeRO-3, leave each rank its share of a model that is whole; arguments as for ``wrap_model``."""
    shares = _shares(config, processes, micro_steps, dtype)
    if shares is not None:
        for parameter in model.parameters():
            shares.take(parameter)


def wrap_model(
    model: WindowedModel, config: TrainRoot, processes: Processes, *, micro_steps: int, dtype: torch.dtype
) -> Any:
    """The DeepSpeed engine that the configuration asks for, around a model; every rank calls this.

    Args:
        model: On the device, or in shares.
        config: The run.
        processes: This process among the others.
        micro_steps: Micro-steps of one optimizer step.
        dtype: Number format of the model's weights.
    """
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    use_norm(model.hf, choose_norm(config.training.norm, processes.device, dtype).kernel)
    apply_recompute(model.hf, config.training.recompute, offload=config.training.offload_activations)
    model.train()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.training, offloaded=config.zero.offload_optimizer),  # type: ignore[arg-type]
        config=_settings(config, micro_steps, dtype),
        mpu=processes.mpu,
    )
    return engine


def _shares(config: TrainRoot, processes: Processes, micro_steps: int, dtype: torch.dtype) -> RankShares | None:
    """What keeps this rank's part of each parameter; None where ranks hold the whole model."""
    if config.parallel.zero_stage < 3:
        return None
    return RankShares(_settings(config, micro_steps, dtype), processes.mpu, dtype)


def _settings(config: TrainRoot, micro_steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run."""
    return deepspeed_settings(
        config.training, config.parallel, config.zero, micro_steps=micro_steps, bf16=dtype is torch.bfloat16
    )
