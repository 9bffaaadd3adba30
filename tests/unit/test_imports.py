"""Imports point one way: the folders are the data flow, and nothing reaches back up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# A package may import itself and packages of a lower number; the shared modules may be imported by all.
LAYERS = {
    "rope": 1, "segments": 2, "attention": 3, "parallel": 3, "tracking": 3, "model": 4, "planning": 5,
    "search": 6, "training": 6, "inference": 7, "evaluation": 8, "export": 9,
}  # fmt: skip
SHARED = {
    "errors": set(), "gguf_model": {"errors"}, "artifacts": {"errors", "gguf_model"},
    "config": {"errors", "artifacts"}, "command": {"errors"}, "apex_package": set(), "kernel_choice": {"errors"},
}  # fmt: skip
DATA_PREP_MAY = {"segments", "rope", *SHARED}
HYDRA_ONLY_IN = {"longrope2/config.py"}
FILES = [p for top in ("longrope2", "data_prep", "launch") for p in sorted((ROOT / top).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def part(module: str) -> str | None:
    """``longrope2.rope.factors`` -> ``rope``."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "longrope2" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    parts = {p for p in map(part, imported_modules(path)) if p is not None}
    tops = {module.split(".")[0] for module in imported_modules(path)}
    if relative.parts[0] == "launch":
        return
    assert "launch" not in tops, "only launch may import launch"
    if relative.parts[0] == "data_prep":
        assert parts <= DATA_PREP_MAY, f"data_prep may not import {parts - DATA_PREP_MAY}"
        return
    assert "data_prep" not in tops, "longrope2 may not import data_prep"
    own = relative.with_suffix("").parts[1]
    if own in SHARED or own == "__init__":
        assert parts <= SHARED.get(own, set())
        return
    allowed = set(SHARED) | {own} | {name for name, layer in LAYERS.items() if layer < LAYERS[own]}
    assert parts <= allowed, f"{own} may not import {parts - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_hydra_and_transformers_stay_in_their_places(path: Path) -> None:
    relative = path.relative_to(ROOT)
    tops = {module.split(".")[0] for module in imported_modules(path)}
    if str(relative) not in HYDRA_ONLY_IN:
        assert not tops & {"hydra", "omegaconf"}, "only longrope2/config.py knows Hydra"
    if relative.parts[:2] == ("longrope2", "rope"):
        assert not tops & {"transformers", "pathlib", "os", "deepspeed"}, "rope is pure maths"


def test_every_package_has_a_layer() -> None:
    packages = {p.name for p in (ROOT / "longrope2").iterdir() if (p / "__init__.py").is_file()}
    assert packages <= set(LAYERS)
