"""Time of a training by part, from a stated kernel-efficiency model: hours, tokens/s/GPU, MFU.

A micro-step of one window kind takes

    products + attention + elementwise + exchange + offload + max(0, gathers - (products + attention
    + elementwise))

- *products*: 2 N forward, 4 N backward (N: layers and LM head), 2 again of the recomputed layers,
  at ``gemm_flops``;
- *attention*: the forward kernel once, the backward kernel 2.5 times it (it computes five products
  instead of two), the forward kernel again in layers of ``full`` recompute, at
  ``attention_flops``;
- *elementwise*: rotary, activations and residuals as unfused kernels, norms fused or not, by the
  bytes they read and write;
- *exchange*: queries, keys, values and outputs between the processes of a long segment's sequence
  axis, keys and values over its context axis, hidden behind nothing; to other nodes and inside one
  at the same time, and the slower counts; short segments are packed with ``--align`` and exchange
  nothing;
- *offload*: what ``training.offload_activations`` sends to CPU memory and back, hidden likewise;
- *gathers*: ZeRO-3's weights, forward and backward, and reduced gradients, hidden behind the
  computing as far as that lasts.

An optimizer step is its micro-steps and one update. Not in it: reading segments, checkpoints,
uneven documents. The stages around the training cost forward passes only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from longrope2.model.shape import ModelShape, Workload
from longrope2.planning.hardware import Machine
from longrope2.planning.memory import Layout, Recompute, predict_memory
from longrope2.rope.factors import Window

_ATTENTION_BACKWARD = 2.5
# Weight, gradient and three float32 numbers a parameter, read and written.
_UPDATE_BYTES = 2 * 16
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class MicroStepTime:
    """Seconds of one micro-step."""

    products: float
    attention: float
    elementwise: float
    exchange: float
    offload: float
    gathers: float
    """Before anything is hidden."""

    @property
    def computing(self) -> float:
        """What the GPU computes."""
        return self.products + self.attention + self.elementwise

    @property
    def exposed_gathers(self) -> float:
        """Gathers that outlast the computing."""
        return max(0.0, self.gathers - self.computing)

    @property
    def total(self) -> float:
        """The whole micro-step."""
        return self.computing + self.exchange + self.offload + self.exposed_gathers


@dataclass(frozen=True)
class RunTime:
    """A run's time and rates."""

    micro_steps: dict[Window, MicroStepTime]
    step_seconds: float
    hours: float
    floor_hours: float
    """Products and attention alone: no kernel but these, no communication."""
    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs utilisation, causal FLOPs."""
    num_gpus: int

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.hours * self.num_gpus


def predict_time(
    shape: ModelShape, workload: Workload, layout: Layout, machine: Machine
) -> RunTime:
    """Time of a run on ``layout.num_processes`` GPUs of a machine."""
    micro = {w: predict_micro_step(shape, workload, layout, machine, window=w) for w in Window}
    num_micro_steps, share = layout.micro_steps(workload), workload.share
    update = _UPDATE_BYTES * shape.parameters / layout.num_processes / machine.memory_bytes
    step = num_micro_steps * sum(share(w) * micro[w].total for w in Window) + update
    floor = sum(share(w) * (micro[w].products + micro[w].attention) for w in Window)
    steps = workload.total_tokens / workload.step_tokens
    rate = workload.step_tokens / step / layout.num_processes
    return RunTime(
        micro_steps=micro,
        step_seconds=step,
        hours=steps * step / _SECONDS_PER_HOUR,
        floor_hours=steps * (num_micro_steps * floor) / _SECONDS_PER_HOUR,
        tokens_per_second_per_gpu=rate,
        mfu=rate * workload.mean_model_flops(shape) / machine.peak_flops,
        num_gpus=layout.num_processes,
    )


def predict_micro_step(
    shape: ModelShape, workload: Workload, layout: Layout, machine: Machine, *, window: Window
) -> MicroStepTime:
    """Time of one micro-step of a window kind."""
    tokens, repeated = layout.local_tokens(workload), layout.recomputed(shape) / shape.num_layers
    attention = attention_flops(shape, layout, shape.attention_flops(workload.attended_len(window)))
    elementwise = _elementwise_bytes_per_token(shape, layout) * (3 + repeated)
    exchange = _exchange_seconds(shape, workload, layout, machine)
    kept = predict_memory(shape, workload, replace(layout, offload=False))
    offloaded = kept.checkpoints + kept.attention if layout.offload else 0.0
    return MicroStepTime(
        products=product_flops(shape, layout) * tokens / machine.gemm_flops,
        attention=attention * tokens / machine.attention_flops,
        elementwise=elementwise * tokens / machine.memory_bytes,
        exchange=exchange if window is Window.LONG else 0.0,
        offload=2 * offloaded / machine.host_link_bytes,
        gathers=_gather_seconds(shape, layout, machine, layout.micro_steps(workload)),
    )


def product_flops(shape: ModelShape, layout: Layout) -> float:
    """FLOPs of matrix products of a token: forward, backward, and what is computed again.

    A recomputed layer is repeated to its end: DeepSpeed's linear function keeps the input of the
    MLP's down projection only after multiplying it, where torch's own would let the checkpoint stop
    before. The LM head is never repeated; its gradients are made with the loss.
    """
    repeated = layout.recomputed(shape) * shape.layer_parameters
    return 2.0 * (3 * shape.matrix_parameters + repeated)


def attention_flops(shape: ModelShape, layout: Layout, forward: float) -> float:
    """FLOPs that attention kernels execute in a micro-step, given those of a forward pass."""
    return (1 + _ATTENTION_BACKWARD + _attention_repeated(shape, layout)) * forward


def _attention_repeated(shape: ModelShape, layout: Layout) -> float:
    """Share of the layers whose attention, and exchange, the backward pass repeats."""
    is_full = layout.recompute is Recompute.full
    return layout.recomputed(shape) / shape.num_layers if is_full else 0.0


def exchange_passes(shape: ModelShape, layout: Layout) -> float:
    """How often a long segment is exchanged: forward, backward, where attention is repeated."""
    return 2 + _attention_repeated(shape, layout)


def exchange_bytes(shape: ModelShape, workload: Workload, layout: Layout) -> float:
    """Bytes a process sends in the forward pass of a long segment: q, k, v there, output back."""
    if layout.sequence == 1:
        return 0.0
    widths = 2 * shape.query_width + 2 * layout.kv_width(shape)
    sent = (layout.sequence - 1) / layout.sequence
    return shape.num_layers * layout.local_tokens(workload) * widths * layout.compute_bytes * sent


def key_bytes(shape: ModelShape, workload: Workload, layout: Layout) -> float:
    """Bytes of others' keys and values that a process gathers in a long segment's forward pass."""
    width = 2 * layout.kv_width(shape) * (layout.context - 1)
    return shape.num_layers * layout.local_tokens(workload) * width * layout.compute_bytes


def gather_bytes(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """Bytes of a micro-step's gathers (forward and backward), and of its reduced gradients.

    Not of parameters that stay whole: they are gathered once a step, after the update.
    """
    if layout.num_processes == 1:
        return 0.0, 0.0
    gradients = float(layout.gradient_bytes * shape.parameters)
    gathered = shape.parameters - shape.replicated(layout.zero.replicate_below)
    # The backward pass finds what the forward pass used last.
    still_there = min(gathered, layout.zero.max_live)
    return float(layout.compute_bytes * (2 * gathered - still_there)), gradients


def _exchange_seconds(
    shape: ModelShape, workload: Workload, layout: Layout, machine: Machine
) -> float:
    """Forward, backward, and again where attention is recomputed: one axis after the other."""
    heads, keys = (of(shape, workload, layout) for of in (exchange_bytes, key_bytes))
    neighbours = max(1, machine.gpus_per_node // layout.sequence)
    return exchange_passes(shape, layout) * (
        _among_ranks(heads, layout.sequence, machine.gpus_per_node, machine)
        + _among_ranks(keys, layout.context, neighbours, machine)
    )


def _among_ranks(num_bytes: float, ranks: int, most_on_node: int, machine: Machine) -> float:
    """Seconds to send as much to each of the other ranks of an axis, ``num_bytes`` in all.

    Those on the node are reached over its links, the rest over the network, both at once.
    """
    if ranks == 1:
        return 0.0
    to_each, on_node = num_bytes / (ranks - 1), min(ranks, most_on_node)
    inside, outside = to_each * (on_node - 1), to_each * (ranks - on_node)
    return max(inside / machine.node_link_bytes, outside / machine.network_bytes)


def gathered_from_all(shape: ModelShape, layout: Layout, micro_steps: float) -> float:
    """Share of the gathered weights that come from all processes, not from an hpZ group.

    The update makes the groups' copies worthless; the first forward pass after it fills them anew,
    and all others of the step's micro-steps, forward and backward, gather from them.
    """
    if layout.zero.hpz_size in (1, layout.num_processes):
        return 1.0
    of_a_micro_step, _ = gather_bytes(shape, layout)
    gathered = shape.parameters - shape.replicated(layout.zero.replicate_below)
    return layout.compute_bytes * gathered / (micro_steps * of_a_micro_step) if gathered else 1.0


def _gather_seconds(
    shape: ModelShape, layout: Layout, machine: Machine, micro_steps: float
) -> float:
    """Inside a node over its links; a node gets what it lacks over all its adapters at once."""
    weights, gradients = gather_bytes(shape, layout)
    processes, in_node = layout.num_processes, min(layout.num_processes, machine.gpus_per_node)
    inside = (in_node - 1) / in_node / machine.node_link_bytes
    num_nodes = -(-processes // machine.gpus_per_node)
    if num_nodes == 1:
        return (weights + gradients) * inside
    between = (num_nodes - 1) / num_nodes / (in_node * machine.network_bytes)
    in_groups = layout.zero.hpz_size <= machine.gpus_per_node
    share = gathered_from_all(shape, layout, micro_steps) if in_groups else 1.0
    slow = share * weights + gradients
    return slow * max(between, inside) + (weights + gradients - slow) * inside


def _elementwise_bytes_per_token(shape: ModelShape, layout: Layout) -> float:
    """Bytes that a forward pass's elementwise kernels read and write in all layers.

    As transformers computes them, with F the width of the MLP: a norm reads and writes 36H bytes in
    bf16 (to float32, square, mean, scale, back, weight), a fused one 2bH, two of them; two residual
    sums 6bH; rotary 9b per channel of queries and keys; the MLP's activation and product 5bF.
    """
    b = layout.compute_bytes
    unfused = 5 * b + 26 if layout.bf16 else 24
    norm = 2 * b if layout.fused_norms else unfused
    norms = 2 * norm * shape.hidden
    rest = 6 * b * shape.hidden + 9 * b * (shape.query_width + shape.kv_width) + 5 * b * shape.mlp
    return shape.num_layers * (norms + rest)


def forward_hours(
    shape: ModelShape, machine: Machine, samples: Iterable[tuple[int, float]]
) -> float:
    """Hours of forward passes spread evenly over all GPUs.

    Loading, elementwise kernels and the LM head (which gets a few positions) are not in it.
    ``samples`` are lengths in tokens, each with the number of samples of that length.
    """
    seconds = 0.0
    products = 2.0 * shape.num_layers * shape.layer_parameters / machine.gemm_flops
    for length, number in samples:
        attention = shape.attention_flops(length) / machine.attention_flops
        seconds += number * length * (products + attention)
    return seconds / machine.num_gpus / _SECONDS_PER_HOUR
