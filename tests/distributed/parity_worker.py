"""Run under torchrun: train a tiny random Llama three steps in each requested layout and write what came out.

Arguments: OUTPUT.json, then one ``zero_stage:sequence:kv_heads:segments`` per case, where ``segments`` is a word over
S (short, aligned), U (short, unaligned) and L (long). Weights, data and batch are the same for every layout.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.model import WindowedModel
from longrope2.parallel import ParallelConfig, ParallelDims, join_processes, leave_processes, make_groups
from longrope2.rope import RescaleFactors, RopeGeometry, RopeMethod, Window, closed_form_factors
from longrope2.segments import MicroStep, Segment
from longrope2.training.batch import load_rank_batch
from longrope2.training.config import TrainingConfig
from longrope2.training.deepspeed_settings import deepspeed_settings
from longrope2.training.guard import StepGuard
from longrope2.training.optimizer import make_optimizer
from longrope2.training.step import run_step
from longrope2.training.zero import ZeroConfig

LENGTH = 256
VOCAB = 97
DOC_ENDS = {"S": (40, 64, 100, 128, 190, 192, 256), "U": (30, 70, 135, 200, 250, 256), "L": (150, 256)}
NUM_STEPS = 3


@dataclass(frozen=True)
class SegmentsInMemory:
    """Stands in for the store on disk: the segments of the case, the last one with padding at its end."""

    kinds: str

    def segment(self, index: int) -> Segment:
        kind = self.kinds[index]
        ends = DOC_ENDS[kind]
        padded = tuple(kind != "L" and end == LENGTH for end in ends)
        tokens = np.random.default_rng(index).integers(0, VOCAB, LENGTH).astype(np.uint16)
        window = Window.LONG if kind == "L" else Window.SHORT
        names = tuple(str(i) for i in range(len(ends)))
        return Segment(index, window, tokens, np.array(ends, np.int32), names, names, padded, False, 0)


def tiny_llama(kv_heads: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, tie_word_embeddings=kv_heads == 4, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def factors() -> RescaleFactors:
    return closed_form_factors(
        RopeMethod.yarn, RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=64), LENGTH
    )


def train_case(case: str) -> dict:
    import deepspeed

    zero_stage, sequence, kv_heads, kinds = case.split(":")
    parallel = ParallelConfig(sequence=int(sequence), zero_stage=int(zero_stage), replicate_below=0)
    dims = ParallelDims.from_world(
        int(os.environ.get("WORLD_SIZE", "1")), parallel.sequence, torch.distributed.get_rank()
    )
    group, mpu = make_groups(dims)
    training = TrainingConfig(learning_rate=1e-2, weight_decay=0.1, gradient_clip=0.5)
    model = WindowedModel(tiny_llama(int(kv_heads)), factors())
    store = SegmentsInMemory(kinds)
    # Consecutive segments of one kind form the micro-steps, dims.data at a time.
    micro = [
        MicroStep(store.segment(i).window, tuple(range(i, i + dims.data))) for i in range(0, len(kinds), dims.data)
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, training),
        config=deepspeed_settings(training, parallel, ZeroConfig(), micro_steps=len(micro), bf16=False),
        mpu=mpu,
    )
    guard = StepGuard(engine)
    steps = []
    for _ in range(NUM_STEPS):
        batches = [load_rank_batch(store, m, dims, group) for m in micro]
        report = run_step(
            engine, guard, batches, dims, zero_stage=parallel.zero_stage, learning_rate=training.learning_rate,
            gradient_clip=training.gradient_clip,
        )  # fmt: skip
        steps.append({
            "loss": report.loss, "gradient_norm": report.gradient_norm,
            "by_window": [report.loss_by_window[w] for w in Window], "targets": list(report.targets_by_window.values()),
        })  # fmt: skip
    weights = []
    for _, parameter in model.hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights.append(parameter.detach().double().norm().item())
    if mpu is not None:  # both modules keep the groups in globals; the next case needs its own
        mpu._release_sequence_parallel_groups()
        deepspeed.utils.groups.mpu = None
    return {"steps": steps, "weights": weights}


def main() -> None:
    output, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    join_processes(ParallelConfig())
    results = {case: train_case(case) for case in cases}
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results))
    leave_processes()


if __name__ == "__main__":
    main()
