"""The wheel, in an environment of its own: commands run from an empty folder, with what it carries.

Heavy dependencies come from the environment of the tests, by a path file; nothing is downloaded.
"""

import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("conf", "data_prep", "launch", "longrope2", "models")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def call(*command: object, cwd: Path) -> str:
    """Standard output of a command that must end well."""
    ended = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which the wheel was installed."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source, ".", cwd=source)
    (wheel,) = source.glob("longrope2-*.whl")
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    target = [*pip, "--python", python]
    call(*target, "install", "--no-deps", "--no-index", wheel, cwd=source)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "heavy.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("launch.doctor rope model=tiny target_len=2048", "figure: runs/tiny_2048/rope.svg"),
        ("launch.plan experiment=llama3_8b_128k", "llama3_8b"),
        ("launch.train experiment=llama3_8b_128k dry_run=true", "planned from"),
        ("launch.search --help search", "search.population=64"),
        ("data_prep.pack --target 2048 --corpus sample --model tiny run.root=r", "segments"),
        ("data_prep.verify r/tiny_2048/1_segments", "every token accounted for"),
    ],
)  # fmt: skip
def test_commands_from_an_empty_folder(
    python: Path, command: str, words: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    assert words in call(python, "-m", *command.split(), cwd=folder)


@pytest.mark.slow
def test_a_preset_that_is_nowhere_is_looked_for_in_both_places(
    python: Path, tmp_path: Path
) -> None:
    command = "launch.doctor rope model=tiny model.path=models/huge target_len=2048"
    ended = subprocess.run(
        [python, "-m", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 2
    assert f"looked for in {tmp_path} and {python.parent.parent}/lib" in ended.stderr
