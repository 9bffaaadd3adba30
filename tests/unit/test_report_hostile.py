"""Text of files and names of folders reach a report as text, whatever they look like."""

import json
from pathlib import Path

import pytest
from report_run import evaluation_summary, read_page, search_history, write_full_run

from longrope2.evaluation.schema import Calibration, CalibrationRow, Cell, KeptRow, SuiteSummary
from longrope2.report.page import write_report
from longrope2.report.suite import suite_html

EVIL = "<script>alert(1)</script>"
NAMES = (EVIL, "a%BODY%b", "a%TITLE%b%HEAD%", "<b>", 'a & b\'s "run"', "\\g<0>")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_s_name_is_text(tmp_path: Path, name: str) -> None:
    name = name.replace("/", "")
    write_full_run(tmp_path / name)
    path = write_report(tmp_path / name)
    page = read_page(path)
    assert f"LongRoPE2: {name}" in page.text and "<script" not in path.read_text()
    assert path.read_text().count("<h1>") == path.read_text().count("<!doctype") == 1


def evil(value: object) -> object:
    """The same values, with a script in every text."""
    if isinstance(value, dict):
        return {key: evil(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [evil(entry) for entry in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_every_text_of_a_search_and_an_evaluation_is_text(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    history = evil(search_history())
    assert isinstance(history, dict)
    # Texts where numbers belong, as a hand may have written them.
    history |= dict.fromkeys(("critical_index", "theoretical_critical_index"), EVIL)
    history["rounds"][-1]["num_candidates"] = 96
    (tmp_path / "2_factors" / "history.json").write_text(json.dumps(history))
    (tmp_path / "4_evaluations" / "evaluations.json").write_text(
        json.dumps(evil(evaluation_summary()))
    )
    page = write_report(tmp_path)
    assert "<script" not in page.read_text() and EVIL in read_page(page).text


def test_every_text_of_a_suite_is_text() -> None:
    numbers = {
        "num_samples": 1,
        "score": 1.0,
        "interval": (0.0, 1.0),
        "sides": {},
        "scores": (1.0,),
    }
    cell = Cell(EVIL, "longbench", EVIL, 8192, **numbers, facts=({"prompt_tokens": 5000},))
    rules = (CalibrationRow(EVIL, 0, 1, None, EVIL),)
    summary = SuiteSummary(
        model=EVIL,
        original_len=4096,
        target_len=8192,
        reference="base",
        subjects=(),
        calibration=Calibration(passed=True, rules=rules),
        cells=(cell, Cell(EVIL, EVIL, EVIL, 4096, num_samples=0, score=None, reason=EVIL)),
        averages=(),
        retention=(KeptRow(EVIL, EVIL, 1, 1.0),),
        paired=(),
    )
    page = suite_html(summary)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8
