"""``python -m benchmarks.train``: a step of mixed windows and its loss, ours against other ways.

Ranks (gloo, ZeRO-3; four, of which two share a segment) train one random Llama on the same 20
segments, 70 % long and 30 % short:

    ours          micro-steps of one window kind; short windows attend per document, no exchange
    random order  the same segments and code, paired across data-parallel groups by chance: a group
                  with a short segment waits for the other's long one in every gather of ZeRO-3
    all alike     DeepSpeed's own UlyssesSPAttentionHF: every segment causal over its whole length;
                  left out with ``--sequence 1``

A rank that waits costs nothing where ranks share a core: compare the orders with one rank a core
(``--ranks 2 --sequence 1`` on two cores). Printed are seconds of forward, backward and update,
ratios to ours (above 1: slower) and the model FLOPs each did (the convention of model/shape.py).
The ways take turns; the best of ``--rounds`` counts, so that a noisy machine touches all alike.
``all alike`` has its own loss function replaced by ours, so that attention and order are all that
differs.

Then the peak memory of the summed loss with its backward pass, fused against plain logits, each in
a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.command import run_command
from longrope2.errors import ConfigError
from longrope2.model.loss import token_loss_sum
from longrope2.model.shape import ModelShape
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig
from longrope2.parallel.processes import Processes, join_processes, leave_processes
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import RankBatch, load_rank_batch
from longrope2.training.config import TrainingConfig, ZeroConfig
from longrope2.training.engine import deepspeed_settings
from longrope2.training.optimizer import make_optimizer
from longrope2.training.step import gradient_scale

NUM_LONG, NUM_SHORT = 14, 6
VOCABULARY, HIDDEN, LAYERS, HEADS = 1024, 128, 4, 8
TRAINING = TrainingConfig()
PLAIN_COPIES = 3
"""Copies of the logits that plain cross-entropy and its backward pass may hold at once."""


class RandomSegments:
    """Stands in for a store: long segments, then short ones of aligned documents of a sixteenth."""

    def __init__(self, length: int) -> None:
        self.length = length

    def segment(self, index: int) -> Segment:
        """Random tokens."""
        window = Window.LONG if index < NUM_LONG else Window.SHORT
        ends = np.arange(1, 17, dtype=np.int32) * (self.length // 16)
        tokens = np.random.default_rng(index).integers(0, VOCABULARY, self.length).astype(np.uint16)
        names = tuple(map(str, range(16)))
        return Segment(index, window, tokens, ends, names, names, (False,) * 16, False, 0)


def model_config(length: int) -> LlamaConfig:
    """The model of all three ways."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    return LlamaConfig(**sizes, max_position_embeddings=length)


def orders(processes: Processes) -> dict[str, list[int]]:
    """This rank's segments, micro-step by micro-step."""
    data, me = processes.dims.data, processes.dims.data_rank
    total = NUM_LONG + NUM_SHORT
    alike = list(range(total))[me::data]
    mixed = np.random.default_rng(0).permutation(total).tolist()[me::data]
    chosen = {"ours": alike, "random order": mixed}
    return chosen | ({"all alike": alike} if processes.dims.sequence > 1 else {})


def make_engine(model: torch.nn.Module, processes: Processes, micro_steps: int) -> Any:
    """DeepSpeed's engine, the same settings for all ways."""
    import deepspeed

    parallel = ParallelConfig(sequence=processes.dims.sequence, zero_stage=3)
    settings = deepspeed_settings(
        TRAINING, parallel, ZeroConfig(), micro_steps=micro_steps, bf16=False
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, TRAINING),  # type: ignore[arg-type]
        config=settings,
        mpu=processes.mpu,
    )
    return engine


class PlainUlysses(torch.nn.Module):
    """DeepSpeed's sequence-parallel attention around an unchanged model, with our loss."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.hf = LlamaForCausalLM(config)

    def forward(self, batch: RankBatch, positions_BT: torch.Tensor) -> torch.Tensor:
        """Summed loss of this rank's tokens."""
        inputs = {"input_ids": batch.tokens_BT, "position_ids": positions_BT}
        hidden_TH = self.hf.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return token_loss_sum(hidden_TH, self.hf.lm_head.weight, batch.labels_BT.flatten())


def seconds_of(engine: Any, forwards: list[Callable[[], torch.Tensor]], scale: float) -> float:
    """One step of micro-steps; the slowest rank's time."""
    torch.distributed.barrier()
    began = time.perf_counter()
    for forward in forwards:
        engine.backward(forward() * scale)
        engine.step()
    seconds = torch.tensor(time.perf_counter() - began)
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    return float(seconds)


def compare(length: int, rounds: int, sequence: int) -> dict[str, Any]:
    """Time the ways in turn; every rank calls this."""
    processes = join_processes(ParallelConfig(sequence=sequence))
    torch.set_num_threads(1)
    store = RandomSegments(length)
    geometry = RopeGeometry(HIDDEN // HEADS, 10_000.0, length // 16)
    torch.manual_seed(0)
    factors = closed_form_factors(RopeMethod.yarn, geometry, length)
    windowed = WindowedModel(LlamaForCausalLM(model_config(length)), factors).train()
    chosen = orders(processes)
    micro_steps = len(chosen["ours"])
    engine = make_engine(windowed, processes, micro_steps)
    engines: dict[str, Any] = {"ours": engine, "random order": engine}
    if "all alike" in chosen:
        # A config of its own: it holds the choice of attention.
        plain = plain_ulysses(model_config(length), sequence)
        engines["all alike"] = make_engine(plain, processes, micro_steps)
    targets = processes.dims.data * micro_steps * length
    scale = gradient_scale(processes.dims, 3, micro_steps, targets)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    forwards = {n: forwards_of(n, engines[n], chosen[n], store, processes) for n in chosen}
    for _ in range(rounds + 1):  # the first is the warm-up
        for name in chosen:
            seconds[name].append(seconds_of(engines[name], forwards[name], scale))
    leave_processes()
    return {n: {"seconds": min(s[1:]), "flops": flops_of(n, length)} for n, s in seconds.items()}


def plain_ulysses(config: LlamaConfig, sequence: int) -> PlainUlysses:
    """The model under DeepSpeed's wrapper, which would make the groups that there are again."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    torch.manual_seed(0)
    plain = PlainUlysses(config)
    plain.hf.set_attn_implementation("sdpa")
    register = UlyssesSPAttentionHF.register_with_transformers
    with patch.object(parallel_state_sp, "initialize_sequence_parallel"):
        register(plain.hf, "sdpa", sequence, 1, seq_length_is_variable=True)
    return plain.train()


def forwards_of(
    name: str, engine: Any, segment_ids: list[int], store: RandomSegments, processes: Processes
) -> list[Callable[[], torch.Tensor]]:
    """The forward passes of one way's micro-steps."""
    dims, group = processes.dims, processes.sequence_group
    forwards: list[Callable[[], torch.Tensor]] = []
    for index in segment_ids:
        micro = MicroStep(store.segment(index).window, (index,) * dims.data)
        batch = load_rank_batch(store, micro, dims, group, mixed=name != "all alike")
        if name == "all alike":
            forwards.append(lambda b=batch: engine(b, b.layout.positions_BT))
        else:
            forwards.append(lambda b=batch: engine(b.tokens_BT, b.labels_BT, b.window, b.layout))
    return forwards


def flops_of(name: str, length: int) -> float:
    """Model FLOPs of one step, all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        model_config(length).save_pretrained(folder)
        shape = ModelShape.from_folder(Path(folder))
    total = NUM_LONG + NUM_SHORT
    num_long = total if name == "all alike" else NUM_LONG
    squares = num_long * length**2 + (total - num_long) * length**2 / 16
    return shape.training_flops(total * length, squares)


def loss_peak_bytes(kind: str, tokens: int, vocabulary: int, hidden: int) -> int:
    """Growth of this process's peak memory over one loss and its backward pass."""
    hidden_TH = torch.randn(tokens, hidden, requires_grad=True)
    head_VH = torch.randn(vocabulary, hidden, requires_grad=True)
    labels_T = torch.randint(vocabulary, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "fused":
        loss = token_loss_sum(hidden_TH, head_VH, labels_T)
    else:
        loss = F.cross_entropy(F.linear(hidden_TH, head_VH).float(), labels_T, reduction="sum")
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def compare_losses(tokens: int, vocabulary: int, hidden: int) -> dict[str, int | str]:
    """Peak memory of both losses, each in its own process; plain logits only where they fit."""
    found: dict[str, int | str] = {}
    needed, free = PLAIN_COPIES * tokens * vocabulary * 4, psutil.virtual_memory().available
    for kind in ("fused", "plain"):
        if kind == "plain" and needed > free:
            found[kind] = f"needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            task = pool.submit(loss_peak_bytes, kind, tokens, vocabulary, hidden)
            found[kind] = task.result()
    return found


def report_steps(found: dict[str, Any]) -> None:
    """Print times, ratios and FLOPs."""
    ours = found["ours"]
    for name, entry in found.items():
        print(
            f"{name:<13}{entry['seconds']:8.2f} s{entry['seconds'] / ours['seconds']:7.2f}x"
            f"{entry['flops'] / 1e12:9.3f} TFLOP{entry['flops'] / ours['flops']:7.2f}x"
        )


def check(length: int, ranks: int, sequence: int) -> None:
    """Refuse, with all faults together, what cannot be shared evenly."""
    if min(length, ranks, sequence) < 1:
        given = f"--length {length}, --ranks {ranks} and --sequence {sequence}"
        raise ConfigError([f"{given} must be at least 1"])
    faults = []
    if length % 16 or 16 % sequence or HEADS // 2 % sequence:
        given = f"--length {length} and --sequence {sequence}"
        faults.append(f"{given}: 16 documents and {HEADS // 2} heads must divide evenly")
    if ranks % sequence or NUM_LONG % (ranks // sequence) or NUM_SHORT % (ranks // sequence):
        shared = f"{NUM_LONG} long and {NUM_SHORT} short segments"
        faults.append(f"--ranks {ranks}: groups of {sequence} must share {shared} evenly")
    if faults:
        raise ConfigError(faults)


def run_ranks(ranks: int) -> dict[str, Any]:
    """This command again, as ranks of torchrun; what they found."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "steps.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        worker = ["-m", "benchmarks.train", *sys.argv[1:], "--json", str(output)]
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment = {**quiet, **os.environ, "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, *launcher, *worker], env=environment, check=True)
        return json.loads(output.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="A training step and its loss, ours against other ways.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for flag, default, meaning in (
        ("--length", 2048, "tokens of a segment, 16 documents a rank"),
        ("--ranks", 4, "processes"),
        ("--sequence", 2, "ranks that share a segment"),
        ("--rounds", 3, "steps of each way; the best counts"),
        ("--loss-tokens", 16_384, "tokens of the loss"),
        ("--loss-vocabulary", 128_256, "words of the loss"),
        ("--loss-hidden", 64, "hidden size of the loss; small, so that logits are what counts"),
    ):
        parser.add_argument(flag, type=int, default=default, help=meaning)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    check(given.length, given.ranks, given.sequence)
    if "RANK" in os.environ:
        found = compare(given.length, given.rounds, given.sequence)
        if os.environ["RANK"] == "0":
            given.json.write_text(json.dumps(found))
        return
    steps = run_ranks(given.ranks)
    report_steps(steps)
    losses = compare_losses(given.loss_tokens, given.loss_vocabulary, given.loss_hidden)
    print(f"peak memory of the loss, {given.loss_tokens} tokens x {given.loss_vocabulary} words:")
    for kind, peak in losses.items():
        print(f"  {kind:<6}{peak if isinstance(peak, str) else f'{peak / 2**20:.0f} MiB'}")
    if given.json:
        settings = {name: getattr(given, name) for name in ("length", "ranks", "sequence")}
        settings |= {"torch": torch.__version__}
        figures = {**settings, "steps": steps, "loss_peak_bytes": losses}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
