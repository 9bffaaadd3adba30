"""AdamW's parameter groups, the learning rate of a step, and DeepSpeed's settings from typed fields."""

import math
from typing import Any

import torch
from torch import nn

from longrope2.parallel import ParallelConfig
from longrope2.training.config import TrainingConfig

__all__ = ["deepspeed_settings", "learning_rate", "make_optimizer"]


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step`` (0-based): linear warm-up, then a cosine to the floor.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    warmup = min(training.warmup_steps, total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    floor = training.min_learning_rate_ratio
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices only, unless ``decay_norms_and_embeddings``."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, plain = [], []
    for parameter in model.parameters():
        # Under ZeRO-3 a sharded parameter reports an empty shape; ds_shape holds the real one.
        rank = len(getattr(parameter, "ds_shape", parameter.shape))
        is_matrix = rank > 1 and id(parameter) not in embeddings
        (decayed if is_matrix or training.decay_norms_and_embeddings else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
    )


def deepspeed_settings(
    training: TrainingConfig, parallel: ParallelConfig, *, micro_steps: int, bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's dictionary; one segment per micro-step and process group.

    ``reduce_scatter`` stays on: with it ZeRO-3 divides gradients by the whole world, as ``gradient_scale`` assumes.
    Without ZeRO and in float32 DeepSpeed clips but does not report the norm: there ``run_step`` clips instead.
    """
    clips_itself = parallel.zero_stage > 0 or bf16
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": training.gradient_clip if clips_itself else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_scatter": True,
            "stage3_param_persistence_threshold": parallel.replicate_below,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
