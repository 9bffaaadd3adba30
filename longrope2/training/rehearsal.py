"""A run as one of its ranks executes it, without memory, time or the other ranks.

The run's own model in shares, DeepSpeed engine, micro-steps of both kinds and optimizer step, at
its real size, by torch's fake tensors (shapes without numbers) and its ``fake`` process group
(collectives that return at once). Nothing of the trainer is replaced; what a rank without numbers
cannot answer is answered for it (``_without_numbers``).

What differs from the run on its GPUs: tensors are fake ones of a CPU, weights start at random
instead of being read, attention is torch's varlen kernel, fused norms are one that only keeps and
makes what every fused kernel does (on a CPU torch's is many operators with float32 copies), AdamW
is torch's fused one, and collectives end at once, so that nothing overlaps. Not seen: scratch space
inside one operator, and copies from GPU to CPU.

Two steps are made; the first fills caches (DeepSpeed records the order of its parameters, the
optimizer makes its state), and the second is what is reported.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longrope2.attention.layout import chunk_bounds
from longrope2.kernel_choice import AttentionKernel, KernelChoice, NormKernel
from longrope2.model import windowed as of_windowed
from longrope2.model.given import build_without_memory, look_at, read_config
from longrope2.model.loading import check_model, rope_geometry
from longrope2.model.norms import use_norm
from longrope2.parallel.dims import ParallelDims, make_groups
from longrope2.parallel.processes import Processes
from longrope2.rope.factors import Window
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training import step as of_step
from longrope2.training.batch import RankBatch, load_rank_batch
from longrope2.training.config import OptimizerKind
from longrope2.training.engine import make_engine
from longrope2.training.machine import machine_setup
from longrope2.training.meter import Meter, Phase
from longrope2.training.plan import ResolvedRun
from longrope2.training.step import StepGuard, run_step

# The rank that is rehearsed: its shares are the largest, others' are padded.
_RANK = 0
_STEPS = 2


@dataclass(frozen=True)
class Rehearsal:
    """What was counted."""

    phases: tuple[Phase, ...]
    """Making model and engine, then one step of a micro-step a window kind."""
    short_document_tokens: float
    """Mean length of the documents in the short segment, weighted by length."""


def rehearse(run: ResolvedRun, *, short_document_tokens: int) -> Rehearsal:
    """Two steps of rank 0, each of one micro-step a window kind; the second is what is counted.

    The process becomes that rank for good: call it once a process, and nothing else of torch's
    distributed part after it.

    Args:
        run: Its machine is not used; weights, segments and factors may be missing.
        short_document_tokens: Length of the documents in the short segment, which end at every
            rank's border too, as ``--align`` packs them.
    """
    run = _for_rehearsal(run)
    check_model(run.model_folder, run.config.model.original_len)  # cached: it needs numbers
    _try_norms(run)
    processes = _join_as_one_of(run)
    kinds = list(Window)
    batches = [_batch(run, processes, kind, short_document_tokens) for kind in kinds]
    fake, meter = _fake_mode(), Meter()
    before = 0
    with fake, meter, _without_numbers(run.model_folder):
        meter.begin("model and engine")
        engine = make_engine(run, processes)
        guard = StepGuard(engine, clip=run.config.training.gradient_clip)
        on_device = [_made_fake(batch, fake) for batch in batches]
        watch = _Watch(meter, engine.module, kinds)
        for step in range(_STEPS):
            before = len(meter.phases)
            watch.micro_step = 0
            report = run_step(
                guard,
                on_device,
                processes.dims,
                learning_rate=run.config.training.learning_rate,
                step=step + 1,
                mark=watch.mark,
            )
            assert report.applied, "a refused update would be counted as none"
        meter.close()
    squares = batches[kinds.index(Window.SHORT)].squared_lengths
    return Rehearsal(
        phases=(meter.phases[1], *meter.phases[before:]),
        short_document_tokens=squares / run.config.target_len,
    )


def _for_rehearsal(run: ResolvedRun) -> ResolvedRun:
    """The run as its GPUs would compute it, on fake tensors of a CPU."""
    config = run.config
    on_gpu = machine_setup(config, torch.device("cuda"), run=False)
    own_norms = config.training.norm is NormKernel.model
    machine = replace(
        on_gpu,
        device=torch.device("cpu"),
        attention=KernelChoice(AttentionKernel.torch_varlen, "rehearsed"),
        norm=KernelChoice(NormKernel.model if own_norms else NormKernel.torch, "rehearsed"),
        fused_update=True,
        faults=(),
    )
    training = replace(config.training, optimizer=OptimizerKind.torch_adamw)
    model = replace(config.model, from_scratch=True)
    factors = run.found_factors
    if factors is None:  # their values change no size
        geometry = rope_geometry(run.model_folder, config.model.original_len)
        factors = closed_form_factors(RopeMethod.ntk, geometry, config.target_len)
    config = replace(config, training=training, model=model)
    return replace(
        run, config=config, machine=machine, micro_steps=len(Window), found_factors=factors
    )


def _try_norms(run: ResolvedRun) -> None:
    """Let ``use_norm`` find out with real numbers which norms are plain; it remembers."""
    use_norm(build_without_memory(read_config(run.model_folder)), run.machine.norm.kernel)


def _join_as_one_of(run: ResolvedRun) -> Processes:
    """Be rank ``_RANK`` of a process group whose other ranks are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = run.world_size
    os.environ.update(RANK=str(_RANK), WORLD_SIZE=str(world), LOCAL_RANK="0")
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("fake", rank=_RANK, world_size=world, store=FakeStore())
    import deepspeed

    # By its full name: deepspeed.comm has an attribute "torch" that is another module.
    of_backend = importlib.import_module("deepspeed.comm.torch")
    # CPU ranks of one machine share memory by an extension that is compiled; GPUs do not.
    with mock.patch.object(of_backend, "build_shm_op", lambda: None):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    parallel = run.config.parallel
    dims = ParallelDims.from_world(world, parallel.sequence, _RANK, parallel.context)
    return Processes(dims, torch.device("cpu"), *make_groups(dims))


class _OneSegment:
    """Stands in for the store: any index is a segment of one kind."""

    def __init__(self, window: Window, doc_ends: np.ndarray) -> None:
        self._window, self._ends = window, doc_ends

    def segment(self, index: int) -> Segment:
        """Tokens of one id."""
        names = tuple(map(str, self._ends))
        return Segment(
            index,
            self._window,
            np.zeros(self._ends[-1], np.uint32),
            doc_ends=self._ends,
            sources=names,
            doc_ids=names,
            doc_is_padding=(False,) * len(names),
            starts_mid_document=False,
            num_padding=0,
        )


def _batch(
    run: ResolvedRun, processes: Processes, window: Window, short_document_tokens: int
) -> RankBatch:
    """This rank's micro-step of one kind."""
    dims, length = processes.dims, run.config.target_len
    ends = {length}
    if window is Window.SHORT:
        for rank in range(dims.segment_ranks):
            start, stop = chunk_bounds(length, rank, dims.segment_ranks)
            ends |= {*range(start + short_document_tokens, stop, short_document_tokens), stop}
    store = _OneSegment(window, np.array(sorted(ends), np.int32))
    return load_rank_batch(
        store,
        MicroStep(window, tuple(range(dims.data))),
        dims,
        processes.sequence_group,
        context_group=processes.context_group,
        mixed=run.config.training.mixed,
        kernel=run.machine.attention.kernel,
    )


class _Watch:
    """Begins a phase for the layers, the loss and the backward pass of every micro-step."""

    def __init__(self, meter: Meter, model: Any, kinds: Sequence[Window]) -> None:
        self._meter, self._kinds, self.micro_step = meter, kinds, 0
        layers = model.hf.base_model
        layers.register_forward_hook(self._loss_begins)

    def mark(self, phase: str) -> None:
        """What ``run_step`` says."""
        if phase.startswith("micro-step"):
            self._kind = self._kinds[self.micro_step].value
            self.micro_step += 1
            phase = f"{self._kind}: forward"
        self._meter.begin(phase)

    def _loss_begins(self, _: Any, inputs: Any, outputs: Any) -> None:
        self._meter.begin(f"{self._kind}: loss")
        outputs.last_hidden_state.register_hook(self._backward_begins)

    def _backward_begins(self, _: Tensor) -> None:
        self._meter.begin(f"{self._kind}: backward")


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _made_fake(batch: RankBatch, fake: Any) -> RankBatch:
    """Without its numbers; a layout keeps them, since kernels are told the documents' lengths."""
    return replace(
        batch,
        tokens_BT=fake.from_tensor(batch.tokens_BT),
        labels_BT=fake.from_tensor(batch.labels_BT),
    )


class _FusedNorm(torch.autograd.Function):
    """A fused RMS norm without numbers: one operator each way, between which the input is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor) -> Tensor:
        """Keeps input, weight and a float32 number a token."""
        scales = torch.empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight_H, scales)
        return torch.empty_like(hidden)

    @staticmethod
    @once_differentiable  # whose type makes ctx positional
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of input and weight."""
        hidden, weight_H, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight_H)


def _fused_norm(hidden: Tensor, shape: Any, weight_H: Tensor, epsilon: float) -> Tensor:
    """Stands in for ``F.rms_norm``."""
    normed = _FusedNorm.apply(hidden, weight_H)
    assert isinstance(normed, Tensor)
    return normed


@contextlib.contextmanager
def _without_numbers(model_folder: Path) -> Iterator[None]:
    """Answer what a rank that is alone and has no numbers cannot.

    What is asked of the model's class is answered as it was before, with real numbers; comparisons
    between ranks are left out.
    """
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    given = look_at(model_folder)
    same = "assert_ints_same_as_other_ranks"
    answers = [
        (of_windowed, "find_rotary", lambda hf: given.rotary),
        (of_windowed, "find_head_rule", lambda config: given.head_rule),
        (partition_parameters, same, lambda ints: None),
        (partitioned_param_coordinator, same, lambda ints: None),
        (stage3, same, lambda ints: None),
        (of_step, "check_agreement", lambda *of_ranks: None),
        (torch.nn.functional, "rms_norm", _fused_norm),
    ]
    with contextlib.ExitStack() as patches:
        for module, name, answer in answers:
            patches.enter_context(mock.patch.object(module, name, answer))
        yield
