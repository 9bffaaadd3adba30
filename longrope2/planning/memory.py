"""One way to run a training on many processes, and what each of them then holds in memory.

From the architecture and the layout alone: what this project's training keeps under DeepSpeed
ZeRO-3, with transformers' Llama layers (no fused MLP; norms fused or as they are), a flash-like
attention kernel and the chunked loss of ``longrope2.model``. Three moments can be the highest, and
the prediction is the highest of them:

- *loss*: all checkpoints (or activations) are there, the LM head is gathered, its gradient is
  summed up in float32;
- *layer*: the backward pass of a layer's MLP, the layer's own activations on top of what is kept
  (the buffers of the exchange come later, when the MLP's are gone): of the last layer, all
  checkpoints still there, or of the one in which the bucket of gradients is first full, and copied
  to be reduced; or of a layer's attention, where gradients of a whole segment's keys and values
  take more than the MLP's; or, before all layers, the LM head's gradient on its way, which is
  copied and reduced alone where it is larger than the bucket;
- *update*: the optimizer, when no activation is left.

Each is compared with what a rehearsal of the run counts: ``launch.plan verify=true``.

Not in it: the CUDA context, NCCL and fragmentation (``hardware.usable_memory`` leaves room for
them), loading, and float32 tables of cosines.

Symbols: H hidden size, b bytes of a number in the compute format.
"""

from dataclasses import dataclass, field
from enum import Enum

from longrope2.model.shape import ModelShape, Workload

_BYTES_FP32, _BYTES_BF16 = 4, 2
# Of one chunk: logits and their softmax, which becomes the gradient, in float32.
_LOGITS_COPIES = 2
_SUB_GROUP_ELEMENTS = 1_000_000_000
PART_WORDS = {
    "states": "weights, gradients, master weights, two moments, sharded",
    "checkpoints": "inputs of the layers",
    "activations": "what layers keep without recompute",
    "attention": "what dense recompute keeps of attention",
    "layer": "one layer in the backward pass",
    "head": "LM head, its float32 gradient, hidden states",
    "logits": "tiles of logits",
    "head_sent": "the LM head's gradient on its way, hidden states",
    "gathered": "other parameters gathered",
    "head_held": "LM head in the backward pass",
    "first": "first layer and input embedding gathered",
    "bucket": "gradients that wait to be reduced",
    "reduced": "those being reduced, largest gradient",
    "update": "copies of the optimizer",
}


class Recompute(Enum):
    """What the backward pass computes again: ``training.recompute``."""

    none = "none"
    dense = "dense"
    """All of a layer but attention: queries, keys, values and output are kept."""
    full = "full"


@dataclass(frozen=True)
class ZeroBuffers:
    """Sizes that DeepSpeed's ZeRO-3 is given, in elements (``zero.*`` of the configuration)."""

    reduce_bucket: int = 500_000_000
    max_live: int = 1_000_000_000
    hpz_size: int = 1
    gradient_bytes: int = _BYTES_FP32
    """Of a gradient on its way under sequence parallelism."""
    replicate_below: int = 0
    """Parameters in tensors up to this size stay whole (``parallel.replicate_below``)."""


@dataclass(frozen=True)
class Layout:
    """Processes and what each of them keeps."""

    data: int
    """Groups that work on different segments."""
    sequence: int
    """Processes that exchange heads for tokens of a segment."""
    recompute: Recompute
    recompute_layers: int | None = None
    """The first layers, to which ``recompute`` applies; the others keep everything. None is all."""
    micro_batch: int = 1
    """Segments that a group works on at once."""
    offload: bool = False
    """Keep what recompute leaves between layers in CPU memory."""
    bf16: bool = True
    """bf16 with float32 master weights; False is float32 throughout, as on a CPU."""
    zero: ZeroBuffers = ZeroBuffers()
    fused_norms: bool = False
    """Norms in one kernel (``training.norm``), which keeps no float32 copy of its input."""
    context: int = 1
    """Processes over which a segment's keys and values are gathered."""

    @property
    def segment_ranks(self) -> int:
        """Processes that share a segment."""
        return self.sequence * self.context

    def describe(self) -> str:
        """The grid in words, the innermost axis first."""
        context = f"{self.context} context x " if self.context > 1 else ""
        return f"{self.sequence} sequence x {context}{self.data} data"

    @property
    def num_processes(self) -> int:
        """All processes."""
        return self.data * self.segment_ranks

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in forward and backward."""
        return _BYTES_BF16 if self.bf16 else _BYTES_FP32

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient on its way."""
        return self.zero.gradient_bytes if self.segment_ranks > 1 else self.compute_bytes

    def recomputed(self, shape: ModelShape) -> int:
        """Layers that the backward pass computes again."""
        if self.recompute is Recompute.none:
            return 0
        num_layers = shape.num_layers
        return num_layers if self.recompute_layers is None else self.recompute_layers

    def local_tokens(self, workload: Workload) -> int:
        """Tokens a process holds in one micro-step."""
        return self.micro_batch * workload.target_len // self.segment_ranks

    def kv_width(self, shape: ModelShape) -> int:
        """Width of the exchanged keys: repeated where there are fewer heads than processes."""
        return max(shape.num_kv_heads, self.sequence) * shape.head_dim

    def micro_steps(self, workload: Workload) -> float:
        """Micro-steps of one optimizer step."""
        return workload.segments_per_step / (self.data * self.micro_batch)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one process by part (``PART_WORDS``); ``peak`` is the highest moment.

    States are 18 bytes a parameter in bf16, whose gradients add up in float32. A layer in the
    backward pass holds what it recomputed, and gradients of its activations.
    """

    states: float
    checkpoints: float
    activations: float
    attention: float
    layer: float
    head: float
    logits: float
    head_sent: float
    gathered: float
    head_held: float
    first: float
    bucket: float
    reduced: float
    update: float
    left_when_reduced: float = field(default=1.0, repr=False)
    """Share of what layers keep that is still there when the bucket is full for the first time."""
    fills_in_layer: bool = field(default=True, repr=False)
    """Whether that is in a layer's backward pass, and not after all of them."""
    left_for_first: float = field(default=0.0, repr=False)
    """Share of what layers keep that is the first layer's."""

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at each moment that can be the highest."""
        always = self.states + self.bucket
        kept = self.checkpoints + self.activations + self.attention
        when_full = self.left_when_reduced * kept + self.reduced
        if self.fills_in_layer:
            when_full += self.layer
        backward = max(kept + self.layer, when_full, kept + self.head_sent) + self.gathered
        first = self.left_for_first * kept + self.layer + self.first
        return {
            "loss": always + kept + self.head + self.logits + self.gathered,
            "layer": always + self.head_held + max(backward, first),
            "update": always + self.update,
        }

    @property
    def peak_moment(self) -> str:
        """The highest moment's name."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def peak(self) -> float:
        """Bytes at the highest moment."""
        return max(self.moments.values())


def predict_memory(shape: ModelShape, workload: Workload, layout: Layout) -> MemoryUse:
    """Memory of one process under ZeRO-3."""
    from longrope2.model.loss import CHUNK_TOKENS  # loads for seconds

    b, tokens, world = layout.compute_bytes, layout.local_tokens(workload), layout.num_processes
    zero, recompute, on_gpu = layout.zero, layout.recompute, 0 if layout.offload else 1
    shard = shape.parameters / world
    # Weight; in float32 the sum of gradients, the master weight, two moments.
    state_bytes = b + 4 * _BYTES_FP32
    # hpZ: the weights once more, sharded inside a group.
    second_copy = b * shape.parameters / zero.hpz_size if zero.hpz_size > 1 else 0.0
    saved_layer = saved_layer_bytes_per_token(shape, layout) * tokens
    attention = _attention_bytes_per_token(shape, layout, laid_out=0) * tokens
    kept_attention = attention if recompute is Recompute.dense else 0.0
    layer = _layer_gradients_per_token(shape, layout) * tokens
    recomputed = layout.recomputed(shape)
    whole = shape.num_layers - recomputed
    # Layers kept whole are the last, and gone when the backward pass comes to one that is not.
    if whole == 0:
        layer += saved_layer - on_gpu * kept_attention
    # Gathered, its float32 gradient, that one's copy in the compute format; hidden states before
    # and after the last norm, and their gradient.
    head_weights = (b + _BYTES_FP32 + (b if layout.bf16 else 0)) * shape.head_parameters
    hidden_states = 3 * b * shape.hidden * tokens
    per_logit = _LOGITS_COPIES * _BYTES_FP32 + (b if layout.bf16 else 0)
    logits = per_logit * min(CHUNK_TOKENS, tokens) * shape.vocabulary
    bucket = zero.reduce_bucket * layout.gradient_bytes
    layers_in_bucket = zero.reduce_bucket // shape.layer_parameters
    filled = min(zero.reduce_bucket, shape.parameters) * layout.gradient_bytes
    return MemoryUse(
        states=state_bytes * shard + second_copy,
        checkpoints=on_gpu * recomputed * shape.hidden * b * tokens,
        activations=whole * saved_layer,
        attention=on_gpu * recomputed * kept_attention,
        layer=layer,
        head=head_weights + hidden_states,
        logits=logits,
        head_sent=_sent_head_bytes(shape, layout) + hidden_states,
        gathered=b * _gathered_parameters(shape, zero),
        head_held=b * shape.head_parameters,
        first=_gathered_with_first_layer(shape, layout),
        bucket=bucket,
        reduced=(filled if world > 1 else 0.0) + b * shape.hidden * shape.mlp,
        update=_BYTES_FP32 * min(shard, _SUB_GROUP_ELEMENTS) * (1 if layout.bf16 else 2),
        left_when_reduced=max(0.0, 1 - layers_in_bucket / shape.num_layers),
        fills_in_layer=layers_in_bucket < shape.num_layers,
        left_for_first=1 / shape.num_layers,
    )


def _gathered_parameters(shape: ModelShape, zero: ZeroBuffers) -> int:
    """Those gathered beside the LM head, which is held to the end of the backward pass.

    ``max_live`` bounds both together, but does not stop a gather that has begun, and a layer that
    is computed is gathered whatever it says. Where all layers stay, the next to be gathered ahead
    is the input embedding.
    """
    others = shape.parameters - shape.head_parameters
    if shape.matrix_parameters < zero.max_live:
        return others
    return min(others, max(zero.max_live - shape.head_parameters, shape.layer_parameters))


def _gathered_with_first_layer(shape: ModelShape, layout: Layout) -> float:
    """Bytes of the first layer and the input embedding, whose backward pass needs no weights.

    DeepSpeed gathers it ahead with small weights in one tensor, which stays beside their copies
    until the last of them is used. That is while the layer's MLP is differentiated if the layer was
    computed again, which asks for all of its weights, and later if not. 0 where that is no moment
    of its own: nothing is gathered, or the embedding is there all the time.
    """
    is_there = shape.tied or shape.parameters <= layout.zero.max_live
    is_late = layout.recompute is Recompute.none
    if is_there or is_late or layout.num_processes == 1:
        return 0.0
    return layout.compute_bytes * (shape.layer_parameters + 2 * shape.head_parameters)


def _sent_head_bytes(shape: ModelShape, layout: Layout) -> float:
    """The LM head's gradient beside the bucket, before the layers' backward passes.

    One that fits is moved into the bucket as soon as it is there. If no other then fits, it is
    reduced at once: where it lies, or as a copy that fills up the shares if they are not equal. One
    that does not fit is there beside its copy in the format of the reduction. The head is an
    embedding too where they are tied, and its gradient waits for that one's.
    """
    b, bucket = layout.compute_bytes, layout.zero.reduce_bucket
    head, world = shape.head_parameters, layout.num_processes
    if world == 1 or shape.tied or head + shape.hidden <= bucket:
        return 0.0
    needs_copy = layout.gradient_bytes != b if head > bucket else head % world > 0
    kept = b if head > bucket else 0
    return (kept + (layout.gradient_bytes if needs_copy else 0)) * head


def saved_layer_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """What one layer keeps for its backward pass.

    Two norms keep their input in float32 and two results each (4H + 2bH), fused ones input and
    result (2bH); then attention; then the MLP's gate, its activation, the other branch and their
    product. Norms of queries and keys keep their input; the result goes into their rotation.
    """
    b = layout.compute_bytes
    norm = 2 * b if layout.fused_norms else _BYTES_FP32 + 2 * b
    widths = shape.query_width + shape.kv_width if shape.normed_heads else 0
    norms = 2 * norm * shape.hidden + (norm - b) * widths
    return norms + _attention_bytes_per_token(shape, layout) + 4 * b * shape.mlp


def _layer_gradients_per_token(shape: ModelShape, layout: Layout) -> float:
    """What the backward pass of a layer holds beside what it reads.

    At the MLP's product: gradients of both branches, of the layer's output, of the residual. At
    gathered keys and values, when what the MLP read is gone: their gradients by part, added up, on
    the way to other processes and from them; of queries and output.
    """
    mlp = 2 * shape.mlp + 2 * shape.hidden
    if layout.context == 1:
        return layout.compute_bytes * mlp
    keys = 2 * layout.kv_width(shape) * layout.context
    attention = 4 * keys + 2 * shape.query_width + 2 * shape.hidden - 4 * shape.mlp
    return layout.compute_bytes * max(mlp, attention)


def _attention_bytes_per_token(shape: ModelShape, layout: Layout, *, laid_out: int = 1) -> float:
    """Queries, keys, values, the log-sum of every head, and the output: twice if exchanged.

    Keys and values are those of all context ranks: gathered ones are kept. Values that nothing
    exchanges, in short segments or for a rank of its own, are kept where they were made: of one
    product with queries and keys before their rotation; the output is then laid out anew, and
    ``laid_out=0`` leaves that copy out, which recompute makes again.
    """
    queries, keys = shape.query_width, 2 * layout.kv_width(shape) * layout.context
    outputs = 2 if layout.sequence > 1 else 1
    widths = (1 + outputs) * queries + keys
    if shape.fused_projection:
        widths = max(widths, (3 + laid_out) * queries + 3 * shape.kv_width)
    return layout.compute_bytes * widths + _BYTES_FP32 * shape.num_heads


def load_bytes(shape: ModelShape, layout: Layout) -> float:
    """The whole model, which a process that does not load in shares holds at start."""
    return layout.compute_bytes * shape.parameters
