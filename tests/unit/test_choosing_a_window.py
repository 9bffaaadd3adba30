"""The figures of docs/choosing_a_window.md are those of the models' shapes and of the planner."""

import re
from pathlib import Path

import pytest

from launch.plan import PlanRoot, plan_run
from longrope2.config import compose
from longrope2.model.shape import ModelShape
from longrope2.planning.memory import predict_memory
from longrope2.planning.timing import predict_time

PAGE = (Path(__file__).parents[2] / "docs" / "choosing_a_window.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)[2:]
    assert lines
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def number(cell: str) -> float:
    return float(cell.replace(",", "").removesuffix(" %"))


def shape_of(model: str) -> ModelShape:
    return plan_run(compose(PlanRoot, "plan", [f"experiment={model}_128k"])).shape


def test_what_a_request_costs() -> None:
    """Keys and values: 2 x layers x heads x width x 2 bytes; attention: 2 x layers x width x L²."""
    models = {"llama3_8b": (32, 8, 32, 128), "phi3_mini": (32, 32, 32, 96)}
    shapes = {model: shape_of(model) for model in models}
    for window, *cells in rows("What a request costs"):
        length = int(number(window))
        for place, (model, (layers, kv_heads, heads, width)) in enumerate(models.items()):
            cache, work, share = (number(cell) for cell in cells[3 * place : 3 * place + 3])
            assert cache == pytest.approx(
                2 * 2 * layers * kv_heads * width * length / 2**30, abs=0.05
            )
            attention = 2 * layers * heads * width * length**2
            weights = 2 * layers * shapes[model].layer_parameters * length
            assert work == pytest.approx((attention + weights) / 1e15, rel=0.005, abs=0.005)
            assert share == round(100 * attention / (attention + weights))


def test_what_training_costs() -> None:
    for experiment, window, grid, recompute, memory, hours, gpu_hours in rows(
        "What training costs"
    ):
        overrides = [f"experiment={experiment.strip('`')}", "hardware=a100_64"]
        plan = plan_run(compose(PlanRoot, "plan", overrides))
        layout = plan.configured
        assert layout is not None and plan.refusal is None
        time = predict_time(plan.shape, plan.workload, layout, plan.machine)
        used = predict_memory(plan.shape, plan.workload, layout).peak / 2**30
        assert plan.workload.target_len == number(window)
        assert (layout.describe(), layout.recompute.value) == (grid, recompute)
        assert (f"{used:.1f}", f"{time.hours:.1f}") == (memory, hours)
        assert f"{time.gpu_hours:,.0f}" == gpu_hours


def test_the_counts_of_documents_add_up() -> None:
    for _, total, _, _, up_to_32k, longer in rows("How long texts are"):
        assert number(total) == number(up_to_32k) + number(longer)
