"""The DeepSpeed engine around the windowed model.

DeepSpeed's dictionary comes from typed fields; nothing else in this project writes to it, and no
DeepSpeed JSON is kept.

``training.recompute`` says what the backward pass computes again, by the same operations, instead
of remembering: ``none``; ``full``, whole decoder layers, of which only the input is kept;
``dense``, all of a layer but attention, whose input is kept too. At 131,072 tokens attention is
most of the work: ``dense`` is nearly as fast as ``none`` (memory: attention/windowed.py).
``training.recompute_layers`` keeps the last layers whole, as far as memory goes.

Under ZeRO-3 each rank keeps its share of a parameter as soon as it exists; without this DeepSpeed
shards a model that every rank has loaded whole. The sharding itself is DeepSpeed's own
(``deepspeed.zero.Init``): rank 0's values are broadcast, every rank keeps its part.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from longrope2.attention.windowed import kept_attention_contexts
from longrope2.errors import ConfigError
from longrope2.model.loading import load_windowed_model
from longrope2.model.norms import use_norm
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig
from longrope2.parallel.processes import Processes
from longrope2.planning.memory import Recompute
from longrope2.training.config import Precision, TrainingConfig, ZeroConfig
from longrope2.training.optimizer import make_optimizer
from longrope2.training.plan import ResolvedRun

_NEVER = 1_000_000_000


def deepspeed_settings(
    training: TrainingConfig,
    parallel: ParallelConfig,
    zero: ZeroConfig,
    *,
    micro_steps: int,
    bf16: bool,
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given; one segment per micro-step and process group.

    Without ZeRO and in float32 DeepSpeed clips but does not report the norm: there ``run_step``
    clips instead. ``bf16`` is forward and backward in bf16 with float32 master weights.
    """
    clips_itself = parallel.zero_stage > 0 or bf16
    sequence_dtype = zero.sequence_gradient_dtype
    if sequence_dtype is Precision.auto:
        # DeepSpeed has no word for it here: the format of the forward pass by name.
        sequence_dtype = Precision.bf16 if bf16 else Precision.fp32
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": training.gradient_clip if clips_itself else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": _zero_section(parallel, zero),
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU Adam is compiled on first use; torch's is there.
        "zero_force_ds_cpu_optimizer": False,
        "seq_parallel_communication_data_type": sequence_dtype.value,
        "steps_per_print": _NEVER,
    }
    if zero.gradient_dtype is not Precision.auto:
        settings["communication_data_type"] = zero.gradient_dtype.value
    if bf16 and parallel.zero_stage >= 2:
        # DeepSpeed would add up the micro-steps in bf16, 8 bits for 64 of them on 8 GPUs. Stages 0
        # and 1 know no other way.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _zero_section(parallel: ParallelConfig, zero: ZeroConfig) -> dict[str, Any]:
    """The keys that the stage reads.

    ``reduce_scatter`` stays on: with it ZeRO-3 divides gradients by the whole world, as
    ``gradient_scale`` assumes.
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


def apply_recompute(
    hf: Any, policy: Recompute, *, layers: int | None = None, offload: bool = False
) -> None:
    """Checkpoint decoder layers of a transformers model; it acts in training mode only.

    Args:
        hf: The model.
        policy: What is computed again.
        layers: How many, from the first; None is all. The backward pass begins with the last, which
            are kept whole: their memory is free again when the first are computed again.
        offload: What stays between layers stays in CPU memory.

    Raises:
        ConfigError: the model class has no layers that can be checkpointed, or not one by one.
    """
    if policy is Recompute.none:
        return
    function = partial(_checkpointed, dense=policy is Recompute.dense, offload=offload)
    try:
        hf._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    except ValueError:
        text = f"{type(hf).__name__} has no layers that can be recomputed; use none"
        raise ConfigError([f"training.recompute={policy.value}: {text}"]) from None
    if layers is not None:
        _recompute_first(hf, layers)


def _recompute_first(hf: Any, layers: int) -> None:
    """Leave the checkpoints of the first layers only."""
    own = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(own) != hf.config.num_hidden_layers:
        text = f"{type(hf).__name__} does not checkpoint its layers one by one; use all"
        raise ConfigError([f"training.recompute_layers={layers}: {text}"])
    for number, layer in enumerate(own):
        layer.gradient_checkpointing = number < layers


def _checkpointed(layer: Callable[..., Any], *inputs: Tensor, dense: bool, offload: bool) -> Any:
    """One layer's forward; ``inputs`` are what it is given by position, its hidden states."""
    contexts = partial(kept_attention_contexts, on_cpu=offload) if dense else noop_context_fn
    # The checkpoint saves the layer's inputs under the hooks that are open around it, and no other
    # tensor.
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


class RankShares:
    """Takes the parameters of one model, in the same order on all ranks."""

    def __init__(
        self, settings: dict[str, Any], mpu: ModuleType | None, dtype: torch.dtype
    ) -> None:
        """``settings`` are DeepSpeed's for the engine that will own them; ``dtype`` is theirs."""
        self._settings, self._mpu, self._dtype = settings, mpu, dtype
        self._first: Any = None

    def take(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share of rank 0's values, release the rest; every rank calls this."""
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        # By now loaded with DS_ACCELERATOR set (processes.py).
        from deepspeed.runtime.zero import Init
        from deepspeed.utils import groups

        holder = nn.Module()
        holder.register_parameter("first", parameter)
        Init(
            module=holder,
            config_dict_or_path=self._settings,
            dtype=self._dtype,
            mpu=self._mpu,
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        self._first = parameter


def make_engine(run: ResolvedRun, processes: Processes, *, values: bool = True) -> Any:
    """Load the model and wrap it; every rank calls this. Under ZeRO-3 none ever holds all of it.

    Without ``values`` the weights are left unread, because a checkpoint follows.
    """
    torch.manual_seed(run.config.seed)
    shares = _shares(run, processes)
    model = load_windowed_model(
        run.model_folder,
        run.factors,
        device=processes.device,
        dtype=run.machine.dtype,
        from_scratch=run.config.model.from_scratch,
        take=shares.take if shares else None,
        read=values and (shares is None or processes.is_main),
    )
    return wrap_model(model, run, processes)


def take_in_shares(model: WindowedModel, run: ResolvedRun, processes: Processes) -> None:
    """Under ZeRO-3, leave each rank its share of a model that is whole; every rank calls this."""
    if shares := _shares(run, processes):
        for parameter in model.parameters():
            shares.take(parameter)


def wrap_model(model: WindowedModel, run: ResolvedRun, processes: Processes) -> Any:
    """The engine around a model that is on the device, or in shares; every rank calls this."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    training = run.config.training
    fused = run.machine.fused_update or run.config.zero.offload_optimizer
    use_norm(model.hf, run.machine.norm.kernel)
    apply_recompute(
        model.hf,
        training.recompute,
        layers=_layers_of(model, run),
        offload=training.offload_activations,
    )
    model.train()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, training, fused=fused),  # type: ignore[arg-type]
        config=_settings(run),
        mpu=processes.mpu,
    )
    return engine


def _layers_of(model: WindowedModel, run: ResolvedRun) -> int | None:
    """Recomputed layers; the self-test's tiny model has fewer, and keeps one if the run's does."""
    if run.recompute_layers is None:
        return None
    return min(run.recompute_layers, model.hf.config.num_hidden_layers - 1)


def _shares(run: ResolvedRun, processes: Processes) -> RankShares | None:
    """What keeps this rank's part of each parameter; None where ranks hold the whole model."""
    if run.config.parallel.zero_stage < 3:
        return None
    return RankShares(_settings(run), processes.mpu, run.machine.dtype)


def _settings(run: ResolvedRun) -> dict[str, Any]:
    config, bf16 = run.config, run.machine.bf16
    return deepspeed_settings(
        config.training, config.parallel, config.zero, micro_steps=run.micro_steps, bf16=bf16
    )
