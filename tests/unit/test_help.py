"""Every command says what it does and which keys it has, from the docstrings of its schema."""

import importlib
import re
import sys
from dataclasses import dataclass, field, is_dataclass
from enum import Enum, StrEnum
from typing import Any

import pytest

from data_prep.config import PackConfig
from launch.doctor.rope import DoctorRoot
from launch.init.before import InitRoot
from launch.plan import PlanRoot
from launch.report import ReportRoot
from longrope2.command import run_command
from longrope2.config import compose
from longrope2.evaluation.config import EvaluateRoot
from longrope2.export.variants import ExportRoot
from longrope2.help import UnknownKeyError, find_key, list_keys, schema_fields
from longrope2.inference.config import GenerateRoot
from longrope2.presets import CONF_FOLDER
from longrope2.search.config import SearchRoot
from longrope2.training.config import TrainRoot

# Configuration -> its schema and the command that composes it.
ROOTS: dict[str, tuple[type, str]] = {
    "pack": (PackConfig, "data_prep.pack"),
    "search": (SearchRoot, "launch.search"),
    "train": (TrainRoot, "launch.train"),
    "evaluate": (EvaluateRoot, "launch.evaluate"),
    "export": (ExportRoot, "launch.export"),
    "generate": (GenerateRoot, "launch.generate"),
    "plan": (PlanRoot, "launch.plan"),
    "report": (ReportRoot, "launch.report"),
    "doctor": (DoctorRoot, "launch.doctor.__main__"),
    "init": (InitRoot, "launch.init.__main__"),
}
OTHERS = {
    "launch.demo": [],
    "launch.doctor.__main__": ["node"],
    "launch.lm_eval": [],
    "launch.cluster.attempts": [],
    "launch.cluster.node_agent": [],
    "data_prep.verify": [],
    "data_prep.package_books": [],
    "data_prep.train_tokenizer": [],
}


def printed(module: str, monkeypatch, capsys, *arguments: str) -> str:
    """What a command prints that must end well."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    main = importlib.import_module(module).main
    try:
        run_command(main)
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_root_of_conf_is_here() -> None:
    assert {path.stem for path in CONF_FOLDER.glob("*.yaml")} == set(ROOTS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", ROOTS)
def test_help_names_every_key(name: str, flag: str, monkeypatch, capsys) -> None:
    schema, module = ROOTS[name]
    text = printed(module, monkeypatch, capsys, flag)
    assert f"Example: python -m {module.removesuffix('.__main__')}" in text
    for key in list_keys(schema, None):
        assert re.search(rf"^  {re.escape(key.name)}=", text, re.MULTILINE), key.name
    assert all(len(line) <= 160 for line in text.splitlines())


@pytest.mark.parametrize(("module", "words"), OTHERS.items())
def test_commands_without_a_schema(module: str, words: list[str], monkeypatch, capsys) -> None:
    text = printed(module, monkeypatch, capsys, *words, "--help")
    assert f"python -m {module.removesuffix('.__main__')}" in text


@pytest.mark.parametrize("name", ROOTS)
def test_every_field_and_every_choice_is_documented(name: str) -> None:
    """The help is made of these docstrings; enums are typed by name and shown by value."""
    schema, _ = ROOTS[name]
    undocumented = [key.name for key in list_keys(schema, None) if not key.doc]
    assert not undocumented
    for key in schema_fields(schema):
        assert is_dataclass(key.hint) or key.doc, key.name
    for key in list_keys(schema, None):
        if isinstance(key.hint, type) and issubclass(key.hint, Enum):
            assert all(member.name == member.value for member in key.hint), key.name


@pytest.mark.parametrize("name", ROOTS)
def test_the_example_composes(name: str) -> None:
    header = (CONF_FOLDER / f"{name}.yaml").read_text()
    examples = re.findall(r"^# python -m (.*?)(?:\s{2,}.*|,.*)?$", header, re.MULTILINE)
    assert examples
    schema, module = ROOTS[name]
    for example in examples:
        named, *words = example.split()
        assert named == module.removesuffix(".__main__")
        if name == "pack":
            words = ["target_len=2048", "corpus=sample"]
        compose(schema, name, [word for word in words if "=" in word])


def test_one_group_in_full(monkeypatch, capsys) -> None:
    text = printed("launch.search", monkeypatch, capsys, "--help", "search")
    assert re.search(r"^  quick  +A budget for the miniature", text, re.MULTILINE)
    assert "search.population=64   (integer)\n    Distinct candidates" in text
    assert "search.algorithm=longrope2   (longrope2|halving|longrope)" in text
    assert re.search(r"^    perplexity  +Of every token", text, re.MULTILINE)
    assert "training." not in text
    quick = printed("launch.search", monkeypatch, capsys, "--help", "search", "search=quick")
    assert "search.population=16   (integer)" in quick


def test_one_key_in_full_and_none(monkeypatch, capsys) -> None:
    text = printed("launch.train", monkeypatch, capsys, "-h", "training.learning_rate")
    assert text.startswith("\ntraining.learning_rate=2e-05   (number)") and text.count("=") == 1
    monkeypatch.setattr(sys, "argv", ["launch.train", "--help", "trainin"])
    with pytest.raises(SystemExit) as ended:
        run_command(importlib.import_module("launch.train").main)
    assert ended.value.code == 2
    assert (
        "--help trainin: no such key or group (did you mean training?); there are run"
        in capsys.readouterr().err
    )


class Colour(StrEnum):
    red = "red"
    """Like blood."""
    blue = "blue"


@dataclass
class Inner:
    width: float = 1.5
    """In metres."""


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    colour: Colour = Colour.red
    """Of the ``front``."""
    many: list[Inner] = field(default_factory=list)
    """All."""
    named: dict[str, Inner] = field(default_factory=dict)
    """By name."""


def test_keys_of_nested_schemas() -> None:
    found = {key.name: key for key in list_keys(Outer, {"inner": {"width": 2.0}})}
    names = [
        "inner.width",
        "maybe.width",
        "colour",
        "many",
        "many[].width",
        "named",
        "named.NAME.width",
    ]
    assert list(found) == names
    assert (found["inner.width"].value, found["maybe.width"].value) == ("2.0", "1.5")
    assert found["colour"].allowed == "red|blue" and found["colour"].doc == "Of the front."
    assert found["many"].allowed == "list of {width}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inner.width", (float, False)),
        ("maybe.width", (float, False)),
        ("named.x.width", (float, True)),
        ("many[0].width", (float, False)),
        ("colour", (Colour, False)),
    ],
)
def test_finding_a_key(name: str, expected: tuple[Any, bool]) -> None:
    assert find_key(Outer, name) == expected


@pytest.mark.parametrize(
    ("name", "neighbours"),
    [
        ("innr", ("inner", "maybe", "colour", "many", "named")),
        ("named.x.height", ("width",)),
        ("colour.x", ()),
    ],
)
def test_a_key_that_is_not_there(name: str, neighbours: tuple[str, ...]) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        find_key(Outer, name)
    assert caught.value.neighbours == neighbours
