"""Imports point one way: folders are the data flow, nothing reaches back or circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOPS = ("longrope2", "data_prep", "launch")
# A package may import itself and packages of a lower number.
LAYERS = {
    "system_errors": -1, "errors": 0, "command": 1, "help": 1, "kernel_choice": 1, "statistics": 1,
    "files": 1, "rope": 1, "presets": 1, "command_line": 2, "config": 3, "claim": 4, "segments": 3,
    "attention": 4, "parallel": 4, "tracking": 4, "model": 5, "corpora": 6, "planning": 6,
    "search": 7, "training": 7, "inference": 8, "evaluation": 9, "export": 10, "report": 11,
}  # fmt: skip
DATA_PREP_MAY = set(
    "errors command help files presets config claim rope segments model corpora".split()
)
HYDRA_ONLY_IN = {f"longrope2/{name}.py" for name in ("config", "presets", "command_line")}
FILES = [p for top in TOPS for p in sorted((ROOT / top).rglob("*.py"))]


def module_name(path: Path) -> str:
    """``longrope2/rope/factors.py`` -> ``longrope2.rope.factors``; ``__init__``: the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, modules: set[str]) -> set[str]:
    """What a file imports: at its top, in a function, under ``TYPE_CHECKING``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = full_names & modules
            found |= inside
            if len(inside) < len(full_names):
                found.add(node.module or "")
    return found


def read_graph(files: list[Path]) -> dict[str, set[str]]:
    """Module -> modules of this project that it imports."""
    names = {module_name(path) for path in files}
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in files}
    return {
        name: (imported_modules(text, names) & names) - {name} for name, text in sources.items()
    }


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one found; empty when there is none."""
    done: set[str] = set()

    def follow(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if circle := follow(target, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := follow(name, []))), [])


def part(module: str) -> str | None:
    """``longrope2.rope.factors`` -> ``rope``."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "longrope2" and len(pieces) > 1 else None


def test_no_module_imports_itself_through_others() -> None:
    circle = find_circle(read_graph(FILES))
    assert not circle, f"import circle: {' -> '.join(circle)}"


@pytest.mark.parametrize("place", ["top", "function", "type checking"])
def test_a_planted_circle_is_found(place: str) -> None:
    """A ring through a late import and one under TYPE_CHECKING count like one at the top."""
    line = {
        "top": "from longrope2.search.run import run_search",
        "function": "def f():\n    from longrope2.search.run import run_search",
        "type checking": "if TYPE_CHECKING:\n    from longrope2.search.run import run_search",
    }[place]
    graph = read_graph(FILES)
    planted = "longrope2.rope.factors"
    graph[planted] = graph[planted] | imported_modules(line, set(graph))
    circle = find_circle(graph)
    assert circle[0] == circle[-1] and planted in circle and "longrope2.search.run" in circle


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    imported = imported_modules(path.read_text(encoding="utf-8"), set())
    parts = {p for p in map(part, imported) if p is not None}
    tops = {module.split(".")[0] for module in imported}
    if relative.parts[0] == "launch":
        return
    assert "launch" not in tops, "only launch may import launch"
    if relative.parts[0] == "data_prep":
        assert parts <= DATA_PREP_MAY, f"data_prep may not import {parts - DATA_PREP_MAY}"
        return
    assert "data_prep" not in tops, "longrope2 may not import data_prep"
    own = relative.with_suffix("").parts[1]
    if own == "__init__":
        assert not parts
        return
    allowed = {own} | {name for name, layer in LAYERS.items() if layer < LAYERS[own]}
    assert parts <= allowed, f"{own} may not import {parts - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_hydra_and_transformers_stay_in_their_places(path: Path) -> None:
    relative = path.relative_to(ROOT)
    imported = imported_modules(path.read_text(encoding="utf-8"), set())
    tops = {module.split(".")[0] for module in imported}
    if str(relative) not in HYDRA_ONLY_IN:
        assert not tops & {"hydra", "omegaconf"}, f"only {sorted(HYDRA_ONLY_IN)} know Hydra"
    if relative.parts[:2] == ("longrope2", "rope"):
        assert not tops & {"transformers", "pathlib", "os", "deepspeed"}, "rope is pure maths"


def test_every_package_has_a_layer() -> None:
    found = {p.stem for p in (ROOT / "longrope2").iterdir() if p.name[0] not in "_."}
    assert found == set(LAYERS)


def test_help_of_packing_imports_neither_torch_nor_transformers() -> None:
    """Seconds, of which most would be torch's."""
    script = (
        "import sys\nfrom data_prep.pack import main\n"
        "try:\n    main(['--help'])\nfinally:\n"
        "    print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "--target" in ended.stdout
    assert ended.stderr.strip() == "set()"
