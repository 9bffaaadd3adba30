"""Settings of a training run, and the checks that cross their fields."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.config import StageConfig, target_faults
from longrope2.errors import ConfigError
from longrope2.kernel_choice import AttentionKernel, NormKernel
from longrope2.model.factors_source import RopeConfig
from longrope2.model.shape import ModelShape
from longrope2.parallel.dims import ParallelConfig, grid_faults, head_faults, token_multiple
from longrope2.planning.memory import Recompute
from longrope2.tracking.metrics import TrackingConfig

if TYPE_CHECKING:
    import torch

# Fields of ``training`` that may change between the parts of one run: they change nothing that is
# computed but its rounding.
CHANGEABLE_TRAINING_KEYS = ("stop_after_step", "checkpoint_steps", "keep_checkpoints", "log_steps",
                            "recompute", "recompute_layers", "offload_activations",
                            "max_skipped_steps", "peak_tflops", "prefetch_steps",
                            "async_checkpoints", "final_dtype", "selftest",
                            "hang_timeout_s", "norm", "heldout_every",
                            "heldout_segments", "trust_folder")  # fmt: skip


class Precision(Enum):
    """A number format, or ``auto``, which each setting explains."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


# Values of ``training.recompute_layers`` beside numbers.
AUTO_LAYERS = "auto"
LAYER_WORDS = ("all", AUTO_LAYERS)


class OptimizerKind(Enum):
    """Implementations of AdamW: the same update, rounded and fused differently."""

    torch_adamw = "torch_adamw"
    deepspeed_fused_adam = "deepspeed_fused_adam"
    apex_fused_adam = "apex_fused_adam"


@dataclass
class ZeroConfig:
    """How ZeRO shards and communicates; its stage is ``parallel.zero_stage``.

    Defaults are DeepSpeed's. Sizes count elements, not bytes: larger buckets mean fewer, longer
    messages and more memory for buffers.
    """

    hpz_size: int = 1
    """Ranks (a node, say) that together hold a second full copy of the parameters, so that the
    gathers of the backward pass stay among them; 1 keeps none. Stage 3 only; divides the number
    of processes."""
    reduce_bucket_elements: int = 500_000_000
    """Gradients reduced in one message; raised to the model's largest matrix, which travels whole.
    Stages 1 to 3."""
    gather_bucket_elements: int = 500_000_000
    """Updated parameters gathered in one message. Stages 1 and 2."""
    prefetch_elements: int = 50_000_000
    """Parameters gathered ahead of their use. Stage 3."""
    max_live_elements: int = 1_000_000_000
    """Gathered parameters kept at most before the next are released. Stage 3."""
    overlap_communication: bool | None = None
    """Reduce gradients while the backward pass goes on; null is on for stage 3 and off below."""
    gradient_dtype: Precision = Precision.auto
    """Number format in which gradients travel where no segment is shared; ``auto`` is that of the
    forward pass."""
    sequence_gradient_dtype: Precision = Precision.fp32
    """The same where processes share segments (``parallel.sequence``, ``parallel.context``); bf16
    halves the traffic, fp32 sums the chunks of a segment exactly."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in CPU memory and update there. Stages 1 to 3,
    ``training.optimizer=torch_adamw``."""
    pin_memory: bool = True
    """Page-locked CPU memory for the offloaded state: faster copies."""


@dataclass
class TrainingConfig:
    """Mixed-window training (paper, section 3.3 and appendix); defaults are the paper's."""

    tokens: int | None = None
    """Token budget; null trains one pass over the segments. Rounded down to whole steps."""
    global_batch_tokens: int = 8_388_608
    """Tokens of one optimizer step over all processes: a multiple of ``target_len`` *
    ``same_kind_segments``."""
    same_kind_segments: int = 8
    """Segments in a row that share the window kind; a multiple of the data-parallel size, so that
    ranks wait for none."""
    mixed: bool = True
    """False trains every segment with the rescaled RoPE and full attention (the paper's
    ablation); the result is read with the rescaled RoPE at every length."""
    optimizer: OptimizerKind = OptimizerKind.torch_adamw
    """AdamW of torch (fused on a GPU), of DeepSpeed, or of NVIDIA apex where that is installed."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    min_learning_rate_ratio: float = 0.1
    """Floor of the cosine, as a share of the peak."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and embeddings decay only with
    ``decay_norms_and_embeddings``."""
    decay_norms_and_embeddings: bool = False
    """Decay every parameter alike."""
    gradient_clip: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    skip_grad_norm: float | None = None
    """Gradient norm (before clipping) above which a step is skipped; null skips only steps that are
    not finite."""
    max_skipped_steps: int = 5
    """Steps in a row that may be skipped before the run stops."""
    precision: Precision = Precision.auto
    """Number format of the forward and backward pass; ``auto`` is bf16 on a GPU and fp32 on a CPU.
    The master weights are always float32."""
    recompute: Recompute = Recompute.none
    """``full`` keeps only layer inputs and recomputes the rest; ``dense`` keeps attention too and
    recomputes the rest."""
    recompute_layers: str = "all"
    """Layers, from the first on, that ``recompute`` applies to; the others keep everything.
    ``all``, a number, or ``auto``: as few as fit into the GPU by the planner's count (on a CPU
    all)."""
    norm: NormKernel = NormKernel.auto
    """Kernel of the RMS norms: on a GPU ``auto`` takes the first of liger, apex and torch (its
    fused operator) that runs here, and says so; ``model`` is transformers' own."""
    offload_activations: bool = False
    """Keep what ``recompute`` leaves in CPU memory: less GPU memory, slower steps."""
    selftest: bool = True
    """Before the model is loaded, compare a tiny one in this layout of processes with one process
    alone (seconds)."""
    hang_timeout_s: float | None = 1200.0
    """Seconds without progress of any rank after which one says which ranks are behind, and ends
    the run; null waits for ever. Above the longest micro-step, and below
    ``parallel.timeout_seconds``, or that comes first. Where models and checkpoints are read or
    written, bytes are progress."""
    prefetch_steps: int = 1
    """Steps whose segments are read ahead in a thread; 0 reads each step when it begins."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    trust_folder: bool = False
    """True resumes from a folder that every user of the machine may write to. Training states are
    pickles: to load one is to run what it says."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on; false waits for the disk and keeps no copy of the
    state in memory."""
    final_dtype: Precision = Precision.auto
    """Weights of ``final/``; ``auto`` is the format of the forward pass; fp32 after bf16 gives the
    master weights."""
    log_steps: int = 1
    """Steps between metric records."""
    heldout_every: int | None = None
    """Steps between measurements of the loss on held-out text of the segments' corpus, in both
    windows (also before the first step and after the last one); null measures none. Changes nothing
    of the training."""
    heldout_segments: int = 8
    """Held-out segments of each window, at most, that are measured."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device for ``perf/mfu``; null takes the bf16 peak of a known GPU, and
    leaves it out otherwise."""
    stop_after_step: int | None = None
    """Stop with a checkpoint after this many steps; the same command goes on from there."""


@dataclass
class AttentionConfig:
    """How attention is computed."""

    kernel: AttentionKernel = AttentionKernel.auto
    """``auto`` takes the first of flash_attn, torch_varlen and sdpa that runs here; any other value
    is used or refused."""


@dataclass
class TrainRoot(StageConfig):
    """Configuration of ``launch.train``."""

    segments: str | None = None
    """Folder of packed segments; null is the run's own ``1_segments``."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def compute_dtype(precision: Precision, device: "torch.device") -> "torch.dtype":
    """Number format of forward and backward; ``auto`` is bf16 where the hardware is made for it."""
    import torch  # loads for seconds; a configuration is checked without it

    bf16 = precision is Precision.bf16 or (precision is Precision.auto and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def check(config: TrainRoot, model_folder: Path, world_size: int) -> None:
    """Every rule that crosses fields of a training run, for a model whose config.json is there.

    Raises:
        ConfigError: all faults together, each naming its key.
    """
    if faults := settings_faults(config, ModelShape.from_folder(model_folder), world_size):
        raise ConfigError(faults)


def with_room_for_largest(zero: ZeroConfig, shape: ModelShape) -> ZeroConfig:
    """``zero`` with a reduce bucket that the model's largest gradient fits into.

    DeepSpeed reduces one that does not (LLaMA3-8B's embedding has 525 million elements) by itself,
    beside the bucket: memory that no setting bounds.
    """
    largest = max(shape.head_parameters, shape.hidden * shape.mlp)
    bucket = max(zero.reduce_bucket_elements, largest)
    return replace(zero, reduce_bucket_elements=bucket)


def settings_faults(config: TrainRoot, shape: ModelShape | None, world_size: int) -> list[str]:
    """All that ``check`` refuses; without ``shape`` what the model does not decide."""
    faults = _range_faults(config.training) + _window_faults(config)
    if shape is not None:
        faults += recompute_faults(config.training, shape.num_layers)
    faults += _parallel_faults(config, shape, world_size)
    stage, optimizer = config.parallel.zero_stage, config.training.optimizer.value
    return faults + zero_faults(
        config.zero, stage=stage, world_size=world_size, optimizer=optimizer
    )


def zero_faults(zero: ZeroConfig, *, stage: int, world_size: int, optimizer: str) -> list[str]:
    """Values that are out of range or do not fit the stage, the processes or the optimizer."""
    sizes = ("hpz_size", "reduce_bucket_elements", "gather_bucket_elements", "max_live_elements")
    hpz, offload = zero.hpz_size, zero.offload_optimizer
    divisors, given = _divisors(world_size), f"zero.hpz_size={hpz}"
    faults = _not_above_zero("zero", zero, sizes) + _negative("zero", zero, ("prefetch_elements",))
    if hpz > 1 and stage != 3:
        faults.append(f"{given} needs parallel.zero_stage=3, this run has {stage}; use 1")
    if hpz > 0 and world_size > 0 and hpz not in divisors:
        faults.append(f"{given} does not divide {world_size} processes; use one of {divisors}")
    given = "zero.offload_optimizer=true"
    if offload and stage == 0:
        faults.append(f"{given} needs parallel.zero_stage=1, 2 or 3, this run has 0")
    if offload and optimizer != "torch_adamw":
        cannot = f"where training.optimizer={optimizer} cannot run"
        faults.append(f"{given} updates on the CPU, {cannot}; use training.optimizer=torch_adamw")
    return faults


def _range_faults(training: TrainingConfig) -> list[str]:
    above_zero = "global_batch_tokens same_kind_segments learning_rate gradient_clip"
    above_zero += " checkpoint_steps keep_checkpoints log_steps max_skipped_steps heldout_segments"
    or_null = ("tokens", "stop_after_step", "skip_grad_norm", "peak_tflops", "hang_timeout_s")
    or_null += ("heldout_every",)
    faults = _not_above_zero("training", training, above_zero.split())
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(training, name)) < 1:
            faults.append(f"training.{name}={value} must be in [0, 1)")
    if not 0 <= (floor := training.min_learning_rate_ratio) <= 1:
        faults.append(f"training.min_learning_rate_ratio={floor} must be in [0, 1]")
    faults += _negative("training", training, ("weight_decay", "warmup_steps", "prefetch_steps"))
    for name in or_null:
        if (value := getattr(training, name)) is not None and value <= 0:
            faults.append(f"training.{name}={value} must be above 0, or null")
    if training.offload_activations and training.recompute is Recompute.none:
        needs = "training.offload_activations=true needs training.recompute=full or dense"
        faults.append(f"{needs}; with none all stays")
    return faults


def recompute_faults(training: TrainingConfig, num_layers: int) -> list[str]:
    """A number of layers that is none, or that has no policy."""
    given = training.recompute_layers
    if given in LAYER_WORDS:
        return []
    fault = f"training.recompute_layers={given}"
    if not (given.isdecimal() and 1 <= int(given) <= num_layers):
        allowed = f"all, auto or a number from 1 to {num_layers} (the model's layers)"
        return [f"{fault} must be {allowed}"]
    if training.recompute is Recompute.none:
        return [f"{fault} needs training.recompute=full or dense; with none no layer is recomputed"]
    return []


def _window_faults(config: TrainRoot) -> list[str]:
    target, training = config.target_len, config.training
    batch, tokens = training.global_batch_tokens, training.tokens
    group_tokens = max(1, target * training.same_kind_segments)
    faults, given = target_faults(config.model, target), f"training.global_batch_tokens={batch}"
    if batch % group_tokens:
        group = f"target_len * training.same_kind_segments = {group_tokens}"
        faults.append(f"{given} must be a multiple of {group}")
    if tokens is not None and 0 < tokens < batch:
        faults.append(f"training.tokens={tokens} is less than one step of {given}")
    return faults


def _parallel_faults(config: TrainRoot, shape: ModelShape | None, world_size: int) -> list[str]:
    parallel, sequence, context = config.parallel, config.parallel.sequence, config.parallel.context
    faults = []
    if parallel.zero_stage not in (0, 1, 2, 3):
        faults.append(f"parallel.zero_stage={parallel.zero_stage} must be 0, 1, 2 or 3")
    faults += _negative("parallel", parallel, ("replicate_below",))
    faults += _not_above_zero("parallel", parallel, ("timeout_seconds",))
    if world_size < 1:
        return [*faults, f"parallel.processes={world_size} must be above 0"]
    if uneven := grid_faults(world_size, sequence, context):
        return faults + uneven
    data, alike = world_size // parallel.segment_ranks, config.training.same_kind_segments
    together = f"parallel.sequence={sequence}"
    together += f" x parallel.context={context}" if context > 1 else ""
    if config.target_len % (multiple := token_multiple(sequence, context)):
        needs = together if multiple == parallel.segment_ranks else f"{multiple} with {together}"
        given = f"target_len={config.target_len} must be a multiple of {needs}"
        faults.append(f"{given}, so that every rank holds an equal share of a segment")
    if alike > 0 and alike % data:
        given = f"training.same_kind_segments={alike} must be a multiple of the data-parallel size"
        faults.append(f"{given} {data} ({world_size} processes / {together})")
    if shape is not None:
        faults += head_faults(sequence, shape.num_heads, shape.num_kv_heads)
    return faults


def _not_above_zero(group: str, settings: object, names: Iterable[str]) -> list[str]:
    values = {name: getattr(settings, name) for name in names}
    return [f"{group}.{name}={v} must be above 0" for name, v in values.items() if v <= 0]


def _negative(group: str, settings: object, names: Iterable[str]) -> list[str]:
    values = {name: getattr(settings, name) for name in names}
    return [f"{group}.{name}={v} must not be negative" for name, v in values.items() if v < 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
