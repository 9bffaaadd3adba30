"""The planner as a command: what it prints, which hardware it knows, what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from launch.plan import PlanRoot, plan_run
from launch.plan import main as plan_main
from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.model.shape import ModelShape
from longrope2.planning.hardware import GPUS, HardwareConfig, find_gpu, make_machine
from longrope2.planning.memory import Layout, Recompute
from longrope2.planning.plan import _align_words, _model_lines


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 9}))
    with pytest.raises(
        ArtifactError,
        match="holds no hidden_size, num_hidden_layers, num_attention_heads, intermediate",
    ):
        ModelShape.from_folder(tmp_path)


def test_gpus_are_found_by_the_name_cuda_gives() -> None:
    assert (
        find_gpu("NVIDIA A100-SXM4-80GB") == "A100" and find_gpu("NVIDIA H100 80GB HBM3") == "H100"
    )
    assert (
        find_gpu("NVIDIA GeForce RTX 4090") is None
        and find_gpu("NVIDIA RTX A1000 Laptop GPU") is None
    )
    assert all(gpu.gemm_tflops < gpu.peak_tflops for gpu in GPUS.values())


def test_hardware_that_cannot_be() -> None:
    broken = HardwareConfig(gpu="Z80", num_gpus=0, network_gb_per_second=0.0, usable_memory=1.5)
    with pytest.raises(ConfigError) as raised:
        make_machine(broken)
    assert raised.value.faults == (
        "hardware.gpu=Z80 is not known; use one of A100, H100, H200",
        "hardware.num_gpus=0 must be at least 1",
        "hardware.network_gb_per_second=0.0 must be above 0",
        "hardware.usable_memory=1.5 must be above 0 and at most 1",
    )


def test_command_prints_the_plan(monkeypatch, capsys) -> None:
    """The command of the documentation, to the letter."""
    monkeypatch.setattr(
        sys, "argv", ["launch.plan", "experiment=llama3_8b_128k", "hardware=a100_64"]
    )
    plan_main()
    text = capsys.readouterr().out
    for words in (
        "8.030 B parameters, 7.505 B",
        "118.1 G a token",
        "64 A100, 8 a node",
        "floor of products and attention 32.2 h",
        "configured 8 sequence x 8 data, recompute dense",
        "does not fit (one segment at a time):",
        "8 sequence x 8 data, recompute none: 97 GiB of 74; "
        "the largest part is activations with 86 GiB",
        "at most 13,440 forward passes of 131,072 tokens",
        "needles and perplexity of 7 models",
    ):
        assert words in text
    cost = text[text.index("hours of 10 B tokens") :].splitlines()
    assert cost[1].split() == ["GPUs", "131,072", "262,144", "524,288", "1,048,576"]
    assert [line.split()[0] for line in cost[2:9]] == ["8", "16", "32", "64", "128", "256", "512"]


def test_the_alignment_that_is_shown_is_one_that_packing_takes() -> None:
    """``align`` must leave chunks of a short window at least; 131,072 tokens have 16 of 8,192."""
    ranks = Layout(1, 8, Recompute.none, context=4)
    assert _align_words(ranks, 64) == "--align 32"
    shorter = "chunks for 32 processes would be shorter than the short window"
    words = f"--align 16: {shorter}, so they exchange in short segments too"
    assert _align_words(ranks, 16) == words
    assert _align_words(Layout(1, 24, Recompute.none), 16).startswith("--align 12: ")


def test_command_says_that_the_configured_layout_cannot_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "launch.plan",
            "experiment=llama3_8b_128k",
            "hardware=a100_8",
            "plan.lengths=[131072]",
            "plan.gpu_counts=[8]",
        ],
    )
    plan_main()
    text = capsys.readouterr().out
    reason = "64 processes need more than the 8 GPUs there are"
    assert f"configured 8 sequence x 8 data, recompute dense: cannot run: {reason}" in text
    assert "part           best  " in text and "configured long" not in text


def test_a_run_of_no_tokens_or_processes_is_refused() -> None:
    overrides = [
        "experiment=llama3_8b_128k",
        "target_len=4096",
        "training.global_batch_tokens=0",
        "parallel.sequence=0",
        "parallel.zero_stage=2",
    ]
    with pytest.raises(ConfigError) as raised:
        plan_run(compose(PlanRoot, "plan", overrides))
    assert raised.value.faults == (
        "target_len=4096 must be a multiple of model.original_len=8192, and not below it; "
        "use for example 8192",
        "training.global_batch_tokens=0 must be a multiple of target_len=4096",
        "parallel.sequence=0 and parallel.context=1 must both be at least 1",
        "parallel.zero_stage=2: the planner knows stage 3 only; set it to 3 to plan",
    )


def test_command_refuses_what_is_no_run(monkeypatch, capsys) -> None:
    overrides = [
        "model=tiny",
        "target_len=2048",
        "training.tokens=null",
        "training.global_batch_tokens=5000",
        "plan.long_share=2",
        "plan.short_document_tokens=0",
        "plan.gpu_counts=[]",
    ]
    monkeypatch.setattr(sys, "argv", ["launch.plan", *overrides])
    with pytest.raises(SystemExit) as ended:
        run_command(plan_main)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    for words in (
        "training.tokens=None: a plan needs a budget of at least one step",
        "training.global_batch_tokens=5000 must be a multiple of target_len=2048",
        "plan.long_share=2.0 must be from 0 to 1",
        "plan.short_document_tokens=0.0 must be from 1 to target_len",
        "plan.gpu_counts=[] must hold numbers of at least 1",
    ):
        assert words in message


def test_the_share_of_long_segments_is_that_of_the_run(tmp_path: Path) -> None:
    """Given, or that of the packed segments, or assumed: said in each case."""
    words = ["experiment=llama3_8b_128k", f"run.root={tmp_path}", "run.name=r"]

    def line(*more: str) -> str:
        plan = plan_run(compose(PlanRoot, "plan", [*words, *more]))
        return next(line for line in _model_lines(plan) if line.startswith("training"))

    folder = tmp_path / "r" / "1_segments"
    assert f"; 70 % long (assumed: {folder} holds no segments yet), short documents of" in line()
    counts = {"num_long_segments": 3, "num_short_segments": 5}
    write_manifest(folder, Manifest("segments", counts=counts))
    assert f"; 38 % long (as in {folder}), short documents of" in line()
    assert "; 20 % long (plan.long_share), short documents of" in line("plan.long_share=0.2")
    assert "; 100 % long, short documents of" in line("training.mixed=false")
