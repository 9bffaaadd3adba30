"""The table of a real model's evaluation: pooled over parts, intervals by haystack and window."""

import json
import math
import sys

import pytest

from benchmarks import real_model
from longrope2.statistics import wilson_interval


def line(subject, suite, length=64, **values):
    return {"subject": subject, "suite": suite, "length": length, "values": values}


def haystack(subject, nll, exact=(1, 0), **place):
    shared = {"needles_per_haystack": [2, 2], "num_tokens": [8, 8], "exact": list(exact)}
    return line(subject, "needle", nll=[nll / 2, nll / 2], **shared, **place)


def window(subject, nll):
    return line(subject, "perplexity", nll=[nll], num_tokens=[16])


@pytest.fixture
def run(tmp_path):
    """NTK's second haystack is missing, as is all of its text."""
    lines = [
        haystack("base", 999.0, length=32),
        haystack("base", 32.0, exact=(0, 0)), haystack("base", 32.0, exact=(0, 0)),
        window("base", 40.0), window("base", 56.0),
        line("base", "retention", 128, nll=[1.0], num_tokens=[4]),
        haystack("ntk", 8.0),
        haystack("halving", 4.0, exact=(1, 1)), haystack("halving", 12.0),
        window("halving", 32.0), window("halving", 40.0),
    ]  # fmt: skip
    folder = tmp_path / "4_evaluations"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return tmp_path


def test_rows_of_an_unfinished_evaluation(run):
    base, ntk, halving = real_model.rows(real_model.read_units(run), "halving")
    high = 100 * wilson_interval(0, 2)[1]
    assert base[:4] == ["base", f"0 of 4 (0-{high:.0f} %)", f"{math.e**2:.4g} (7.389-7.389)", "32"]
    assert base[4] == f"{math.exp(3):.4g} ({math.exp(2.5):.4g}-{math.exp(3.5):.4g})"
    assert base[5:] == ["-1.500 (-1.750 to -1.250)", "-0.750 (-1.000 to -0.500)"]
    low, high = (100 * x for x in wilson_interval(0.5, 1))
    assert ntk[:3] == ["ntk", f"1 of 2 ({low:.0f}-{high:.0f} %)", f"{math.exp(0.5):.4g}"]
    assert ntk[3:] == ["", "", "-0.250", ""]
    assert halving[1] == "3 of 4 (50-100 %)" and halving[5:] == ["", ""]


def test_the_command_prints_a_markdown_table(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_model", str(run), "--result", "ntk"])
    real_model.main()
    heading, rule, *table = capsys.readouterr().out.splitlines()
    assert "needle loss, ntk minus it" in heading and set(rule) <= set("|- ")
    assert [row.split(" | ")[0] for row in table] == ["| base", "| ntk", "| halving"]
