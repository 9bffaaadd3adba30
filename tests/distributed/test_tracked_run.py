"""200 steps of the miniature on four ranks, stopped half-way.

The loss of both windows falls, and W&B has all of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from forked_ranks import ForkedRanks
from small_runs import pack_segments, records, write_config
from transformers import AutoModelForCausalLM
from wandb_offline import history, offline_files, read_offline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]  # minutes; an hour where cores are shared

RANKS, STEPS = 4, 200
TRAINING = ("training.global_batch_tokens=1024", f"training.tokens={1024 * STEPS}",
            "training.same_kind_segments=2",
            "training.checkpoint_steps=50", "training.peak_tflops=0.1", "training.final_dtype=bf16",
            "tracking.wandb=offline",
            f"parallel.processes={RANKS}", "parallel.sequence=2")  # fmt: skip
# design.md, "Tracking names", of a training run; train/skipped_steps stands beside them.
NAMES = {
    "train/loss", "train/loss_short", "train/loss_long", "train/grad_norm", "train/learning_rate",
    "train/tokens",
    "perf/tokens_per_second_per_gpu", "perf/mfu", "perf/step_seconds",
    "perf/micro_step_seconds_short",
    "perf/micro_step_seconds_long", "perf/memory_peak_gib",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pack_segments(folder, align=2, tokens=110_000)
    return folder


@pytest.fixture(scope="module")
def trained(runs: Path) -> Iterator[Path]:
    """The finished run's ``3_checkpoints``."""
    with ForkedRanks(runs / "log") as ranks:
        for overrides in (("training.stop_after_step=100",), ()):
            config = write_config(runs, "tracked", *TRAINING, *overrides)
            assert ranks.run(config, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
        yield config.parent


def test_the_loss_of_both_windows_falls(runs: Path, trained: Path) -> None:
    found = records(runs, "tracked")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for window in ("short", "long"):
        losses = [r[f"train/loss_{window}"] for r in found if f"train/loss_{window}" in r]
        assert len(losses) >= 40
        first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        assert last < first - 1.0, f"{window}: {first} -> {last}"


def test_wandb_has_every_metric_and_product(trained: Path, runs: Path) -> None:
    files = offline_files(trained)
    assert len(files) == 2, "one file for each part of the run"
    parts = [read_offline(file) for file in files]
    started = [next(r.run for r in part if r.WhichOneof("record_type") == "run") for part in parts]
    assert len({run.run_id for run in started}) == 1, (
        "the second part continues the first one's run"
    )
    assert {(run.run_group, run.job_type) for run in started} == {("tracked", "train")}
    logged = [row for part in parts for row in history(part)]
    assert [row["_step"] for row in logged] == list(range(1, STEPS + 1))
    assert {name for row in logged for name in row} >= NAMES
    for row, record in zip(logged, records(runs, "tracked"), strict=True):
        assert {k: v for k, v in row.items() if "/" in k} == {
            k: v for k, v in record.items() if "/" in k
        }
    x_axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric
        for r in parts[0]
        if r.WhichOneof("record_type") == "metric"
    }
    assert (x_axes["train/*"], x_axes["perf/*"]) == ("train/tokens", "train/tokens")
    kept = [
        {
            r.artifact.type: {e.path for e in r.artifact.manifest.contents}
            for r in part
            if r.WhichOneof("record_type") == "artifact"
        }
        for part in parts
    ]
    started_with = {
        "config": {"config.yaml"},
        "factors": {"factors.json"},
        "segments": {"manifest.json"},
    }
    assert kept == [started_with, started_with | {"manifest": {"manifest.json"}}]
    settings = {update.key: json.loads(update.value_json) for update in started[0].config.update}
    assert (settings["seed"], settings["training"]["learning_rate"], settings["target_len"]) == (
        0,
        1e-3,
        256,
    )


def test_final_weights_are_bf16_and_complete(trained: Path) -> None:
    """Gathered from four ranks under ZeRO-3, against the last checkpoint's master weights."""
    loaded, report = AutoModelForCausalLM.from_pretrained(
        trained / "final", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    masters = get_fp32_state_dict_from_zero_checkpoint(str(trained), tag=f"step_{STEPS:08d}")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, masters[f"hf.{name}"].to(torch.bfloat16)), name
