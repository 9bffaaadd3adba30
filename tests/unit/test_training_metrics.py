"""FLOPs of a step against published counts, names of metrics against the design document."""

import json
from pathlib import Path

import pytest
import torch

from longrope2.model.shape import ModelShape
from longrope2.rope.factors import Window
from longrope2.training.forecast import peak_tflops
from longrope2.training.observer import step_metrics
from longrope2.training.step import StepReport

ARCHITECTURES = {
    "llama3_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "phi3_mini": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_064},
}  # fmt: skip
TARGET = 131_072


def shape_of(name: str, folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **ARCHITECTURES[name]}))
    return ModelShape.from_folder(folder)


@pytest.mark.parametrize(("name", "billion"), [("llama3_8b", 7.505), ("phi3_mini", 3.722)])
def test_matrix_weights_are_the_published_counts(tmp_path: Path, name: str, billion: float) -> None:
    shape = shape_of(name, tmp_path)
    assert shape.training_flops(1, 0.0) / 6e9 == pytest.approx(billion, abs=5e-4)


def test_causal_attention_by_brute_force(tmp_path: Path) -> None:
    """Two products per layer and attended pair of positions, forward and twice that backward."""
    shape = shape_of("llama3_8b", tmp_path)
    lengths = (5, 2, 9)
    # The convention's causal half is d * d / 2 pairs; the diagonal's other half is left out.
    pairs = sum(sum(i + 1 for i in range(d)) - d / 2 for d in lengths)
    found = shape.training_flops(16, sum(d * d for d in lengths)) - shape.training_flops(16, 0.0)
    assert found == pytest.approx(3 * 32 * 2 * (2 * 4096) * pairs)


def test_utilisation_of_the_paper_run(tmp_path: Path) -> None:
    """LLaMA3-8B at 803.8 tokens/s on an A100, 70 % long, the rest in documents of 4,096."""
    shape = shape_of("llama3_8b", tmp_path)
    long_share = shape.training_flops(TARGET, TARGET**2)
    short_share = shape.training_flops(TARGET, TARGET * 4096)
    per_token = (0.7 * long_share + 0.3 * short_share) / TARGET
    assert per_token == pytest.approx(118.1e9, rel=1e-3)
    assert per_token * 803.8 / 312e12 == pytest.approx(0.304, abs=5e-4)


def report(window: Window | None = None) -> StepReport:
    occurred = list(Window) if window is None else [window]
    return StepReport(
        loss=2.0,
        loss_by_window=dict.fromkeys(Window, 2.0),
        targets_by_window={w: int(w in occurred) for w in Window},
        gradient_norm=1.0,
        squared_lengths=64.0,
        seconds=0.5,
        micro_step_seconds=dict.fromkeys(occurred, 0.2),
        step=2,
        learning_rate=1e-3,
        skipped_steps=1,
    )


def metrics(tmp_path: Path, found: StepReport, peak: float | None) -> dict[str, float | int]:
    shape = shape_of("phi3_mini", tmp_path)
    return step_metrics(found, shape, num_devices=4, tokens=16, memory_gib=0.5, peak=peak)


DESIGN_NAMES = {
    "train/loss", "train/loss_short", "train/loss_long", "train/grad_norm", "train/learning_rate",
    "train/tokens",
    "perf/tokens_per_second_per_gpu", "perf/mfu", "perf/step_seconds",
    "perf/micro_step_seconds_short",
    "perf/micro_step_seconds_long", "perf/memory_peak_gib",
}  # fmt: skip


def test_every_metric_of_the_design(tmp_path: Path) -> None:
    found = metrics(tmp_path, report(), 312.0)
    assert set(found) == DESIGN_NAMES | {"train/skipped_steps"}
    assert found["perf/tokens_per_second_per_gpu"] == 16 / 4 / 0.5
    assert (found["train/tokens"], found["train/skipped_steps"]) == (32, 1)
    expected = shape_of("phi3_mini", tmp_path).training_flops(16, 64.0) / 0.5 / (4 * 312e12)
    assert found["perf/mfu"] == pytest.approx(expected)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    found = metrics(tmp_path, report(Window.LONG), None)
    left_out = {"train/loss_short", "perf/micro_step_seconds_short", "perf/mfu"}
    assert set(found) == (DESIGN_NAMES | {"train/skipped_steps"}) - left_out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA RTX A1000", None),
        ("Quadro P400", None),
    ],
)
def test_peak_by_device_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), None, bf16=True) == peak
    assert peak_tflops(torch.device("cuda"), None, bf16=False) is None
    assert peak_tflops(torch.device("cuda"), 100.0, bf16=True) == 100.0


def test_a_cpu_has_no_peak_unless_given() -> None:
    assert peak_tflops(torch.device("cpu"), None, bf16=True) is None
    assert peak_tflops(torch.device("cpu"), 0.1, bf16=False) == 0.1
