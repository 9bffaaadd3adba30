"""The planner's line of a training and its comparison with what is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longrope2.config import ModelConfig
from longrope2.kernel_choice import NormKernel
from longrope2.parallel.dims import ParallelConfig
from longrope2.planning.hardware import HardwareConfig, make_machine
from longrope2.planning.memory import Recompute
from longrope2.planning.timing import predict_micro_step
from longrope2.rope.factors import Window
from longrope2.segments.schedule import StepSchedule
from longrope2.training.config import Precision, TrainingConfig, TrainRoot
from longrope2.training.forecast import GIB, Forecast, ForecastCheck, make_forecast
from longrope2.training.machine import machine_setup
from longrope2.training.plan import ResolvedRun
from longrope2.training.step import StepReport

LLAMA = Path(__file__).parent.parent.parent / "models" / "llama3_8b"
LENGTH = 131_072


def resolved(
    config: TrainRoot, world_size: int, device: str, schedule: StepSchedule
) -> ResolvedRun:
    """A run of LLaMA3-8B on 1192 steps; nothing is tried on the device."""
    return ResolvedRun(
        config=config,
        world_size=world_size,
        machine=machine_setup(config, torch.device(device), run=False),
        model_folder=LLAMA,
        segments_folder=Path(),
        schedule=schedule,
        total_steps=1192,
        micro_steps=8,
        found_factors=None,
    )


def llama_forecast(*, machine: bool = True, stage: int = 3) -> Forecast:
    config = TrainRoot(
        model=ModelConfig(name="llama3_8b", original_len=8192),
        target_len=LENGTH,
        training=TrainingConfig(recompute=Recompute.full),
        parallel=ParallelConfig(sequence=8, zero_stage=stage),
    )
    schedule = StepSchedule(tuple(range(30)), tuple(range(70)), 64, 8, seed=0)
    found = make_forecast(resolved(config, 64, "cpu", schedule))
    assert found.machine is None  # no rates for a CPU
    rates = make_machine(HardwareConfig(gpu="A100")) if machine else None
    return replace(found, layout=replace(found.layout, bf16=True), machine=rates)


def report(seconds: float, num_long: int = 48, *, applied: bool = True) -> StepReport:
    """A step of 64 segments, its short ones in documents of 4,096 tokens."""
    squares = num_long * LENGTH**2 + (64 - num_long) * LENGTH * 4096
    return StepReport(
        loss=2.0,
        loss_by_window=dict.fromkeys(Window, 2.0),
        targets_by_window={Window.LONG: num_long * LENGTH, Window.SHORT: (64 - num_long) * LENGTH},
        gradient_norm=1.0,
        squared_lengths=squares,
        seconds=seconds,
        micro_step_seconds=dict.fromkeys(Window, 1.0),
        applied=applied,
    )


def test_line_with_and_without_rates() -> None:
    line = llama_forecast().line()
    # 30 short and 70 long segments in groups of 8 of a kind: 24 and 64 are trained.
    assert line.startswith(
        "planner    8,030.3 M parameters; 1.01e+18 FLOPs a step with 73 % long; "
    )
    assert "s a step on A100" in line and "tokens/s/GPU" in line and "h in all" in line
    assert "time unknown: no rates for this device" in llama_forecast(machine=False).line()
    assert "GiB a process in bf16, most in the backward pass" in line
    assert "GiB" not in llama_forecast(stage=2).line()


@pytest.mark.parametrize(
    ("norm", "device", "fused"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("model", "cuda", False),
        ("torch", "cpu", True),
    ],
)
def test_norms_are_counted_as_the_run_will_compute_them(
    norm: str, device: str, fused: bool
) -> None:
    training = TrainingConfig(
        norm=NormKernel(norm), precision=Precision.fp32
    )  # no rates are asked of the device
    config = TrainRoot(
        model=ModelConfig(name="m", original_len=8192), target_len=LENGTH, training=training
    )
    found = make_forecast(resolved(config, 1, device, StepSchedule((), (), 64, 8, seed=0)))
    assert found.layout.fused_norms is fused


def test_expected_step_is_that_of_the_segments_it_had() -> None:
    """48 long and 16 short segments: six and two micro-steps of eight groups."""
    forecast = llama_forecast()
    assert forecast.machine is not None
    long, short = (
        predict_micro_step(
            forecast.shape, forecast.workload, forecast.layout, forecast.machine, window=w
        ).total
        for w in (Window.LONG, Window.SHORT)
    )
    assert forecast.step_seconds(report(1.0)) == pytest.approx(6 * long + 2 * short, rel=1e-3)
    assert forecast.step_seconds(report(1.0, num_long=64)) == pytest.approx(8 * long, rel=1e-3)
    assert llama_forecast(machine=False).step_seconds(report(1.0)) is None


def test_warns_once_beyond_15_percent() -> None:
    forecast, warnings = llama_forecast(), []
    expected = forecast.step_seconds(report(1.0))
    assert expected is not None and forecast.memory is not None
    memory = forecast.memory.peak / GIB
    check = ForecastCheck(forecast, warnings.append)
    for step in range(1, 4):
        check.see(step, report(10 * expected), memory)  # warming up
    check.see(4, report(1.14 * expected), 1.14 * memory)
    check.see(5, report(2 * expected, applied=False), memory)
    assert warnings == []
    check.see(6, report(1.2 * expected), memory)
    check.see(7, report(1.3 * expected), 0.8 * memory)
    check.see(8, report(1.3 * expected), 0.8 * memory)
    assert len(warnings) == 2
    assert (
        warnings[0].startswith("warning: step time at step 6 is ")
        and "+20 % against the planner's" in warnings[0]
    )
    assert (
        warnings[1].startswith("warning: GPU memory at step 7 is ")
        and "-20 % against the planner's" in warnings[1]
    )


def test_nothing_is_compared_that_is_not_known() -> None:
    warnings: list[str] = []
    check = ForecastCheck(llama_forecast(machine=False, stage=2), warnings.append)
    for step in range(1, 9):
        check.see(step, report(1e6), 1e6 if step > 4 else None)
    assert warnings == []
