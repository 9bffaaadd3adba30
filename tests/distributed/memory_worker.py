"""Run under torchrun: peak bytes of the tensors that are alive while a tiny random Llama trains.

Arguments: OUTPUT.json, then one ``recompute:ranks:tokens:kind:norm`` per case; ``ranks`` is the
sequence-parallel size, or ``context x sequence`` as in ``2x1``; kind L is one long segment, S a
short one of documents of 512 tokens. Every storage that an operator returns
counts from then until it is freed, on whichever thread, DeepSpeed's buffers and what autograd saves
included; scratch space inside one operator, the interpreter and libraries do not. (Resident memory
is too noisy for sizes like these, and torch's profiler does not see what gloo's threads free.)
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.kernel_choice import NormKernel
from longrope2.model.norms import use_norm
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig, ParallelDims, make_groups
from longrope2.parallel.processes import join_processes, leave_processes
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import load_rank_batch
from longrope2.training.config import TrainingConfig, ZeroConfig
from longrope2.training.engine import apply_recompute, deepspeed_settings
from longrope2.training.meter import LiveStorages
from longrope2.training.optimizer import make_optimizer
from longrope2.training.step import StepGuard, run_step

SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
ORIGINAL_LEN, DOCUMENT_TOKENS, BUCKET_ELEMENTS, NUM_STEPS = 512, 512, 1_000_000, 2


@dataclass(frozen=True)
class OneSegment:
    """Stands in for the store on disk."""

    tokens: int
    window: Window

    def segment(self, index: int) -> Segment:
        span = self.tokens if self.window is Window.LONG else DOCUMENT_TOKENS
        ends = np.arange(span, self.tokens + 1, span, dtype=np.int32)
        names = tuple(map(str, ends))
        tokens = (
            np.random.default_rng(index)
            .integers(0, SIZES["vocab_size"], self.tokens)
            .astype(np.uint16)
        )
        return Segment(
            index, self.window, tokens, ends, names, names, (False,) * len(ends), False, 0
        )


def train(recompute: str, ranks: str, norm: str, store: OneSegment) -> None:
    """Two steps as ``launch.train`` makes them."""
    import deepspeed

    context, sequence = map(int, ranks.split("x") if "x" in ranks else (1, ranks))
    parallel = ParallelConfig(sequence=sequence, context=context, zero_stage=3, replicate_below=0)
    dims = ParallelDims.from_world(
        torch.distributed.get_world_size(), sequence, torch.distributed.get_rank(), context
    )
    group, mpu, context_group, _ = make_groups(dims)
    factors = closed_form_factors(
        RopeMethod.pi, RopeGeometry(32, 10_000.0, ORIGINAL_LEN), store.tokens
    )
    training = TrainingConfig()
    model = WindowedModel(LlamaForCausalLM(LlamaConfig(**SIZES)), factors)
    use_norm(model.hf, NormKernel(norm))
    apply_recompute(model.hf, Recompute(recompute))
    model.train()
    zero = ZeroConfig(reduce_bucket_elements=BUCKET_ELEMENTS)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, training),
        config=deepspeed_settings(training, parallel, zero, micro_steps=1, bf16=False),
        mpu=mpu,
    )
    guard = StepGuard(engine, clip=1.0)
    for step in range(NUM_STEPS):
        micro = MicroStep(store.window, tuple(range(step, step + dims.data)))
        batches = [load_rank_batch(store, micro, dims, group, context_group=context_group)]
        run_step(guard, batches, dims, learning_rate=1e-4)
    if mpu is not None:
        mpu._release_sequence_parallel_groups()
        deepspeed.utils.groups.mpu = None


def measured_peak(case: str) -> int:
    """Highest sum of live storages, bytes."""
    recompute, ranks, tokens, kind, norm = case.split(":")
    store = OneSegment(int(tokens), Window.LONG if kind == "L" else Window.SHORT)
    gc.collect()
    with LiveStorages() as storages:
        train(recompute, ranks, norm, store)
    return storages.peak


def main() -> None:
    output, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    join_processes(ParallelConfig())
    peaks = {case: measured_peak(case) for case in cases}
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(peaks))
    leave_processes()


if __name__ == "__main__":
    main()
