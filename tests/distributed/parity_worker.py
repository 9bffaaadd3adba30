"""Run under torchrun: three steps of a tiny random Llama in each requested layout, written out.

Arguments: OUTPUT.pt, then one ``zero_stage:ranks:heads:segments`` per case, where ``ranks`` is the
sequence-parallel size, or ``context x sequence`` as in ``2x4``, ``heads`` the key/value heads of
four query heads, or both as in ``9/3``, and ``segments`` a word over S (short, aligned for four
ranks), U (short, unaligned) and L (long); or the name of a check in ``layout_checks.py``. Weights,
data and batch are the same for every layout.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig, ParallelDims, make_groups
from longrope2.parallel.processes import Processes, join_processes, leave_processes
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import RankBatch, load_rank_batch
from longrope2.training.config import TrainingConfig, ZeroConfig
from longrope2.training.engine import deepspeed_settings
from longrope2.training.optimizer import make_optimizer
from longrope2.training.step import StepGuard, run_step

LENGTH = 256
VOCAB = 97
ORIGINAL_LEN = 64
DOC_ENDS = {
    "S": (40, 64, 100, 128, 190, 192, 256),
    "U": (30, 70, 135, 200, 250, 256),
    "L": (150, 256),
}
NUM_STEPS = 3
TRAINING = TrainingConfig(learning_rate=1e-4, weight_decay=0.1, gradient_clip=0.5)


@dataclass(frozen=True)
class SegmentsInMemory:
    """Stands in for the store on disk.

    The segments of the case, the last one with padding at its end.
    """

    kinds: str

    def segment(self, index: int) -> Segment:
        kind = self.kinds[index]
        ends = DOC_ENDS[kind]
        padded = tuple(kind != "L" and end == LENGTH for end in ends)
        tokens = np.random.default_rng(index).integers(0, VOCAB, LENGTH).astype(np.uint16)
        window = Window.LONG if kind == "L" else Window.SHORT
        names = tuple(str(i) for i in range(len(ends)))
        return Segment(
            index, window, tokens, np.array(ends, np.int32), names, names, padded, False, 0
        )

    def micro_steps(self, dims: ParallelDims) -> list[MicroStep]:
        """Consecutive segments of one kind form the micro-steps, ``dims.data`` at a time."""
        starts = range(0, len(self.kinds), dims.data)
        return [MicroStep(self.segment(i).window, tuple(range(i, i + dims.data))) for i in starts]


def tiny_llama(heads: str) -> nn.Module:
    """A Llama with the heads of a case."""
    torch.manual_seed(0)
    query_heads, kv_heads = map(int, heads.split("/") if "/" in heads else (4, heads))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=-(-64 // query_heads) * query_heads,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        tie_word_embeddings=kv_heads == 4,
        max_position_embeddings=ORIGINAL_LEN,
    )
    return LlamaForCausalLM(config)


def factors() -> RescaleFactors:
    geometry = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN)
    return closed_form_factors(RopeMethod.yarn, geometry, LENGTH)


def processes_of(sequence: int, context: int = 1) -> Processes:
    """This process in a grid with ``context * sequence`` ranks per segment."""
    dims = ParallelDims.from_world(
        int(os.environ.get("WORLD_SIZE", "1")), sequence, torch.distributed.get_rank(), context
    )
    return Processes(dims, torch.device("cpu"), *make_groups(dims))


def release(processes: Processes) -> None:
    """Both modules keep the groups in globals; the next case needs its own."""
    import deepspeed

    if processes.mpu is not None:
        processes.mpu._release_sequence_parallel_groups()
        deepspeed.utils.groups.mpu = None


def whole_weights(model: WindowedModel) -> dict[str, torch.Tensor]:
    import deepspeed

    weights = {}
    for name, parameter in model.hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


def rank_batch(store: SegmentsInMemory, micro: MicroStep, processes: Processes) -> RankBatch:
    """This rank's share of a micro-step."""
    group, context_group = processes.sequence_group, processes.context_group
    return load_rank_batch(store, micro, processes.dims, group, context_group=context_group)


def train_case(case: str) -> dict[str, Any]:
    import deepspeed

    zero_stage, ranks, heads, kinds = case.split(":")
    context, sequence = map(int, ranks.split("x") if "x" in ranks else (1, ranks))
    parallel = ParallelConfig(
        sequence=sequence, context=context, zero_stage=int(zero_stage), replicate_below=0
    )
    processes = processes_of(sequence, context)
    model = WindowedModel(tiny_llama(heads), factors())
    store = SegmentsInMemory(kinds)
    micro = store.micro_steps(processes.dims)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, TRAINING),
        config=deepspeed_settings(
            TRAINING, parallel, ZeroConfig(), micro_steps=len(micro), bf16=False
        ),
        mpu=processes.mpu,
    )
    guard = StepGuard(engine, clip=TRAINING.gradient_clip)
    steps = []
    for step in range(1, NUM_STEPS + 1):
        batches = [rank_batch(store, m, processes) for m in micro]
        rate = TRAINING.learning_rate
        report = run_step(guard, batches, processes.dims, learning_rate=rate, step=step)
        steps.append(
            {
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "by_window": [report.loss_by_window[w] for w in Window],
                "targets": list(report.targets_by_window.values()),
            }
        )
    weights = whole_weights(model)
    engine.destroy()
    release(processes)
    return {"steps": steps, "weights": weights}


def main() -> None:
    output, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    join_processes(ParallelConfig())
    import layout_checks  # after DS_ACCELERATOR is set

    results = {}
    for case in cases:
        began = time.perf_counter()
        results[case] = train_case(case) if ":" in case else layout_checks.CHECKS[case]()
        print(f"{case}: {time.perf_counter() - began:.1f} s")
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    leave_processes()


if __name__ == "__main__":
    main()
