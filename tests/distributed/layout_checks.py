"""Checks of two ranks that are no training case.

Each returns what the test looks at. Imported by ``parity_worker``.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from parity_worker import (
    TRAINING,
    SegmentsInMemory,
    factors,
    processes_of,
    rank_batch,
    release,
    tiny_llama,
    whole_weights,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention import windowed
from longrope2.errors import UserError
from longrope2.kernel_choice import NormKernel
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig
from longrope2.parallel.processes import Processes
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import Window
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.schedule import StepSchedule
from longrope2.training import selftest, step
from longrope2.training.batch import load_rank_batch
from longrope2.training.config import Precision, TrainRoot
from longrope2.training.engine import RankShares, wrap_model
from longrope2.training.machine import machine_setup
from longrope2.training.plan import ResolvedRun
from longrope2.training.selftest import check_parity
from longrope2.training.step import StepGuard, check_agreement, fingerprints, run_step


def root(
    *, sequence: int, context: int = 1, zero_stage: int = 3, recompute: Recompute = Recompute.none
) -> TrainRoot:
    training = replace(TRAINING, precision=Precision.fp32, recompute=recompute)
    parallel = ParallelConfig(
        sequence=sequence, context=context, zero_stage=zero_stage, replicate_below=0
    )
    return TrainRoot(training=training, parallel=parallel)


def resolved(
    config: TrainRoot, processes: Processes, *, model_folder: Path = Path(), micro_steps: int = 2
) -> ResolvedRun:
    """What an engine is made from; no products stand behind it."""
    return ResolvedRun(
        config=config,
        world_size=processes.dims.world_size,
        machine=machine_setup(config, processes.device, run=True),
        model_folder=model_folder,
        segments_folder=Path(),
        schedule=StepSchedule((), (), segments_per_step=1, group_size=1, seed=0),
        total_steps=0,
        micro_steps=micro_steps,
        found_factors=None,
    )


def message_of(call: Callable[[], None]) -> str | None:
    """The user error a call ends with."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def check_selftest() -> dict[str, str | None]:
    """The self-test as it is, then with planted faults: what it says on this rank."""
    found: dict[str, str | None] = {}
    before = torch.random.get_rng_state()
    for sequence, stage in ((2, 3), (2, 0), (1, 3)):
        processes = processes_of(sequence)
        found[f"{sequence}:{stage}"] = run_selftest(processes, stage)
        if (sequence, stage) == (2, 3):
            with patch.object(step, "gradient_scale", doubled_scale):
                found["gradient scale"] = run_selftest(processes, stage)
            with (
                patch.object(selftest, "_step_alone", step_alone_without_fault),
                patch.object(WindowedModel, "use_window", always_short),
            ):
                found["rotary window"] = run_selftest(processes, stage)
            found["fused norm"] = run_selftest(processes, stage, NormKernel.torch)
            with patch.object(torch.nn.functional, "rms_norm", norm_that_shrinks):
                found["norm"] = run_selftest(processes, stage, NormKernel.torch)
        release(processes)
    found["random state"] = str(torch.equal(before, torch.random.get_rng_state()))
    return found


def check_grids() -> dict[str, str | None]:
    """What the self-test says of 9 query and 3 key/value heads in every grid that shares segments.

    Within 1e-5, tighter than it is at a start.
    """
    found: dict[str, str | None] = {}
    world = dist.get_world_size()
    for sequence, context in product((1, 3), range(1, world + 1)):
        if sequence * context == 1 or world % (sequence * context):
            continue
        processes = processes_of(sequence, context)
        for stage in (2, 3):
            with patch.object(selftest, "_RELATIVE", 1e-5):
                said = run_selftest(processes, stage, heads=(9, 3))
            found[f"{context}x{sequence}:{stage}"] = said
        release(processes)
    return found


def run_selftest(
    processes: Processes,
    zero_stage: int,
    norm: NormKernel = NormKernel.auto,
    heads: tuple[int, int] = (4, 1),
) -> str | None:
    """What the self-test of a model with these query and key/value heads says."""
    with tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {"model_type": "llama"}
        config |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        config |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config |= {"vocab_size": 61}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        dims = processes.dims
        of_run = root(sequence=dims.sequence, context=dims.context, zero_stage=zero_stage)
        of_run.training.norm = norm
        run = resolved(of_run, processes, model_folder=Path(folder))
        return message_of(lambda: check_parity(run, processes))


plain_scale, plain_step_alone = step.gradient_scale, selftest._step_alone


plain_rms_norm = torch.nn.functional.rms_norm


def norm_that_shrinks(x: Tensor, shape: Any, weight: Tensor, epsilon: float) -> Tensor:
    return plain_rms_norm(x, shape, weight * 0.9, epsilon)


def doubled_scale(*given: Any) -> float:
    return 2 * plain_scale(*given)


def step_alone_without_fault(*given: Any) -> Any:
    with patch.object(WindowedModel, "use_window", plain_use_window):
        return plain_step_alone(*given)


plain_use_window = WindowedModel.use_window


def always_short(model: WindowedModel, window: Window) -> None:
    plain_use_window(model, Window.SHORT)


def check_disagreement() -> dict[str, str | None]:
    """Rank 1 works on another segment, then on another window kind, then on what it should."""
    processes = processes_of(2)
    rank = dist.get_rank()
    found: dict[str, str | None] = {}
    for name, kinds, first in (
        ("same", "LL", 0),
        ("segment", "LL", rank),
        ("window", "LS" if rank else "LL", 0),
    ):
        store = SegmentsInMemory(kinds)
        micro = (
            store.micro_steps(processes.dims)[first:] + store.micro_steps(processes.dims)[:first]
        )
        batches = [
            load_rank_batch(store, m, processes.dims, processes.sequence_group) for m in micro
        ]
        sums = torch.tensor(fingerprints(batches, processes.dims), dtype=torch.float64)
        dist.all_reduce(sums)
        values = sums.tolist()
        found[name] = message_of(
            lambda v=values, b=batches: check_agreement(v, b, processes.dims, 7)
        )
    release(processes)
    return found


def check_recompute(axis: str = "sequence") -> dict[str, Any]:
    """One step under ZeRO-3 with heads exchanged, or keys gathered, per policy.

    Numbers, weights, and how often what ran on this rank.
    """
    found: dict[str, Any] = {}
    sent = {"sequence": "tokens_to_heads", "context": "gather_keys"}[axis]
    for policy in Recompute:
        processes = processes_of(**{"sequence": 1, axis: 2})
        store = SegmentsInMemory("UL")
        micro = store.micro_steps(processes.dims)
        dims = processes.dims
        config = root(sequence=dims.sequence, context=dims.context, recompute=policy)
        model = WindowedModel(tiny_llama("2"), factors())
        run = resolved(config, processes, micro_steps=len(micro))
        engine = wrap_model(model, run, processes)
        batches = [rank_batch(store, m, processes) for m in micro]
        with (
            patch.object(
                windowed, "document_attention", wraps=windowed.document_attention
            ) as attention,
            patch.object(windowed, sent, wraps=getattr(windowed, sent)) as exchange,
        ):
            guard = StepGuard(engine, clip=0.5)
            report = run_step(guard, batches, processes.dims, learning_rate=1e-2)
        found[policy.value] = {
            "loss": report.loss,
            "norm": report.gradient_norm,
            "attention": attention.call_count,
            "exchange": exchange.call_count,
            "weights": whole_weights(model),
        }
        engine.destroy()
        release(processes)
    return found


def check_shares() -> dict[str, Any]:
    """A model of 100 MB loaded in shares and whole: weights alike, bytes that every rank holds."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    processes = processes_of(1)
    folders: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    if processes.is_main:
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
    dist.barrier()
    factors_of_it = closed_form_factors(RopeMethod.ntk, rope_geometry(folder, 64), 256)
    whole = load_windowed_model(folder, factors_of_it)
    expected = {name: p.detach().clone() for name, p in whole.hf.named_parameters()}
    size = sum(p.numel() * 4 for p in expected.values())
    del whole
    shares = RankShares(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        None,
        torch.float32,
    )
    taken: list[Any] = []
    held_by_now = []

    def take(parameter: nn.Parameter) -> None:
        """Hand over to DeepSpeed.

        Count what this rank holds of all parameters so far, the new one still whole.
        """
        whole_bytes = parameter.numel() * 4
        shares.take(parameter)
        held_by_now.append(
            whole_bytes + sum((p.data.numel() + p.ds_tensor.numel()) * 4 for p in taken)
        )
        taken.append(parameter)

    shared = load_windowed_model(folder, factors_of_it, take=take, read=processes.is_main)
    held = sum(p.ds_tensor.numel() * 4 for p in shared.parameters()) / size
    equal = all(torch.equal(value, expected[name]) for name, value in whole_weights(shared).items())
    tied = shared.hf.lm_head.weight is shared.hf.model.embed_tokens.weight
    del shared
    torch.manual_seed(3)
    plain = load_windowed_model(folder, factors_of_it, from_scratch=True)
    torch.manual_seed(3)
    shares = RankShares(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        None,
        torch.float32,
    )
    random = load_windowed_model(folder, factors_of_it, from_scratch=True, take=shares.take)
    plain_weights = {name: p.detach() for name, p in plain.hf.named_parameters()}
    random_equal = all(
        torch.equal(value, plain_weights[name]) for name, value in whole_weights(random).items()
    )
    mine = {
        "equal": equal,
        "tied": tied,
        "held": held,
        "random_equal": random_equal,
        "peak": max(held_by_now) / size,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {"ranks": everyone, "bytes": size}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "selftest": check_selftest,
    "grids": check_grids,
    "disagreement": check_disagreement,
    "recompute": check_recompute,
    "recompute_context": partial(check_recompute, "context"),
    "shares": check_shares,
}
