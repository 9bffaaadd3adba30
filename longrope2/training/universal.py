"""A checkpoint for another number of ranks: DeepSpeed's universal one, and what it gets wrong.

ZeRO cuts the optimizer's state into as many shards as there are ranks. DeepSpeed's converter joins
the shards into one file per parameter and state, and every rank then reads its part. Of DeepSpeed
0.19.8 the following is put right here:

- loading into stage 3 gives every parameter group the hyperparameters of the first one (norms and
  embeddings would begin to decay), and all groups one shared step counter, which then advances once
  per group and step;
- that counter is loaded onto the device it was saved from;
- a stage 1 or 2 checkpoint needs a mark that only Megatron writes, and takes the sequence-parallel
  size for a tensor-parallel one (``checkpoint.py``).

Between stage 3 and stages 1 and 2 nothing is converted: neither reads the other's files. Every
checkpoint records the step counter and, per parameter, the sums of squares of the weights and both
moments; what was loaded is compared with them.
"""

import contextlib
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import describe_input, write_text
from longrope2.parallel.processes import done_by_main

Mark = Callable[..., None]
"""``Heartbeat.mark``: what a rank does now."""
_CONVERTED, _SOURCE = "converted_", "source_sha256"
_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_SAME_SUM = 1e-9
"""Relative difference allowed between two sums of squares: the order of summation in float64."""


@dataclass(frozen=True)
class ShardLayout:
    """How a checkpoint is cut into files."""

    world_size: int
    zero_stage: int
    bf16: bool

    @classmethod
    def of(cls, engine: Any) -> "ShardLayout":
        """The layout that an engine writes and reads directly."""
        stage, bf16 = int(engine.zero_optimization_stage()), bool(engine.bfloat16_enabled())
        return cls(dist.get_world_size(), stage, bf16)

    def fits(self, other: "ShardLayout") -> bool:
        """Whether files of this layout load directly into ``other``.

        Without ZeRO and in float32 nothing is sharded.
        """
        whole = self.zero_stage == other.zero_stage == 0 and not (self.bf16 or other.bf16)
        return self == other or whole

    def converts_to(self, other: "ShardLayout") -> bool:
        """Stages 1 and 2 convert into each other, 3 into itself, and none to another format."""
        stages = {self.zero_stage, other.zero_stage}
        return stages in ({3}, {1}, {2}, {1, 2}) and self.bf16 == other.bf16


def optimizer_record(engine: Any) -> dict[str, Any]:
    """Step counter, and per parameter the sums of squares of weights and moments over all ranks.

    ``{"step": n, "sums": {parameter: [fp32, exp_avg, exp_avg_sq]}}``; without ZeRO (nothing to
    convert) no sums. Every rank calls this.
    """
    record: dict[str, Any] = {"step": _step(engine), "sums": {}}
    if engine.zero_optimization_stage() == 0:
        return record
    rows = {}
    for name, parameter in engine.module.named_parameters():
        rows[name] = [_sum_of_squares(shard) for shard in _shards(engine, parameter)]
    totals = torch.tensor(list(rows.values()), dtype=torch.float64, device=engine.device)
    dist.all_reduce(totals)
    record["sums"] = dict(zip(rows, totals.tolist(), strict=True))
    return record


def no_mark(phase: str, *, moves_bytes: bool = False) -> None:
    """Where nobody watches."""


def load_converted(
    engine: Any,
    checkpoint: Path,
    written_as: ShardLayout,
    record: dict[str, Any],
    mark: Mark = no_mark,
) -> None:
    """Load a checkpoint of another layout, converted, and compare that with what was saved.

    Every rank calls this, and ``mark`` is told what it does. The copy stands beside the checkpoint
    meanwhile: as much disk again.

    Raises:
        ArtifactError: the layouts do not convert, the conversion failed, or it lost something.
    """
    wanted = ShardLayout.of(engine)
    _refuse_inconvertible(checkpoint, written_as, wanted)
    converted = _converted(checkpoint)
    mark("converting a checkpoint", moves_bytes=True)
    failure = done_by_main(partial(_convert_unless_done, checkpoint, written_as, wanted), mark)
    if failure is not None:
        raise ArtifactError(failure)
    mark("loading a converted checkpoint", moves_bytes=True)
    groups = [dict(group) for group in engine.basic_optimizer.param_groups]
    with _reading_universal(engine):
        engine.load_checkpoint(str(converted.parent), tag=converted.name)
    _put_right(engine.basic_optimizer, groups, record["step"])
    _compare(checkpoint, record, optimizer_record(engine))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(converted)
        done = f"step {record['step']}, {len(record['sums'])} parameters"
        print(f"{checkpoint.name} converted and verified: {done}", flush=True)


def convert(checkpoint: Path, written_as: ShardLayout, wanted: ShardLayout) -> None:
    """Convert a checkpoint, unless that is done; it appears under its name when it is whole.

    Raises:
        ArtifactError: the conversion failed.
    """
    if (failure := _convert_unless_done(checkpoint, written_as, wanted)) is not None:
        raise ArtifactError(failure)


def forget_converted_but(newest: Path) -> None:
    """Remove converted copies that nobody loaded, of all checkpoints but one."""
    for copy in newest.parent.glob(f"{_CONVERTED}*"):
        if copy != _converted(newest):
            shutil.rmtree(copy)


def _converted(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{_CONVERTED}{checkpoint.name}")


def _convert_unless_done(
    checkpoint: Path, written_as: ShardLayout, wanted: ShardLayout
) -> str | None:
    """One process: convert beside the final place, then move; why it failed."""
    converted, source = _converted(checkpoint), describe_input(checkpoint)["sha256"]
    if converted.is_dir():
        if (converted / _SOURCE).read_text(encoding="utf-8") == source:
            return None
        shutil.rmtree(converted)
    origin = f"{written_as.world_size} ranks at ZeRO stage {written_as.zero_stage}"
    goal = f"{wanted.world_size} ranks at stage {wanted.zero_stage}"
    print(f"{checkpoint.name} was written by {origin}; converting it for {goal}", flush=True)
    working = checkpoint.with_name(f".{checkpoint.name}.universal")
    if (failure := _convert(checkpoint, working)) is not None:
        return f"{checkpoint} could not be converted: {failure}"
    write_text(working / _SOURCE, source)
    working.rename(converted)
    return None


def _refuse_inconvertible(checkpoint: Path, written_as: ShardLayout, wanted: ShardLayout) -> None:
    """Name the stage that has to stay."""
    if written_as.converts_to(wanted):
        return
    stage, bf16 = written_as.zero_stage, " in bf16"
    raise ArtifactError(
        f"{checkpoint} was written by {written_as.world_size} ranks at ZeRO stage {stage}"
        f"{bf16 if written_as.bf16 else ''}, which does not convert to stage {wanted.zero_stage}"
        f"{bf16 if wanted.bf16 else ''}: give parallel.zero_stage={stage}"
        f"{'' if stage else ' and as many ranks'}"
    )


def _convert(checkpoint: Path, universal: Path) -> str | None:
    """Run DeepSpeed's converter, apart from this process and its threads; why it failed."""
    shutil.rmtree(universal, ignore_errors=True)
    module = "deepspeed.checkpoint.ds_to_universal"
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    command = [sys.executable, "-m", module, "--inject_missing_state", *folders]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)
    if ended.returncode != 0:
        return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    return None


@contextlib.contextmanager
def _reading_universal(engine: Any) -> Iterator[None]:
    """While open, universal checkpoints are read, no sequence group for a tensor-parallel one."""
    config, optimizer = engine._config, engine.optimizer
    mpu, config.load_universal_checkpoint = getattr(optimizer, "mpu", None), True
    optimizer.mpu = None
    try:
        yield
    finally:
        config.load_universal_checkpoint = False
        optimizer.mpu = mpu


def _put_right(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], step: int | None
) -> None:
    """Each group's own hyperparameters, each state's own step counter, where it belongs."""
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: own[key] for key in own if key not in ("params", "step")})
        if step is not None and "step" in group:
            group["step"] = step
    for state in optimizer.state.values():
        if step is not None and "exp_avg" in state:
            place = state["exp_avg"].device if optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.tensor(float(step), device=place)


def _compare(checkpoint: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    faults = []
    if saved["step"] != loaded["step"]:
        faults.append(f"step {loaded['step']} instead of {saved['step']}")
    nothing = [math.nan] * len(_STATES)
    for name, sums in saved["sums"].items():
        after = loaded["sums"].get(name, nothing)
        faults += [
            f"{state} of {name}"
            for state, a, b in zip(_STATES, sums, after, strict=True)
            if not math.isclose(a, b, rel_tol=_SAME_SUM)
        ]
    if faults:
        shown = ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        fault = f"{checkpoint} lost something in the conversion: {shown}"
        raise ArtifactError(f"{fault}; go on with the number of ranks that wrote it")


def _shards(engine: Any, parameter: torch.Tensor) -> list[torch.Tensor | None]:
    """This rank's part of a parameter's weights and moments in float32; None where it has none."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        try:
            moments = [safe_get_local_optimizer_state(parameter, state) for state in _STATES[1:]]
        except KeyError:  # no step has been applied yet
            moments = [None] * len(_STATES[1:])
        return [safe_get_local_fp32_param(parameter), *moments]
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return [None] * len(_STATES)
    # Not the mapping's own moments: DeepSpeed links them after the first group's first update, when
    # others have none yet.
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    state, place = engine.basic_optimizer.state[flat], mapping.get_hp_fragment_address()
    parts = [flat, *(state.get(moment) for moment in _STATES[1:])]
    return [p if p is None else p.narrow(0, place.start, place.numel) for p in parts]


def _sum_of_squares(shard: torch.Tensor | None) -> float:
    """In float64, for any size without a copy in float64."""
    if shard is None:
        return 0.0
    parts = shard.detach().flatten().split(2**22)
    return sum(float(part.double().square().sum()) for part in parts)


def _step(engine: Any) -> int | None:
    """The optimizer's own count of updates, which corrects the bias of its moments."""
    optimizer = engine.basic_optimizer
    for holder in [*optimizer.state.values(), *optimizer.param_groups]:
        if "step" in holder:
            return int(holder["step"])
    return None
