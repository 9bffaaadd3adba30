"""``README.txt`` of a run folder names what is there."""

from pathlib import Path

from longrope2.files.artifacts import PRODUCT_FOLDERS, UNTRAINED_FOLDER
from longrope2.files.guide import GUIDE_FILE, write_guide
from longrope2.report.page import REPORT_FILE
from longrope2.tracking.metrics import METRICS_FILE


def test_it_names_every_product_and_is_written_once(tmp_path: Path) -> None:
    write_guide(tmp_path / "run")
    path = tmp_path / "run" / GUIDE_FILE
    text = path.read_text(encoding="utf-8")
    for name in PRODUCT_FOLDERS.values():
        assert f"\n{name}/ " in text
    for name in (REPORT_FILE, METRICS_FILE, f"{UNTRAINED_FOLDER}/", "wandb/offline-run-*"):
        assert name in text
    written = path.stat().st_mtime_ns
    write_guide(tmp_path / "run")
    assert path.stat().st_mtime_ns == written
    path.write_text("of an earlier version")
    write_guide(tmp_path / "run")
    assert path.read_text(encoding="utf-8") == text
