"""``launch.doctor`` without a word: every finding, its state and its remedy."""

import io
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from launch.doctor import machine
from launch.doctor.__main__ import main
from launch.doctor.machine import NEEDED, Finding, State, find_all, print_findings
from launch.doctor.rope import DoctorRoot
from longrope2.command import run_command
from longrope2.config import ModelConfig, RunConfig, compose

ROOT = Path(__file__).parent.parent.parent


def findings_of(tmp_path: Path, model: Path | str) -> dict:
    config = DoctorRoot(
        run=RunConfig(name="x", root=str(tmp_path / "runs")),
        model=ModelConfig(name="m", path=str(model), original_len=128),
        target_len=256,
    )
    return {finding.what: finding for finding in find_all(config)}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def test_this_machine_is_ready_for_the_miniature(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.doctor", "model=tiny"])
    main()  # no SystemExit: no blocker
    text = capsys.readouterr().out
    assert "ready: nothing stops a run" in text and torch.__version__ in text
    assert "attention sdpa" in text and "tokenizer.json" in text


def test_needed_versions_are_those_of_the_project_file(tmp_path: Path, monkeypatch) -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, lowest in NEEDED.items():
        assert f"{name}>={lowest}" in listed
    monkeypatch.setattr(
        machine, "installed_version", {"torch": "2.9.1+cu128", "transformers": "5.10.0"}.get
    )
    found = findings_of(tmp_path, ROOT / "models" / "tiny")
    assert found["torch"].state is State.blocker
    assert found["torch"].remedy == "pip install -c constraints.txt 'torch>=2.11'"
    assert found["transformers"].state is State.ok
    assert (found["deepspeed"].state, found["deepspeed"].found) == (State.blocker, "missing")
    assert (found["lm-eval"].state, found["lm-eval"].found) == (
        State.fix,
        "not installed (optional)",
    )


def test_another_package_called_apex(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    found = findings_of(tmp_path, ROOT / "models" / "tiny")["apex"]
    assert (found.state, found.remedy) == (State.fix, "pip uninstall apex; nothing here needs it")
    (package / "optimizers").mkdir()
    (package / "optimizers" / "fused_adam.py").write_text("")
    assert findings_of(tmp_path, ROOT / "models" / "tiny")["apex"].found == "NVIDIA's"


def test_optional_packages_name_the_extra_that_holds_them() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package, remedy in machine.OPTIONAL.items():
        (extra,) = re.findall(r"pip install '\.\[(.+)\]'", remedy)
        assert any(requirement.startswith(f"{package}>=") for requirement in extras[extra])


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = machine._gpus(torch.device("cpu"))
    assert (
        finding.found
        == "none seen by torch, built without CUDA: float32 on the CPU, for miniatures"
    )
    assert finding.remedy == "8B models need GPUs: launch.plan says how many"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = machine._gpus(torch.device("cpu"))
    assert "built for CUDA 13.0" in finding.found and finding.state is State.fix
    remedy = "nvidia-smi is there: install the torch built for the CUDA version it prints"
    assert finding.remedy == f"{remedy}, or one below"


def test_a_gpu_that_others_use(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: ((40, 79)[index] * 2**30, 80 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100-SXM4-80GB")
    busy, free = machine._gpus(torch.device("cuda"))
    assert (busy.state, busy.found) == (State.fix, "NVIDIA A100-SXM4-80GB: 40.0 of 80.0 GiB free")
    assert "nvidia-smi names them" in busy.remedy and free.state is State.ok


def test_model_and_disk_that_are_not_there(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    found = findings_of(tmp_path, tmp_path / "empty")
    assert (
        found["model m"].state is State.blocker and "no *.safetensors in" in found["model m"].found
    )
    assert (
        found["tokenizer m"].remedy
        == "put tokenizer.json or tokenizer.model of the model beside its config.json"
    )
    assert found["hub login"].state is State.ok and found["W&B login"].state is State.fix
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8))
    assert findings_of(tmp_path, tmp_path / "empty")["disk"].state is State.blocker
    (tmp_path / "file").touch()
    closed = machine._disk(tmp_path / "file" / "runs")
    assert (closed.state, closed.found) == (
        State.blocker,
        f"{tmp_path / 'file'} cannot be written to",
    )
    assert closed.remedy == "set run.root to a folder of yours"
    monkeypatch.setattr("huggingface_hub.snapshot_download", _nothing_cached)
    found = findings_of(tmp_path, "someone/model")
    assert found["model m"].found == "someone/model is not on this machine"
    assert found["model m"].remedy == "model.path=FOLDER, or fetch it: hf download someone/model"
    assert "accept the licence of someone/model" in found["hub login"].remedy


def test_a_model_whose_files_are_not_all_there(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    found = findings_of(tmp_path, tmp_path)["model m"]
    assert (found.state, found.found) == (
        State.blocker,
        f"config.json, two.safetensors missing in {tmp_path}",
    )


def test_one_line_where_a_look_itself_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    found = findings_of(tmp_path, "gguf://no_such_package/x.gguf")
    assert found["model m"].state is found["W&B login"].state is State.blocker
    assert "the package no_such_package is not installed" in found["model m"].remedy
    assert found["W&B login"].found.startswith(
        "WANDB_MODE=dryrun in the environment must be one of"
    )


def _nothing_cached(*_, **__):
    raise OSError("offline")


def test_a_blocker_is_the_exit_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.doctor", f"model.path={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out = io.StringIO()
    config = compose(DoctorRoot, "doctor", [f"model.path={tmp_path}"])
    print_findings(find_all(config), Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert lines[-1] == "2 blocker(s)" and sum(line.startswith("blocker") for line in lines) == 2


def test_a_line_a_finding_in_a_pipe_a_table_on_a_terminal() -> None:
    remedy = "a remedy with [brackets] that is far longer than any column of 80 would ever hold"
    findings = [
        Finding("torch", "2.13.0"),
        Finding("some package", "missing", State.blocker, remedy),
    ]
    pipe, terminal = io.StringIO(), io.StringIO()
    print_findings(findings, Console(file=pipe))
    assert pipe.getvalue().splitlines() == [
        "ok       torch         2.13.0",
        f"blocker  some package  missing -> {remedy}",
        "1 blocker(s)",
    ]
    print_findings(findings, Console(file=terminal, width=80, force_terminal=True))
    assert "what to do" in terminal.getvalue() and remedy not in terminal.getvalue()


def custom(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[int, str, str]:
    """Exit code, output and error of the doctor asked of a model of the user's own."""
    words = ["model=custom", f"model.path={folder}", "model.original_len=128"]
    monkeypatch.setattr(sys, "argv", ["launch.doctor", *words])
    code = 0
    try:
        run_command(main)
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_answer_about_a_custom_model_fits_a_screen(monkeypatch, capsys) -> None:
    code, out, err = custom(ROOT / "models" / "tiny", monkeypatch, capsys)
    rows = [-(-len(line) // 80) for line in out.splitlines()]  # wrapped by a narrow terminal
    assert (code, err) == (0, "") and sum(rows) <= 40
    assert "supported            yes: llama" in out and "parity" in out and "deepspeed" not in out


def test_what_stops_a_run_is_said_of_a_custom_model_too(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8))
    code, out, _ = custom(ROOT / "models" / "tiny", monkeypatch, capsys)
    assert code == 1 and "blocker  disk" in out and out.endswith("1 blocker(s)\n")


def _lose_the_sizes(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _break_the_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _wrap(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"text_config": {"vocab_size": 3}}
    (folder / "config.json").write_text(json.dumps(config))


def _add_dropout(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))


def _leave_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_lose_the_sizes, "holds no hidden_size"),
        (_break_the_json, "cannot be read as a Hugging Face config: not JSON"),
        (_wrap, "text_config: llama wraps a language model into others; give model.path of"),
        (_add_dropout, "attention_dropout=0.1: training draws no dropout"),
        (_leave_a_pointer, "is a Git LFS pointer, not the weights"),
    ],
)
def test_a_custom_model_that_is_refused(
    change: Any, text: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "models" / "tiny", folder)
    change(folder)
    code, out, err = custom(folder, monkeypatch, capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and text in err and str(folder) in err


def test_damaged_weights_of_another_preset(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "models" / "tiny", folder)
    assert findings_of(tmp_path, folder)["model m"].state is State.ok
    _leave_a_pointer(folder)
    found = findings_of(tmp_path, folder)["model m"]
    assert found.state is State.blocker and found.refused
    assert "is a Git LFS pointer" in found.found and "fetch the model again" in found.remedy
