"""Before GPU hours are spent: does this layout of processes compute what one process computes?

A tiny random Llama, whose heads relate to the sequence-parallel size as the real model's do, takes
one step per window kind through the configured parallelism (same grid, ZeRO stage, sharded
parameters, recompute policy), in float32 and without changing its weights. Every rank computes the
same alone, in plain torch over whole segments; loss and gradient norm must agree within
``_RELATIVE``. A wrong gradient scale, a mask or RoPE table of the wrong window, a segment put
together in the wrong order show here within seconds, and later not at all. Kernels are the run's
own where they can compute in float32; flash attention is checked when it is chosen. Nothing is left
behind: random state and DeepSpeed's counters are as before.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention.kernels import kernel_fault
from longrope2.errors import UserError
from longrope2.kernel_choice import AttentionKernel
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelDims
from longrope2.parallel.processes import Processes
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import load_rank_batch
from longrope2.training.config import Precision
from longrope2.training.engine import take_in_shares, wrap_model
from longrope2.training.plan import ResolvedRun
from longrope2.training.step import StepGuard, run_step

_RELATIVE = 1e-4
_VOCABULARY, _HEAD_DIM, _LAYERS = 61, 16, 2
_LEAST_HIDDEN = 32
_CHUNK_TOKENS = 24  # per rank
_BUCKET_ELEMENTS = 10_000
_KINDS = {Window.SHORT: ("aligned", "crossing"), Window.LONG: ("crossing", "aligned")}
_Sums = dict[str, float]
"""Loss per target token and global gradient norm of one step."""


def check_parity(run: ResolvedRun, processes: Processes) -> None:
    """Run the self-test; every rank calls this before it loads the model.

    Raises:
        UserError: loss or gradient norm differ from one process; names window, quantity and both
            values.
    """
    dims, stage = processes.dims, run.config.parallel.zero_stage
    shape = ModelShape.from_folder(run.model_folder)
    heads, kv_heads = tiny_heads(dims.sequence, shape.num_heads, shape.num_kv_heads)
    with _nothing_left_behind(processes.device):
        found = _steps_in_layout(_tiny_run(run), heads, kv_heads, processes)
        expected = {window: _step_alone(window, heads, kv_heads, processes) for window in Window}
    faults = []
    for window in Window:
        for name, value in found[window].items():
            alone = expected[window][name]
            if not math.isclose(value, alone, rel_tol=_RELATIVE):
                both = f"{value:.7g} in this layout, {alone:.7g} in one process"
                faults.append(f"{window.value} window: {name} {both}")
    if faults:
        layout = f"{dims.describe()}, ZeRO stage {stage}"
        raise UserError(
            f"the self-test before training failed: {'; '.join(faults)} (layout: {layout}; {heads} "
            f"query and {kv_heads} key/value heads). Training would not compute what it should. "
            "Compare the installed versions of deepspeed, torch and transformers with "
            "constraints.txt, or use another parallel.sequence, parallel.context or "
            "parallel.zero_stage"
        )


def tiny_heads(sequence: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Query and key/value heads of the tiny model.

    As few as keep the real model's relation to the sequence-parallel size: one key/value head per
    rank where they divide evenly (two where the real model has several), as many as the real model
    has where they are replicated, and two query heads per key/value head where it groups them.
    """
    if kv_heads >= sequence:
        tiny_kv = sequence * min(2, kv_heads // sequence)
        return tiny_kv * min(2, heads // kv_heads), tiny_kv
    return math.lcm(kv_heads, sequence) * min(2, heads // sequence), kv_heads


def _tiny_run(run: ResolvedRun) -> ResolvedRun:
    """The run in float32, with small buffers, nothing kept whole, and two micro-steps a step."""
    config, machine, kernel = run.config, run.machine, run.machine.attention
    zero = replace(
        config.zero,
        gradient_dtype=Precision.auto,
        sequence_gradient_dtype=Precision.fp32,
        reduce_bucket_elements=min(_BUCKET_ELEMENTS, config.zero.reduce_bucket_elements),
        gather_bucket_elements=min(_BUCKET_ELEMENTS, config.zero.gather_bucket_elements),
    )
    parallel = replace(config.parallel, replicate_below=0)
    if kernel_fault(kernel.kernel, machine.device, torch.float32, run=False):
        kernel = replace(kernel, kernel=AttentionKernel.sdpa)
    machine = replace(machine, dtype=torch.float32, attention=kernel)
    config = replace(config, zero=zero, parallel=parallel)
    return replace(run, config=config, machine=machine, micro_steps=2)


def _steps_in_layout(
    run: ResolvedRun, heads: int, kv_heads: int, processes: Processes
) -> dict[Window, _Sums]:
    """One step per window through DeepSpeed at a learning rate of 0."""
    dims, kernel = processes.dims, run.machine.attention.kernel
    group, context_group = processes.sequence_group, processes.context_group
    model = tiny_model(heads, kv_heads, dims.segment_ranks).to(processes.device)
    take_in_shares(model, run, processes)
    engine = wrap_model(model, run, processes)
    guard = StepGuard(engine, clip=run.config.training.gradient_clip)
    sums = {}
    for window in Window:
        store = TinySegments(window, dims)
        micro_steps = [store.micro_step(number) for number in range(run.micro_steps)]
        batches = [
            load_rank_batch(store, m, dims, group, context_group=context_group, kernel=kernel)
            for m in micro_steps
        ]
        batches = [batch.to(processes.device) for batch in batches]
        report = run_step(guard, batches, dims, learning_rate=0.0)
        sums[window] = {"loss": report.loss, "gradient norm": report.gradient_norm}
    engine.destroy()
    return sums


def _step_alone(window: Window, heads: int, kv_heads: int, processes: Processes) -> _Sums:
    """The same step on all segments of all ranks, in this process."""
    model = tiny_model(heads, kv_heads, processes.dims.segment_ranks).to(processes.device)
    store = TinySegments(window, processes.dims)
    one = ParallelDims.from_world(1, 1)
    total, targets = torch.zeros((), device=processes.device), 0
    for index in range(store.num_segments):
        batch = load_rank_batch(store, MicroStep(window, (index,)), one, None).to(processes.device)
        total = total + model(batch.tokens_BT, batch.labels_BT, window, batch.layout)
        targets += batch.num_targets
    (total / targets).backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": total.item() / targets, "gradient norm": torch.stack(norms).norm().item()}


def tiny_model(heads: int, kv_heads: int, segment_ranks: int) -> WindowedModel:
    """The tiny model for so many ranks that share a segment, the same on every rank."""
    torch.manual_seed(0)
    original_len = _CHUNK_TOKENS // 2
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=-(-_LEAST_HIDDEN // heads) * heads,  # transformers wants a multiple
        intermediate_size=48,
        num_hidden_layers=_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD_DIM,
        tie_word_embeddings=False,
        initializer_range=0.2,
        max_position_embeddings=original_len,
    )
    geometry = RopeGeometry(rotary_dim=_HEAD_DIM, rope_base=10_000.0, original_len=original_len)
    target_len = _CHUNK_TOKENS * max(2, segment_ranks)
    factors = closed_form_factors(RopeMethod.yarn, geometry, target_len)
    return WindowedModel(LlamaForCausalLM(config), factors)


class TinySegments:
    """Two segments per data-parallel group; in one of them documents cross the ranks' borders."""

    def __init__(self, window: Window, dims: ParallelDims) -> None:
        self.window = window
        self.num_segments = 2 * dims.data
        self._data, self._length = dims.data, _CHUNK_TOKENS * dims.segment_ranks

    def micro_step(self, number: int) -> MicroStep:
        """One of the two micro-steps."""
        return MicroStep(self.window, tuple(range(number * self._data, (number + 1) * self._data)))

    def segment(self, index: int) -> Segment:
        """Random tokens; documents of 7 and 17 tokens in a rank's chunk, or of 11 across them."""
        ends = np.array([*range(11, self._length, 11), self._length], np.int32)
        if _KINDS[self.window][index // self._data] == "aligned":
            chunks = np.arange(0, self._length, _CHUNK_TOKENS, dtype=np.int32)
            ends = np.stack([chunks + 7, chunks + _CHUNK_TOKENS], axis=1).flatten()
        random = np.random.default_rng(index)
        tokens = random.integers(0, _VOCABULARY, self._length).astype(np.uint16)
        names = tuple(map(str, range(len(ends))))
        padded = tuple((ends == self._length).tolist())
        return Segment(
            index,
            self.window,
            tokens,
            doc_ends=ends,
            sources=names,
            doc_ids=names,
            doc_is_padding=padded,
            starts_mid_document=False,
            num_padding=0,
        )


@contextmanager
def _nothing_left_behind(device: torch.device) -> Iterator[None]:
    """Random states and DeepSpeed's counters of sharded parameters are as before afterwards."""
    from deepspeed.runtime.zero import Init  # by now loaded with DS_ACCELERATOR set (processes.py)

    names = "param_id num_persisted_parameters num_persisted_elements apply_param_persistence"
    names += " param_persistence_threshold model_persistence_threshold"
    before = {name: getattr(Init, name) for name in names.split()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for name, value in before.items():
        setattr(Init, name, value)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
