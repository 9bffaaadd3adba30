"""Tiny random models of every family: supported and equal to transformers, or refused by name.

The committed table (docs/models.md) is compared with a fresh run; where a difference is meant,
``python -m tests.reference.model_table > docs/models.md`` makes it anew.
"""

import re
from pathlib import Path

import pytest
import torch
from reference.model_table import (
    BOUND,
    COMMAND,
    SLOW,
    Row,
    export_difference,
    folder_of,
    generation_difference,
    measure,
    rescaled,
    two_rank_differences,
)
from reference.tiny_families import FAMILIES, make_model

from longrope2.model.loading import load_windowed_model

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "models.md"
# Every kind of rule once: plain, tied, biases, part of the head, interleaved, latent, scaled,
# capped, layers without RoPE, experts.
CHOSEN = (
    "llama", "phi (bias of the head)", "cohere (interleaved)", "minicpm3", "nanochat",
    "granitemoe", "smollm3 (a layer without RoPE)",
)  # fmt: skip


def committed() -> dict[str, list[str]]:
    """Cells of the table's rows, by family."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {row[0]: row[1:] for row in cells if row[0] != "family"}


def supported() -> list[str]:
    return [name for name, cells in committed().items() if len(cells) > 1]


def test_the_table_knows_every_family() -> None:
    assert list(sorted(committed())) == sorted(FAMILIES)
    assert len({family.model_type for family in FAMILIES.values()}) >= 40
    assert COMMAND in TABLE.read_text()
    for name in supported():
        numbers = [cell for cell in committed()[name] if re.fullmatch(r"0|<1e-0[456]", cell)]
        assert len(numbers) == len(committed()[name]) - 2, name


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_right_or_refused(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    row, cells = measure(name, tmp_path), committed()[name]
    if row.refusal is not None:
        assert cells == [row.refusal]
        return
    assert cells[:2] == [row.rope, row.head]
    assert_small(row)


def assert_small(row: Row) -> None:
    for column, value in row.differences.items():
        assert value <= BOUND, f"{row.name}: {column} differs by {value:.2g}"
    assert row.differences["shares"] == 0


@pytest.mark.parametrize("name", CHOSEN[:2])
def test_generation_and_export_of_a_few(name: str, tmp_path: Path) -> None:
    check_generation_and_export(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in supported() if name not in CHOSEN[:2]])
def test_generation_and_export(name: str, tmp_path: Path) -> None:
    check_generation_and_export(name, tmp_path)


def check_generation_and_export(name: str, tmp_path: Path) -> None:
    folder = make_model(name, folder_of(name, tmp_path))
    factors = rescaled(folder)
    assert generation_difference(folder, load_windowed_model(folder, factors)) == 0
    assert export_difference(folder, factors) <= BOUND


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    names = supported()
    for name in names:
        make_model(name, folder_of(name, tmp_path))
    found = two_rank_differences(names, tmp_path)
    assert list(found) == names
    assert {name: value for name, value in found.items() if value > BOUND} == {}


def test_slow_columns_are_in_the_table() -> None:
    head = next(line for line in TABLE.read_text().splitlines() if line.startswith("| family"))
    assert all(f"| {column} |" in head for column in SLOW)
