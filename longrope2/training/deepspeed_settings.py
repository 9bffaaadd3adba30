"""DeepSpeed's dictionary from typed fields; nothing else in this project writes to it, and no DeepSpeed JSON is kept."""

from typing import Any

from longrope2.parallel import ParallelConfig
from longrope2.training.config import TrainingConfig
from longrope2.training.zero import CommunicationType, ZeroConfig

__all__ = ["deepspeed_settings"]

NEVER = 1_000_000_000


def deepspeed_settings(
    training: TrainingConfig, parallel: ParallelConfig, zero: ZeroConfig, *, micro_steps: int, bf16: bool
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given; one segment per micro-step and process group.

    Without ZeRO and in float32 DeepSpeed clips but does not report the norm: there ``run_step`` clips instead.

    Args:
        training: For clipping.
        parallel: For the stage and the size below which parameters stay whole.
        zero: Everything else about ZeRO.
        micro_steps: Micro-steps of one optimizer step.
        bf16: Forward and backward in bf16 with float32 master weights.
    """
    clips_itself = parallel.zero_stage > 0 or bf16
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": training.gradient_clip if clips_itself else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": _zero_section(parallel, zero),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam is compiled on first use; torch's is there
        "seq_parallel_communication_data_type": _sequence_gradient_dtype(zero, bf16=bf16).value,
        "steps_per_print": NEVER,
    }
    if zero.gradient_dtype is not CommunicationType.auto:
        settings["communication_data_type"] = zero.gradient_dtype.value
    if bf16 and parallel.zero_stage >= 2:
        # DeepSpeed would add up the micro-steps in bf16, 8 bits for 64 of them on 8 GPUs. Stages 0 and 1 know no other way.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _sequence_gradient_dtype(zero: ZeroConfig, *, bf16: bool) -> CommunicationType:
    """DeepSpeed has no word for ``auto`` here: the format of the forward pass by name."""
    if zero.sequence_gradient_dtype is not CommunicationType.auto:
        return zero.sequence_gradient_dtype
    return CommunicationType.bf16 if bf16 else CommunicationType.fp32


def _zero_section(parallel: ParallelConfig, zero: ZeroConfig) -> dict[str, Any]:
    """The keys that the stage reads.

    ``reduce_scatter`` stays on: with it ZeRO-3 divides gradients by the whole world, as ``gradient_scale`` assumes.
    """
    section: dict[str, Any] = {"stage": parallel.zero_stage, "reduce_scatter": True}
    if parallel.zero_stage == 0:
        return section
    section["reduce_bucket_size"] = zero.reduce_bucket_elements
    if zero.overlap_communication is not None:
        section["overlap_comm"] = zero.overlap_communication
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": zero.pin_memory}
    if parallel.zero_stage < 3:
        section["allgather_bucket_size"] = zero.gather_bucket_elements
        return section
    return section | {
        "stage3_param_persistence_threshold": parallel.replicate_below,
        "stage3_prefetch_bucket_size": zero.prefetch_elements,
        "stage3_max_live_parameters": zero.max_live_elements,
        "zero_hpz_partition_size": zero.hpz_size,
    }
