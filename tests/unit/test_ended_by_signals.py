"""A command that a signal ends leaves through its ``finally`` clauses, an export above all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longrope2.command import cleaning_up_when_ended
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.model.loading import rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_runs_what_stands_in_finally(number, code, capsys) -> None:
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(SystemExit) as ended, cleaning_up_when_ended():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # a second one while cleaning up
            cleaned.append(True)
    assert ended.value.code == code and cleaned == [True]
    assert capsys.readouterr().err == f"ended by {number.name}; run the same command again\n"
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cleaning_up_when_ended():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminated_export_leaves_no_temporary_files(tmp_path: Path) -> None:
    """Ended while its folder is verified; what a killed one left of another variant goes too."""
    checkpoint, exports = tmp_path / "checkpoint", tmp_path / "r" / "5_exports"
    checkpoint.mkdir()
    model = ROOT / "models" / "tiny"
    for file in model.iterdir():
        (checkpoint / file.name).symlink_to(file)
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(model, 128), 2048)
    (checkpoint / "factors.json").write_text(factors.to_json())
    write_manifest(checkpoint, Manifest("checkpoint"))
    left = exports / ".hugging_face_short_only.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    command = [
        sys.executable, "-m", "launch.export", "model=tiny", "target_len=2048", "run.name=r",
        f"run.root={tmp_path}", f"export.checkpoint={checkpoint}", "export.cost_windows=0",
        "export.variants=[dual,long_only]",
    ]  # fmt: skip
    ran = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    written = exports / ".hugging_face.tmp" / "model.safetensors"
    while not written.is_file():
        assert ran.poll() is None, ran.communicate()
        time.sleep(0.01)
    assert not left.exists()
    ran.send_signal(signal.SIGTERM)
    out, err = ran.communicate()
    assert ran.returncode == 143, (out, err)
    assert err.decode().endswith("ended by SIGTERM; run the same command again\n")
    assert b"writing    hugging_face, fp32" in out
    assert [path.name for path in exports.iterdir()] == ["config.yaml"]
