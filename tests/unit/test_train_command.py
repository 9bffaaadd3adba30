"""Bad input to ``launch.train``: one message with what to change, exit code 2, nothing written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from data_prep.pack import main as pack_main
from launch.train import _is_complete, main
from longrope2.command import run_command
from longrope2.config import compose, to_plain
from longrope2.errors import ArtifactError, ConfigError, DamagedError
from longrope2.files.artifacts import Manifest, hashes_of, write_manifest
from longrope2.files.lease import only_writer
from longrope2.model.shape import ModelShape
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.training.config import TrainRoot, ZeroConfig, check, with_room_for_largest
from longrope2.training.plan import resolve_run
from longrope2.training.run import _lease


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pack_main(
        [
            "--target",
            "256",
            "--corpus",
            "sample",
            "--model",
            "tiny",
            "run.name=packed",
            f"run.root={folder}",
            "quotas.stdlib_modules={short: 3000, long: 3000}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ]
    )
    return folder / "packed" / "1_segments"


def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *overrides: str,
) -> str:
    """The message of a refused command.

    Checks the exit code and that the run folder was not made.
    """
    runs = tmp_path / "runs"
    fixed = [
        "experiment=tiny_extend",
        "target_len=256",
        "training.global_batch_tokens=512",
        "training.tokens=2048",
    ]
    monkeypatch.setattr(
        sys, "argv", ["launch.train", *fixed, f"run.root={runs}", "run.name=bad", *overrides]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert not runs.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_unknown_key(tmp_path, monkeypatch, capsys) -> None:
    message = refused(tmp_path, monkeypatch, capsys, "training.learning_rat=1")
    assert "unknown key training.learning_rat" in message


def test_windows_that_do_not_fit(tmp_path, monkeypatch, capsys) -> None:
    message = refused(tmp_path, monkeypatch, capsys, "target_len=300")
    assert "target_len=300 must be a multiple of model.original_len=128" in message


def test_held_out_measurements_out_of_range(tmp_path, monkeypatch, capsys) -> None:
    words = ("rope=yarn", "training.heldout_every=0", "training.heldout_segments=0")
    message = refused(tmp_path, monkeypatch, capsys, *words)
    assert "training.heldout_every=0 must be above 0, or null" in message
    assert "training.heldout_segments=0 must be above 0" in message


def test_a_corpus_that_is_gone_is_missed_by_a_dry_run(
    tmp_path, monkeypatch, capsys, packed
) -> None:
    shutil.copytree(packed, tmp_path / "segments")
    config = (packed / "config.yaml").read_text()
    gone = config.replace("kind: sample", "kind: folder").replace(
        "folder: null", f"folder: {tmp_path / 'gone'}"
    )
    (tmp_path / "segments" / "config.yaml").write_text(gone)
    words = ("rope=yarn", f"segments={tmp_path / 'segments'}", "dry_run=true")
    message = refused(tmp_path, monkeypatch, capsys, *words, "training.heldout_every=5")
    assert f"held-out text is read from the corpus of {tmp_path / 'segments'}: " in message
    assert "train with training.heldout_every=null" in message


def test_the_plan_says_what_is_measured(tmp_path, monkeypatch, capsys, packed) -> None:
    words = ["experiment=tiny_extend", "target_len=256", "training.global_batch_tokens=512"]
    words += ["rope=yarn", f"segments={packed}", "dry_run=true", f"run.root={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["launch.train", *words, "training.heldout_every=5"])
    main()
    line = "held out   loss every 5 steps on up to 8 segments of each window"
    assert line in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "argv", ["launch.train", *words])
    main()
    assert "held out" not in capsys.readouterr().out


def test_activations_that_cannot_be_offloaded(tmp_path, monkeypatch, capsys) -> None:
    faults = (
        "training.recompute=none",
        "training.offload_activations=true",
        "training.hang_timeout_s=0",
    )
    message = refused(tmp_path, monkeypatch, capsys, *faults)
    assert (
        "training.offload_activations=true needs training.recompute=full or dense; with none all "
        "stays" in message
    )
    assert "training.hang_timeout_s=0.0 must be above 0, or null" in message


def test_missing_segments(tmp_path, monkeypatch, capsys) -> None:
    message = refused(tmp_path, monkeypatch, capsys, "rope=yarn")
    assert "1_segments holds no finished segments" in message


def test_missing_factors(tmp_path, monkeypatch, capsys, packed) -> None:
    message = refused(tmp_path, monkeypatch, capsys, f"segments={packed}")
    assert (
        "rope.method=searched needs a factors file, but" in message
        and "rope.factors=FILE" in message
    )


@pytest.mark.parametrize(("mixed", "rope_of_short"), [(True, None), (False, "yarn")])
def test_without_mixed_windows_the_model_has_one_rope(
    tmp_path, packed, mixed, rope_of_short
) -> None:
    """What was never trained with the original RoPE is not read with it."""
    config = compose(
        TrainRoot,
        "train",
        [
            "experiment=tiny_extend",
            "target_len=256",
            "training.global_batch_tokens=512",
            "training.tokens=2048",
            "training.same_kind_segments=1",
            "parallel=single",
            "rope=yarn",
            f"segments={packed}",
            f"run.root={tmp_path}",
            f"training.mixed={str(mixed).lower()}",
        ],
    )
    factors = resolve_run(config, 1).factors
    yarn = closed_form_factors(RopeMethod.yarn, RopeGeometry(32, 10_000.0, 128), 256)
    assert factors.factors == yarn.factors
    assert factors.short_factors == (yarn.factors if rope_of_short else None)
    assert factors.short_attention_scale == (yarn.long_attention_scale if rope_of_short else 1.0)


@pytest.mark.parametrize(
    ("geometry", "target_len", "words"),
    [
        (RopeGeometry(64, 10_000.0, 128), 256, "(rope.factors) is for RopeGeometry(rotary_dim=64"),
        (RopeGeometry(32, 10_000.0, 128), 512, "(rope.factors) is for target_len=512, not 256"),
    ],
)
def test_factors_of_another_model_or_target(
    tmp_path, monkeypatch, capsys, packed, geometry, target_len, words
) -> None:
    file = tmp_path / "factors.json"
    file.write_text(closed_form_factors(RopeMethod.pi, geometry, target_len).to_json())
    overrides = (f"segments={packed}", "rope=from_file", f"rope.factors={file}")
    assert words in refused(tmp_path, monkeypatch, capsys, *overrides)


def test_segments_of_another_model(tmp_path, monkeypatch, capsys, packed) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]  # of itself: those of earlier versions have none
    manifest["inputs"]["model"]["tokenizer_sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = refused(tmp_path, monkeypatch, capsys, f"segments={copy}", "rope=yarn")
    assert "was packed with another model's tokenizer than model.path=models/tiny" in message


def test_segments_of_another_target(tmp_path, monkeypatch, capsys, packed) -> None:
    message = refused(
        tmp_path,
        monkeypatch,
        capsys,
        f"segments={packed}",
        "rope=yarn",
        "target_len=512",
        "training.global_batch_tokens=1024",
    )
    assert "target_len is 256, this run has 512; pack again" in message


def test_target_that_the_parallelism_cannot_share(tmp_path, monkeypatch, capsys) -> None:
    message = refused(tmp_path, monkeypatch, capsys, "parallel.processes=3", "parallel.sequence=3")
    assert "target_len=256 must be a multiple of parallel.sequence=3" in message
    assert "parallel.sequence=3 cannot share 4 query and 4 key/value heads" in message


def test_too_few_segments_for_a_step(tmp_path, monkeypatch, capsys, packed) -> None:
    message = refused(
        tmp_path,
        monkeypatch,
        capsys,
        f"segments={packed}",
        "rope=yarn",
        "training.same_kind_segments=64",
        "training.global_batch_tokens=16384",
        "training.tokens=null",
    )
    assert "too few for one step of training.global_batch_tokens=16384" in message


@pytest.mark.parametrize("processes", [0, -1])
def test_no_processes(tmp_path, monkeypatch, capsys, processes: int) -> None:
    message = refused(
        tmp_path,
        monkeypatch,
        capsys,
        f"parallel.processes={processes}",
        "parallel.sequence=1",
        "parallel.timeout_seconds=0",
        "parallel.replicate_below=-1",
    )
    assert "5 fault(s)" in message  # segments and factors are missing too
    assert f"parallel.processes={processes} must be above 0" in message
    assert "parallel.timeout_seconds=0 must be above 0" in message
    assert "parallel.replicate_below=-1 must not be negative" in message


def test_key_value_heads_that_are_null_are_the_query_heads(tmp_path) -> None:
    """As in configs of Phi-2 and older Llamas."""
    model = json.loads((Path("models/tiny") / "config.json").read_text()) | {
        "num_key_value_heads": None
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = compose(
        TrainRoot,
        "train",
        ["experiment=tiny_extend", "parallel.sequence=3", "parallel.processes=3"],
    )
    with pytest.raises(ConfigError, match="cannot share 4 query and 4 key/value heads"):
        check(config, tmp_path, 3)


def test_a_complete_run_in_another_final_format_is_not_passed_over(tmp_path) -> None:
    config = compose(TrainRoot, "train", ["experiment=tiny_extend"])
    assert not _is_complete(tmp_path, config)
    write_manifest(tmp_path, Manifest("checkpoints", config=to_plain(config)))
    final = tmp_path / "final"
    final.mkdir()
    for name in ("config.json", "factors.json", "tokenizer.json", "model.safetensors"):
        (final / name).write_text("{}")
    write_manifest(final, Manifest("checkpoint", files=hashes_of(final)))
    assert _is_complete(tmp_path, config)
    (final / "factors.json").write_text("{ }")
    words = r"factors.json is not as it was written .* launch.train writes final/ again from"
    with pytest.raises(DamagedError, match=words):
        _is_complete(tmp_path, config)
    config = compose(TrainRoot, "train", ["experiment=tiny_extend", "training.final_dtype=fp32"])
    with pytest.raises(
        ConfigError,
        match="training.final_dtype=fp32, but .*final is complete and was written with auto",
    ):
        _is_complete(tmp_path, config)


def test_faults_of_zero_beside_others(tmp_path, monkeypatch, capsys) -> None:
    message = refused(
        tmp_path,
        monkeypatch,
        capsys,
        "zero.hpz_size=2",
        "parallel=single",
        "training.max_skipped_steps=0",
    )
    assert "4 fault(s)" in message  # segments and factors are missing too
    assert "zero.hpz_size=2 does not divide 1 processes; use one of [1]" in message
    assert "training.max_skipped_steps=0 must be above 0" in message


def test_a_kernel_that_cannot_run_here(tmp_path, monkeypatch, capsys, packed) -> None:
    message = refused(
        tmp_path,
        monkeypatch,
        capsys,
        f"segments={packed}",
        "rope=yarn",
        "attention.kernel=torch_varlen",
    )
    assert (
        "attention.kernel=torch_varlen cannot run here: it needs a CUDA device, this is cpu; use "
        "auto or sdpa" in message
    )


def test_a_dry_run_names_what_training_refuses(tmp_path, monkeypatch, capsys, packed) -> None:
    asked = ["training.optimizer=deepspeed_fused_adam", "training.norm=liger"]
    given = [f"segments={packed}", "rope=yarn", *asked]
    refusal = refused(tmp_path, monkeypatch, capsys, *given)
    sys.argv.append("dry_run=true")
    main()
    printed = capsys.readouterr().out.split("asked for, and not to be had on this machine:")[1]
    for text in asked:
        assert f"{text} cannot run here: " in refusal and f"{text} cannot run here: " in printed


def test_weights_are_missed_before_a_process_is_started(
    tmp_path, monkeypatch, capsys, packed
) -> None:
    model = tmp_path / "model"
    shutil.copytree("models/tiny", model, ignore=shutil.ignore_patterns("*.safetensors"))
    given = [f"segments={packed}", "rope=yarn", f"model.path={model}"]
    missing = f"{model} holds no *.safetensors weights"
    assert missing in refused(tmp_path, monkeypatch, capsys, *given)
    sys.argv.append("dry_run=true")
    main()
    assert f"  weights  {missing}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        ("sdpa", "attention  sdpa, forced\n"),
        (
            "auto",
            "attention  sdpa (auto; no flash_attn: it needs a CUDA device, this is cpu; no "
            "torch_varlen: it needs",
        ),
        (
            "flash_attn",
            "attention  flash_attn, forced; it cannot run on this machine: it needs a CUDA device",
        ),
    ],
)
def test_the_plan_states_the_kernel(tmp_path, monkeypatch, capsys, packed, kernel, line) -> None:
    """A plan made on a machine without GPUs may ask for a kernel of the machines with them."""
    fixed = [
        "experiment=tiny_extend",
        "target_len=256",
        "training.global_batch_tokens=512",
        "training.tokens=2048",
    ]
    run = [
        f"run.root={tmp_path}",
        "run.name=plan",
        f"segments={packed}",
        "rope=yarn",
        "dry_run=true",
    ]
    monkeypatch.setattr(sys, "argv", ["launch.train", *fixed, *run, f"attention.kernel={kernel}"])
    main()
    assert line in capsys.readouterr().out
    assert not (tmp_path / "plan").exists()


def test_under_torchrun_only_a_written_configuration_is_taken(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "under torchrun, give --config" in refused(tmp_path, monkeypatch, capsys)


def test_config_flag_takes_no_overrides(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.train", "--config", "a.yaml", "training.tokens=1"])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert "--config takes one path and no overrides" in capsys.readouterr().err


def test_segments_cut_short_since_they_were_packed(tmp_path, monkeypatch, capsys, packed) -> None:
    copy = tmp_path / "1_segments"
    shutil.copytree(packed, copy)
    shard = sorted(copy.glob("*.arrow"))[0]
    shard.write_bytes(shard.read_bytes()[:-64])
    message = refused(tmp_path, monkeypatch, capsys, "rope=yarn", f"segments={copy}")
    assert shard.name in message and "pack again" in message


def test_a_run_that_is_being_trained(packed, tmp_path, monkeypatch, capsys) -> None:
    """The command says so before it writes, and so does every rank."""
    fixed = [f"run.root={tmp_path}", "run.name=busy", f"segments={packed}", "rope=yarn"]
    fixed += ["experiment=tiny_extend", "target_len=256", "model.from_scratch=true"]
    fixed += ["training.global_batch_tokens=512", "training.tokens=2048", "parallel=single"]
    monkeypatch.setattr(sys, "argv", ["launch.train", *fixed])
    product = tmp_path / "busy" / "3_checkpoints"
    with only_writer(tmp_path / "busy", product.name):
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == 2
        assert f"{product} is being written by" in capsys.readouterr().err
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            run: Any = SimpleNamespace(config=compose(TrainRoot, "train", fixed), folder=product)
            rank: Any = SimpleNamespace(is_main=True)
            with pytest.raises(ArtifactError, match="is being written by"), _lease(run, rank):
                pass
        finally:
            dist.destroy_process_group()
    assert not product.exists()


def test_a_reduce_bucket_that_is_too_small_is_raised_and_said(packed, tmp_path) -> None:
    """LLaMA3-8B's embedding has 525,336,576 elements, DeepSpeed's bucket 500,000,000."""
    settings = ["experiment=tiny_extend", "target_len=256", "model.from_scratch=true", "rope=yarn"]
    settings += [f"segments={packed}", f"run.root={tmp_path}", "training.global_batch_tokens=512"]
    settings += ["training.tokens=2048", "zero.reduce_bucket_elements=1000"]
    run = resolve_run(compose(TrainRoot, "train", settings), 2)
    shape = ModelShape.from_folder(run.model_folder)
    largest = max(shape.vocabulary, shape.mlp) * shape.hidden
    assert run.config.zero.reduce_bucket_elements == largest
    words = "zero.reduce_bucket_elements=1000 is less than the model's largest matrix has: raised"
    assert f"note: {words} to {largest}" in run.describe().splitlines()
    given = compose(TrainRoot, "train", [*settings[:-1], f"zero.reduce_bucket_elements={largest}"])
    assert "reduce_bucket" not in resolve_run(given, 2).describe()
    llama = replace(shape, vocabulary=128_256, hidden=4096, mlp=14_336)
    assert with_room_for_largest(ZeroConfig(), llama).reduce_bucket_elements == 525_336_576
