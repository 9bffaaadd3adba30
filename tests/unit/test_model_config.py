"""config.json: one reader, one message from every command, and the FLOPs of what it describes."""

import ast
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep import verification
from data_prep.config import PackConfig
from longrope2.config import compose, dump
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import Manifest, hashes_of, write_manifest
from longrope2.model.folder import resolve_model_folder
from longrope2.model.shape import CONFIG_FILE, ModelShape, Workload, read_raw_config
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.search.config import SearchConfig, SearchRoot
from longrope2.search.prepare import projected_hours

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
CONFIG = json.loads((TINY / CONFIG_FILE).read_text())
UNREADABLE = " cannot be read as a Hugging Face config: "
# What is wrong: text of config.json, and what the message says of the file.
BROKEN = {
    "invalid JSON": (b'{"hidden_size": 8,}', UNREADABLE + "not JSON: "),
    "missing key": (
        json.dumps({k: v for k, v in CONFIG.items() if k != "num_attention_heads"}).encode(),
        " holds no num_attention_heads; a Llama-like model states each as a whole number above 0",
    ),
    "wrong type": (
        json.dumps({**CONFIG, "num_attention_heads": "eight"}).encode(),
        ': num_attention_heads="eight" must be a whole number above 0',
    ),
}


def _launch(folder: Path, root: Path) -> list[str]:
    """Arguments of a command of ``launch`` on the miniature."""
    return ["model=tiny", f"model.path={folder}", "target_len=2048", f"run.root={root}"]


def _with_checkpoint(stage: str, *more: str) -> Callable[[Path, Path], list[str]]:
    """The same with a finished checkpoint of the whole model."""

    def arguments(folder: Path, root: Path) -> list[str]:
        checkpoint = Path(shutil.copytree(TINY, root / "final"))
        geometry = RopeGeometry(CONFIG["head_dim"], CONFIG["rope_theta"], 128)
        factors = RescaleFactors((2.0,) * geometry.num_frequencies, geometry, 2048, "pi")
        (checkpoint / "factors.json").write_text(factors.to_json())
        write_manifest(checkpoint, Manifest("checkpoint", files=hashes_of(checkpoint)))
        return [*_launch(folder, root), f"{stage}.checkpoint={checkpoint}", *more]

    return arguments


def _pack(folder: Path, root: Path) -> list[str]:
    return ["--target", "2048", "--corpus", "sample", f"model.path={folder}", f"run.root={root}"]


def _verify(folder: Path, root: Path) -> list[str]:
    """A packed folder whose documents are to be compared with their source."""
    packed = root / "segments"
    packed.mkdir(parents=True)
    config = compose(PackConfig, "pack", ["model=tiny", f"model.path={folder}", "target_len=2048"])
    dump(config, packed / "config.yaml")
    return [str(packed)]


# Module and words of a command, and what makes its other arguments.
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "data_prep.pack": _pack,
    "data_prep.verify": _verify,
    "launch.search corpus=sample": _launch,
    "launch.train": _launch,
    "launch.evaluate corpus=sample": _launch,
    "launch.export": _with_checkpoint("export"),
    "launch.generate": _with_checkpoint("generate", f"generate.prompt_file={__file__}"),
    "launch.plan training.tokens=1000000000": _launch,
    "launch.doctor": _launch,
    "launch.doctor rope": _launch,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", BROKEN)
def test_every_command_says_the_same_of_a_broken_config(
    command: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    content, words = BROKEN[fault]
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / CONFIG_FILE).write_bytes(content)
    module, *given = command.split()
    arguments = COMMANDS[command](folder, tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", [module, *given, *arguments])
    audit = SimpleNamespace(num_shards=1, num_segments=1, num_tokens=1, num_documents=1, pieces=[1])
    monkeypatch.setattr(verification, "audit_folder", lambda *_, **__: audit)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    message = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line.removeprefix("  - ").removeprefix("error: ") for line in message.splitlines()]
    (line,) = [line for line in lines if str(folder / CONFIG_FILE) in line]
    assert line.startswith(f"{folder / CONFIG_FILE}{words}"), message
    # Beside it stands at most what the run has not made yet.
    others = [text for text in lines if text != line and not text.endswith("fault(s):")]
    assert all(re.search("no finished segments|does not exist", text) for text in others), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff{}", UNREADABLE + "'utf-8' codec can't decode byte 0xff in position 0"),
        (b"[1]", r"config\.json is not a Hugging Face config: it holds no JSON object"),
        (b"", UNREADABLE + "not JSON: Expecting value: line 1 column 1"),
        (
            b'{"num_attention_heads": -4, "head_dim": true, "hidden_size": 8.0, "model_type": 3}',
            r'config\.json: hidden_size=8\.0 must be a whole number above 0; '
            r'num_attention_heads=-4 must be a whole number above 0; '
            r'head_dim=true must be a whole number above 0; model_type=3 must be a text$',
        ),
        (
            b'{"tie_word_embeddings": "no", "rope_scaling": [], "rope_parameters": "x"}',
            r'tie_word_embeddings="no" must be true or false; rope_scaling=\[\] must be an object; '
            r'rope_parameters="x" must be an object$',
        ),
    ],
)  # fmt: skip
def test_each_fault_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as refused:
        read_raw_config(tmp_path / CONFIG_FILE)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(ArtifactError, match="config: .*Is a directory"):
        read_raw_config(tmp_path / CONFIG_FILE)


def test_null_is_as_good_as_left_out(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "model_type"))
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**CONFIG, **nulls}))
    assert read_raw_config(tmp_path / CONFIG_FILE)["head_dim"] is None
    shape = ModelShape.from_folder(tmp_path)
    heads = CONFIG["num_attention_heads"]
    assert (shape.num_kv_heads, shape.head_dim) == (heads, CONFIG["hidden_size"] // heads)
    assert resolve_model_folder(str(tmp_path)) == tmp_path


def test_nobody_else_reads_a_config_json() -> None:
    """No call of json.loads or json.load on something that names the file, outside shape.py."""
    for path in [
        p for top in ("longrope2", "launch", "data_prep") for p in (ROOT / top).rglob("*.py")
    ]:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                named = re.search(r"CONFIG_FILE|'config\.json'", ast.unparse(node))
                assert named is None, f"{path}: {ast.unparse(node)}"


# To the digit, as they were with the three models of FLOPs that the project once had.
@pytest.mark.parametrize(
    ("name", "forward", "training", "model", "whole", "hours", "mean"),
    [
        ("tiny", 17815524343808, 2525440770048, 19272192, 31859712, 0.06651129088354986,
         328807219.2),
        ("llama3_8b", 6333186975989760, 6324116005060608, 48250355712, 51472760832,
         23.643898043695106, 127491322675.2),
        ("phi3_mini", 4327677766926336, 3244057518145536, 24751079424, 27167883264,
         16.156663663191654, 84181804646.4),
    ],
)  # fmt: skip
def test_figures_stay(
    name: str,
    forward: float,
    training: float,
    model: float,
    whole: float,
    hours: float,
    mean: float,
) -> None:
    shape = ModelShape.from_folder(ROOT / "models" / name)
    assert shape.forward_flops(131_072) == forward
    assert shape.training_flops(131_072, 131_072 * 4096.0) == training
    assert shape.model_flops(4097.5) == model
    assert shape.model_flops(4097.5, whole_square=True) == whole
    search = SearchRoot(search=SearchConfig(projected_gpus=8))
    assert projected_hours(search, shape, {131_072: 13_440}) == hours
    work = Workload(131_072, 131_072 * 64, 131_072 * 6400, 0.7, 131_072 / 3)
    assert work.mean_model_flops(shape) == mean
