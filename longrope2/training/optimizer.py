"""AdamW's implementations and parameter groups, and the learning rate of a step."""

import math
from typing import Any

import torch
from torch import nn

from longrope2.kernel_choice import apex_fault
from longrope2.training.config import OptimizerKind, TrainingConfig


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Of optimizer step ``step`` (0-based): linear warm-up, then a cosine to the floor.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    warmup = min(training.warmup_steps, total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    floor = training.min_learning_rate_ratio
    return training.learning_rate * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Parameters by weight decay; groups without parameters are left out.

    Matrices decay; norms, biases and embeddings do with ``decay_norms_and_embeddings`` only. A tied
    LM head is the embedding; an untied one is a matrix.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(table.weight) for table in tables}
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
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, training: TrainingConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay, as ``training.optimizer`` asks.

    ``fused``: torch's update in one kernel on a CPU too, as for parameters and state that DeepSpeed
    keeps there (``zero.offload_optimizer``).
    """
    groups, betas = parameter_groups(model, training), (training.beta1, training.beta2)
    settings: dict[str, Any] = {"lr": training.learning_rate, "betas": betas}
    if training.optimizer is OptimizerKind.deepspeed_fused_adam:
        from deepspeed.ops.adam import FusedAdam  # compiled for the GPU on first use

        return FusedAdam(groups, adam_w_mode=True, **settings)
    if training.optimizer is OptimizerKind.apex_fused_adam:
        from apex.optimizers import FusedAdam as ApexFusedAdam  # pyright: ignore[reportMissingImports]

        return ApexFusedAdam(groups, adam_w_mode=True, **settings)
    in_one_kernel = True if fused or groups[0]["params"][0].is_cuda else None
    return torch.optim.AdamW(groups, fused=in_one_kernel, **settings)


def optimizer_fault(kind: OptimizerKind, device: torch.device) -> str | None:
    """Why an implementation cannot be used on a device; None when it can."""
    if kind is OptimizerKind.torch_adamw:
        return None
    prefix = f"training.optimizer={kind.value} cannot run here: "
    if kind is OptimizerKind.apex_fused_adam and (fault := apex_fault()):
        return f"{prefix}{fault}; build NVIDIA's from github.com/NVIDIA/apex, or use torch_adamw"
    if device.type != "cuda":
        return f"{prefix}it needs a CUDA device, this is {device.type}; use torch_adamw"
    return None
