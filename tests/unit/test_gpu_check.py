"""``make gpu-check``: refused without a GPU; its commands compose; its file holds all findings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_shown_commands import ROOTS, compose_command

from benchmarks.gpu import check
from benchmarks.gpu.check import Part, assemble, commands, run_parts
from longrope2.command import run_command

ROOT = Path(__file__).parent.parent.parent
DEVICE = {"name": "A GPU", "memory_gib": 80.0}
REPORT = """<testsuites><testsuite>
<testcase name="one"/><testcase name="two"/>
<testcase name="bad"><failure message="x">y</failure></testcase>
<testcase name="absent"><skipped message="flash_attn: not installed"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["check", "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        run_command(check.main)
    assert ended.value.code == 2 and not file.exists()
    said = capsys.readouterr().err
    assert said.startswith(f"error: torch {torch.__version__} (")
    assert "sees no GPU, and a GPU is what this checks; on a CPU: make test" in said


def test_make_knows_it() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "\ngpu-check: setup\n\t$(BIN)/python -m benchmarks.gpu.check\n" in text


@pytest.mark.parametrize("name", ["pack", "train", "cpu train", "search", "evaluate", "export"])
def test_its_commands_compose(tmp_path: Path, name: str) -> None:
    module, *words = commands(tmp_path)[name]
    assert module in ROOTS and compose_command(module, words) is not None


def test_both_trainings_are_the_same_but_for_device_and_format(tmp_path: Path) -> None:
    gpu, cpu = (commands(tmp_path)[name] for name in ("train", "cpu train"))
    differ = [(a, b) for a, b in zip(gpu, cpu, strict=True) if a != b]
    formats = ("training.precision=bf16", "training.precision=fp32")
    assert differ == [formats, ("run.name=gpu", "run.name=cpu")]


def write_losses(folder: Path, name: str, losses: list[float]) -> None:
    product = folder / name / "3_checkpoints"
    product.mkdir(parents=True)
    lines = [json.dumps({"step": n, "train/loss": x}) for n, x in enumerate(losses, 1)]
    (product / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_STEPS", 2)
    write_losses(tmp_path, "gpu", [4.0, 3.03])
    write_losses(tmp_path, "cpu", [4.0, 3.00])
    (tmp_path / "slice.json").write_text('{"layers": 20}')
    found = assemble(tmp_path, [Part("pack", "python -m data_prep.pack", 0, 1.5, [])], DEVICE)
    assert found["faults"] == [] and found["slice"] == {"layers": 20}
    assert found["largest_loss_difference"] == pytest.approx(0.01)
    assert found["losses"][1] == {"step": 2, "gpu": 3.03, "cpu": 3.00}
    assert (found["device"], found["versions"]["torch"]) == (DEVICE, torch.__version__)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    assert found["commit"].removesuffix("+dirty") == head
    assert json.loads(json.dumps(found)) == found


def test_every_fault_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_STEPS", 3)
    write_losses(tmp_path, "gpu", [4.0, 3.3])
    write_losses(tmp_path, "cpu", [4.0, 3.0, 2.0])
    (tmp_path / "tests.xml").write_text(REPORT)
    found = assemble(tmp_path, [Part("kernels", "python -m pytest", 1, 1.5, ["last"])], DEVICE)
    assert found["faults"] == [
        "kernels ended with 1",
        "2 of 3 steps have a loss on both devices",
        "losses differ by 10.00%, allowed is 2%",
    ]
    reasons = ["flash_attn: not installed"]
    assert found["tests"] == {"passed": 2, "failed": ["bad"], "skipped": 1, "reasons": reasons}
    assert found["slice"] is None


def test_a_loss_that_is_no_number_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_STEPS", 1)
    write_losses(tmp_path, "gpu", [4.0, float("nan"), 3.0])
    write_losses(tmp_path, "cpu", [4.0, 3.5, 3.0])
    assert assemble(tmp_path, [], DEVICE)["faults"] == ["losses differ by inf%, allowed is 2%"]


def test_a_part_that_fails_leaves_its_last_lines_and_the_others_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    wanted = {"bad": ["json.tool", "absent.json"], "cpu good": ["this"]}
    bad, good = run_parts(wanted)
    assert bad.exit_code != 0 and "absent.json" in bad.last_lines[-1]
    assert (good.exit_code, good.last_lines, good.command) == (0, [], "python -m this")
    assert "Beautiful is better than ugly." in capfd.readouterr().out
