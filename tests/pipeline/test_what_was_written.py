"""One byte, a half, all of a file or the file itself: the next command says so by name.

The table is printed with ``-s``. ``refused``: one message that names the file. ``mended``: made
again, as it was. ``passed over``: the one before is taken, and that is said. ``harmless``: what
came out is the same; ``USED`` is what changed it, which only a case with a reason may do.
"""

from collections.abc import Iterator
from pathlib import Path

import damage_run
import pytest
from damage_run import CASES, Case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NAMED = ("refused", "mended", "passed over")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGROPE2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield damage_run.make_run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.file} -> {c.reader.__name__}")
def test_a_damaged_file_is_named_before_it_is_used(case: Case, run: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    damage_run.copy_run(run, root)
    whole = damage_run.in_child(lambda: case.reader(root))
    assert whole["ended"] == "done", whole["text"]
    verdicts = {}
    for how in case.hows:
        damage_run.damage(damage_run.copy_run(run, root) / case.file, how)
        ended = damage_run.in_child(lambda: case.reader(root))
        verdicts[how] = damage_run.verdict(case, how, ended, whole["value"])
        said = " ".join(ended["text"].split())[-200:]
        print(f"{case.file:62} {case.reader.__name__:20} {how:7} {verdicts[how]}: {said}")
    faults = [found for found in verdicts.values() if found not in allowed(case)]
    assert not faults, verdicts


def allowed(case: Case) -> tuple[str, ...]:
    """Verdicts that a case may have: a message by name, or harmless for a reason."""
    return NAMED + (("harmless", "USED") if case.why_not_named else ())
