"""Every command of the README runs, in its order, as written (only the folder of the runs is another one)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parent.parent.parent
PYTHON_COMMAND = re.compile(r"`(python -m [^`]+)`")
MAKE_TARGET = re.compile(r"make ([a-z-]+)")


def commands() -> list[str]:
    return PYTHON_COMMAND.findall((ROOT / "README.md").read_text())


def test_the_stage_table_runs(tmp_path: Path) -> None:
    found = commands()
    assert len(found) == 7
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def add(a, b):\n    return")
    for command in found:
        arguments = shlex.split(command.replace("prompt.txt", str(prompt)).replace("runs/", f"{tmp_path}/"))
        if "launch.report" not in arguments:
            arguments.append(f"run.root={tmp_path}")
        ended = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, command + ended.stdout[-2000:] + ended.stderr[-3000:]
    assert (tmp_path / "tiny_2048" / "report.html").is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(MAKE_TARGET.findall((ROOT / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
