"""Memory of one process by part, from the architecture and the layout alone.

Written down from what this project's training keeps: DeepSpeed ZeRO-3, transformers' Llama layers (no fused MLP; norms
fused or as they are), a flash-like attention kernel, the chunked loss of ``longrope2.model``. Three moments can be the
highest, and the prediction is the highest of them:

- *loss*: all checkpoints (or activations) are there, the LM head is gathered, its gradient is summed up in float32;
- *layer*: the backward pass of the last layer's MLP, all checkpoints still there, the layer's own activations on top
  (the buffers of the exchange come later, when the MLP's are gone);
- *update*: the optimizer, when no activation is left.

Not in it: the CUDA context, NCCL and fragmentation (``hardware.usable_memory`` leaves room for them), loading (every
process holds the whole model for a moment before it is sharded), and float32 tables of cosines.

Symbols: H hidden size, Q and K widths of queries and of keys, F width of the MLP, V vocabulary, T local tokens, b bytes of
the compute format.
"""

from dataclasses import dataclass

from longrope2.planning.layout import BYTES_FP32, Layout, RecomputePolicy
from longrope2.planning.shape import ModelShape, Workload

__all__ = ["LOSS_CHUNK_TOKENS", "MemoryPlan", "attention_bytes_per_token", "load_bytes", "plan_memory",
           "saved_layer_bytes_per_token"]  # fmt: skip

# Tokens whose logits exist at once (longrope2.model.loss.CHUNK_TOKENS; a test compares).
LOSS_CHUNK_TOKENS = 1024
# Logits, their softmax in place of the gradient, and the product of one chunk.
LOGITS_COPIES = 2
SUB_GROUP_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process by part; ``peak`` is the highest moment."""

    states: float
    """Sharded weights, gradients, master weights and the optimizer's two moments; 18 bytes a parameter in bf16, whose
    gradients add up in float32."""
    checkpoints: float
    """Inputs of the layers, kept for recompute."""
    activations: float
    """Without recompute: what every layer keeps for its backward."""
    attention: float
    """With ``dense`` recompute: what attention's backward reads, and its output."""
    layer: float
    """One layer in the backward pass: what it recomputed, and gradients of its activations."""
    head: float
    """LM head: gathered weights, their float32 gradient, hidden states and their gradient."""
    logits: float
    """One chunk of logits."""
    gathered: float
    """Parameters gathered from their shards, with the largest gradient on its way to the bucket."""
    communication: float
    """Buckets in which gradients are reduced."""
    update: float
    """Copies the optimizer makes."""

    @property
    def parts(self) -> dict[str, float]:
        """Name and bytes of every part."""
        return dict(vars(self))

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at each moment that can be the highest."""
        kept = self.states + self.communication + self.checkpoints + self.activations + self.attention
        return {
            "loss": kept + self.head + self.logits,
            "layer": kept + self.layer + self.gathered,
            "update": self.states + self.communication + self.update,
        }

    @property
    def peak_moment(self) -> str:
        """The highest moment's name."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def peak(self) -> float:
        """Bytes at the highest moment."""
        return max(self.moments.values())


def plan_memory(shape: ModelShape, workload: Workload, layout: Layout) -> MemoryPlan:
    """Memory of one process under ZeRO-3."""
    b, tokens, world = layout.compute_bytes, layout.local_tokens(workload), layout.num_processes
    recompute = layout.recompute
    shard = shape.parameters / world
    saved_layer = saved_layer_bytes_per_token(shape, layout) * tokens
    keeps_inputs = recompute is not RecomputePolicy.none
    kept_attention = attention_bytes_per_token(shape, layout) * tokens if recompute is RecomputePolicy.dense else 0.0
    on_gpu = 0 if layout.offload else 1
    bucket = layout.zero.reduce_bucket * layout.gradient_bytes
    filled = min(layout.zero.reduce_bucket, shape.parameters) * layout.gradient_bytes
    return MemoryPlan(
        states=_state_bytes(layout) * shard + _second_copy_bytes(shape, layout),
        checkpoints=on_gpu * shape.num_layers * shape.hidden * b * tokens if keeps_inputs else 0.0,
        activations=0.0 if keeps_inputs else shape.num_layers * saved_layer,
        attention=on_gpu * shape.num_layers * kept_attention,
        layer=(saved_layer - on_gpu * kept_attention if keeps_inputs else 0.0)
        + _backward_bytes_per_token(shape, layout) * tokens,
        head=_head_bytes(shape, layout, tokens),
        logits=LOGITS_COPIES * min(LOSS_CHUNK_TOKENS, tokens) * shape.vocabulary * BYTES_FP32,
        gathered=b * min(shape.parameters, layout.zero.max_live) + b * shape.hidden * shape.mlp,
        communication=bucket + (filled if world > 1 else 0.0),
        update=BYTES_FP32 * min(shard, SUB_GROUP_ELEMENTS) * (1 if layout.bf16 else 2),
    )


def saved_layer_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """What one layer keeps for its backward pass.

    Two norms keep their input in float32 and two results each (4H + 2bH), fused ones input and result (2bH); then
    attention; then the MLP's gate, its activation, the other branch and their product.
    """
    b = layout.compute_bytes
    norm = 2 * b if layout.fused_norms else BYTES_FP32 + 2 * b
    return 2 * norm * shape.hidden + attention_bytes_per_token(shape, layout) + 4 * b * shape.mlp


def attention_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """Queries, keys, values, output and the log-sum of every head; the output twice where heads are exchanged."""
    outputs = 2 if layout.sequence > 1 else 1
    widths = (1 + outputs) * shape.query_width + 2 * layout.kv_width(shape)
    return layout.compute_bytes * widths + BYTES_FP32 * shape.num_heads


def load_bytes(shape: ModelShape, layout: Layout) -> float:
    """What a process holds at start, before the model is sharded."""
    return layout.compute_bytes * shape.parameters


def _state_bytes(layout: Layout) -> int:
    """Bytes a parameter under ZeRO-3: weight; in float32 the sum of gradients, the master weight, two moments."""
    return layout.compute_bytes + 4 * BYTES_FP32


def _second_copy_bytes(shape: ModelShape, layout: Layout) -> float:
    """hpZ: the weights once more, sharded inside a group."""
    hpz = layout.zero.hpz_size
    return layout.compute_bytes * shape.parameters / hpz if hpz > 1 else 0.0


def _backward_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """Gradients of activations at the MLP's product: of both branches, of the layer's output and of the residual."""
    return layout.compute_bytes * (2 * shape.mlp + 2 * shape.hidden)


def _head_bytes(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """Gathered LM head, float32 gradient, its copy in the compute format; hidden states and their gradient."""
    b = layout.compute_bytes
    weights = (b + BYTES_FP32 + (b if layout.bf16 else 0)) * shape.head_parameters
    return weights + 2 * b * shape.hidden * tokens
