"""Every command of the README is one the demo runs (tests/pipeline/test_demo.py runs the demo), or a make target."""

import re
from pathlib import Path

from launch.demo import stages

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_COMMAND = re.compile(r"`(python -m [^`]+)`")
MAKE_TARGET = re.compile(r"`make ([a-z-]+)|^make ([a-z-]+)$", re.MULTILINE)


def test_the_commands_are_the_demos() -> None:
    found = PYTHON_COMMAND.findall(README)
    assert found == [stage.command for stage in stages(Path("runs"), with_baseline=False)]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {first or second for first, second in MAKE_TARGET.findall(README)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
