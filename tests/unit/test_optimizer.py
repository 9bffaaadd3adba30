"""Parameter groups by name, the choice of AdamW, and DeepSpeed's dictionary field by field."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.parallel.dims import ParallelConfig
from longrope2.training.config import (
    OptimizerKind,
    Precision,
    TrainingConfig,
    TrainRoot,
    ZeroConfig,
    zero_faults,
)
from longrope2.training.engine import deepspeed_settings
from longrope2.training.machine import machine_setup
from longrope2.training.optimizer import make_optimizer, optimizer_fault, parameter_groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MATRICES = {f"self_attn.{part}_proj.weight" for part in "qkvo"} | {
    f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
}
BIASES = {f"self_attn.{part}_proj.bias" for part in "qkvo"}


def llama(tied: bool) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            attention_bias=True,
        )
    )


def names_by_decay(model: nn.Module, training: TrainingConfig) -> dict[float, set[str]]:
    names = {id(p): name.removeprefix("model.layers.0.") for name, p in model.named_parameters()}
    return {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, training)
    }


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_alone_decay(tied: bool) -> None:
    found = names_by_decay(llama(tied), TrainingConfig(weight_decay=0.1))
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"}
    assert found[0.1] == MATRICES | (set() if tied else {"lm_head.weight"})
    assert found[0.0] == norms | BIASES | {"model.embed_tokens.weight"}


def test_everything_decays_by_option() -> None:
    model = llama(tied=False)
    found = names_by_decay(model, TrainingConfig(weight_decay=0.1, decay_norms_and_embeddings=True))
    assert list(found) == [0.1] and len(found[0.1]) == len(list(model.parameters()))


def test_torch_adamw_is_built_from_the_fields() -> None:
    training = TrainingConfig(learning_rate=3e-4, beta1=0.8, beta2=0.99)
    optimizer = make_optimizer(llama(tied=True), training)
    assert type(optimizer) is torch.optim.AdamW
    assert {(g["lr"], g["betas"], g["fused"]) for g in optimizer.param_groups} == {
        (3e-4, (0.8, 0.99), None)
    }
    assert all(
        g["fused"] for g in make_optimizer(llama(tied=True), training, fused=True).param_groups
    )


def fake_apex(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    for file in ("__init__.py", *files):
        (folder / "apex" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "apex" / file).write_text("raise AssertionError('looking must not import')\n")
    monkeypatch.syspath_prepend(str(folder))


def test_apex_is_absent() -> None:
    assert optimizer_fault(OptimizerKind.apex_fused_adam, CUDA) == (
        "training.optimizer=apex_fused_adam cannot run here: NVIDIA apex is not installed; build "
        "NVIDIA's from "
        "github.com/NVIDIA/apex, or use torch_adamw"
    )


def test_the_web_toolkit_called_apex_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apex(tmp_path, monkeypatch, "lib/libapex.py")
    fault = optimizer_fault(OptimizerKind.apex_fused_adam, CUDA)
    assert fault is not None
    assert (
        f"the package apex found at {tmp_path}/apex/__init__.py (version unknown) is not NVIDIA's"
        in fault
    )
    assert (
        "is a web toolkit of 2013; build NVIDIA's from github.com/NVIDIA/apex, or use torch_adamw"
        in fault
    )


def test_apex_of_nvidia_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apex(tmp_path, monkeypatch, "optimizers/__init__.py", "optimizers/fused_adam.py")
    assert optimizer_fault(OptimizerKind.apex_fused_adam, CUDA) is None
    fault = optimizer_fault(OptimizerKind.apex_fused_adam, CPU)
    assert fault is not None and fault.endswith(
        "it needs a CUDA device, this is cpu; use torch_adamw"
    )


def test_deepspeed_fused_adam_needs_a_gpu() -> None:
    assert optimizer_fault(OptimizerKind.deepspeed_fused_adam, CUDA) is None
    assert optimizer_fault(OptimizerKind.deepspeed_fused_adam, CPU) == (
        "training.optimizer=deepspeed_fused_adam cannot run here: it needs a CUDA device, this "
        "is cpu; use torch_adamw"
    )
    assert optimizer_fault(OptimizerKind.torch_adamw, CPU) is None


def test_the_machine_is_told_all_its_faults_together() -> None:
    config = TrainRoot()
    config.training.optimizer = OptimizerKind.deepspeed_fused_adam
    config.attention.kernel = type(config.attention.kernel).flash_attn
    faults = machine_setup(config, CPU, run=True).faults
    assert [fault.split(" ")[0] for fault in faults] == [
        "attention.kernel=flash_attn",
        "training.optimizer=deepspeed_fused_adam",
    ]


def settings(zero: ZeroConfig, stage: int = 3, bf16: bool = True) -> dict:
    parallel = ParallelConfig(zero_stage=stage, replicate_below=7)
    return deepspeed_settings(
        TrainingConfig(gradient_clip=0.5), parallel, zero, micro_steps=4, bf16=bf16
    )


def test_dictionary_without_zero_fields() -> None:
    found = settings(ZeroConfig(), stage=0, bf16=False)
    assert found["zero_optimization"] == {"stage": 0, "reduce_scatter": True}
    assert (found["gradient_accumulation_steps"], found["bf16"], found["gradient_clipping"]) == (
        4,
        {"enabled": False},
        0.0,
    )
    assert settings(ZeroConfig(), stage=0)["gradient_clipping"] == 0.5
    assert settings(ZeroConfig(), stage=1, bf16=False)["gradient_clipping"] == 0.5
    assert "communication_data_type" not in found


@pytest.mark.parametrize(
    ("field", "value", "stages", "key", "expected"),
    [
        ("hpz_size", 8, {3}, "zero_hpz_partition_size", 8),
        ("reduce_bucket_elements", 11, {1, 2, 3}, "reduce_bucket_size", 11),
        ("gather_bucket_elements", 12, {1, 2}, "allgather_bucket_size", 12),
        ("prefetch_elements", 13, {3}, "stage3_prefetch_bucket_size", 13),
        ("max_live_elements", 14, {3}, "stage3_max_live_parameters", 14),
        ("overlap_communication", False, {1, 2, 3}, "overlap_comm", False),
        (
            "offload_optimizer",
            True,
            {1, 2, 3},
            "offload_optimizer",
            {"device": "cpu", "pin_memory": True},
        ),
    ],
)
def test_every_field_reaches_its_key(
    field: str, value: object, stages: set[int], key: str, expected: object
) -> None:
    for stage in range(4):
        section = settings(replace(ZeroConfig(), **{field: value}), stage)["zero_optimization"]
        assert section.get(key, "absent") == (expected if stage in stages else "absent")
    unset = settings(ZeroConfig(), 3)["zero_optimization"]
    assert unset.get(key) != expected


def test_communication_types() -> None:
    bf16 = Precision.bf16
    assert settings(ZeroConfig(gradient_dtype=bf16))["communication_data_type"] == "bf16"
    assert settings(ZeroConfig())["seq_parallel_communication_data_type"] == "fp32"
    assert (
        settings(ZeroConfig(sequence_gradient_dtype=bf16))["seq_parallel_communication_data_type"]
        == "bf16"
    )


def test_the_format_of_the_forward_pass_under_sequence_parallelism() -> None:
    """DeepSpeed reads this key itself and takes names of formats only."""
    from deepspeed.runtime.config import get_communication_data_type

    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        found = settings(ZeroConfig(sequence_gradient_dtype=Precision.auto), bf16=bf16)
        assert (
            get_communication_data_type(found, "seq_parallel_communication_data_type", "fp32")
            is expected
        )


def test_bf16_gradients_are_accumulated_in_float32_where_deepspeed_can() -> None:
    for stage, expected in (
        (0, None),
        (1, None),
        (2, {"grad_accum_dtype": "fp32"}),
        (3, {"grad_accum_dtype": "fp32"}),
    ):
        assert settings(ZeroConfig(), stage).get("data_types") == expected
        assert "data_types" not in settings(ZeroConfig(), stage, bf16=False)


def test_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        section = settings(ZeroConfig(), stage)["zero_optimization"] | {
            "stage3_param_persistence_threshold": 100_000
        }
        section = {k: v for k, v in section.items() if stage == 3 or not k.startswith("stage3")}
        ours, theirs = DeepSpeedZeroConfig(**section), DeepSpeedZeroConfig(stage=stage)
        assert ours.model_dump() == theirs.model_dump()


def test_faults_of_zero_are_reported_together() -> None:
    zero = ZeroConfig(
        hpz_size=3, reduce_bucket_elements=0, prefetch_elements=-1, offload_optimizer=True
    )
    assert zero_faults(zero, stage=0, world_size=4, optimizer="apex_fused_adam") == [
        "zero.reduce_bucket_elements=0 must be above 0",
        "zero.prefetch_elements=-1 must not be negative",
        "zero.hpz_size=3 needs parallel.zero_stage=3, this run has 0; use 1",
        "zero.hpz_size=3 does not divide 4 processes; use one of [1, 2, 4]",
        "zero.offload_optimizer=true needs parallel.zero_stage=1, 2 or 3, this run has 0",
        "zero.offload_optimizer=true updates on the CPU, where "
        "training.optimizer=apex_fused_adam cannot run; "
        "use training.optimizer=torch_adamw",
    ]
    assert zero_faults(ZeroConfig(hpz_size=2), stage=3, world_size=4, optimizer="torch_adamw") == []
