"""Refusals before torch is loaded: all that is known, at once, and settings that work together."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longrope2.config import compose
from longrope2.errors import ArtifactError, ConfigError
from longrope2.evaluation.before import trained_faults
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.inference.config import GenerateRoot
from longrope2.model.facts import stated_window
from longrope2.model.folder import look_before, merged_config_file
from longrope2.model.shape import ModelShape
from longrope2.search.before import known_faults as search_faults
from longrope2.search.config import SearchRoot
from longrope2.training.before import too_few_faults
from longrope2.training.config import TrainRoot, settings_faults
from longrope2.training.layouts import in_words, working_settings

TARGET = "target_len=1000"
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib")
TINY = json.loads(Path("models/tiny/config.json").read_text(encoding="utf-8"))
MINE = TINY | {
    "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96,
    "max_position_embeddings": 256,
}  # fmt: skip
REFUSED_IN_ONE_PROCESS = """
import contextlib, importlib, io, json, sys
refusals = []
for words in json.loads(sys.argv[1]):
    sys.argv = words
    module = importlib.import_module(words[0])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        module.main() if words[0] == "data_prep.pack" else module.run_command(module.main)
    refusals.append(errors.getvalue())
heavy = json.loads(HEAVY)
print(json.dumps({"refusals": refusals, "loaded": [m for m in heavy if m in sys.modules]}))
"""


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A folder as far as it is looked at before anything is loaded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the miniature: three heads, window 256."""
    return write_model(tmp_path_factory.mktemp("my models") / "mine", MINE)


def refuse_all(commands: list[list[str]]) -> dict[str, Any]:
    """What each command says on stderr, one process for all, and what heavy was loaded by then."""
    script = REFUSED_IN_ONE_PROCESS.replace("HEAVY", repr(json.dumps(HEAVY)))
    words = [sys.executable, "-c", script, json.dumps(commands)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def refusals(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every command with the miniature's preset and another model's path."""
    place = [f"run.root={tmp_path_factory.mktemp('runs')}", "run.name=x"]
    foreign = ["model=tiny", f"model.path={mine}", "target_len=2048", *place]
    layout = ["parallel.processes=2", "parallel.sequence=2", "training.same_kind_segments=1"]
    layout.append("training.global_batch_tokens=7000")
    base = "evaluation.subjects=[{name: base, rope: {method: none}}]"
    return refuse_all(
        [
            ["launch.train", *foreign, *layout],
            ["launch.search", *foreign, "search.grid=0.7"],
            ["launch.evaluate", *foreign, base, "evaluation.batch_tokens=0"],
            ["launch.export", *foreign, "export.cost_windows=-1"],
            ["launch.generate", *foreign, "generate.prompt_file=/no/prompt"],
            ["launch.plan", *foreign, "hardware=a100_64", "plan.long_share=2"],
            ["launch.doctor.__main__", "rope", *foreign, "doctor.plot=x.txt"],
            ["data_prep.pack", *foreign, "--corpus", "sample", "align=7"],
            ["launch.doctor.__main__", "modl=tiny"],
            ["launch.report", "run.nme=x"],
            ["launch.init.__main__", "corpus.folder=/no/texts"],
            ["launch.init.__main__", "model.path=/no/model", "corpus.folder=/no/texts", TARGET],
            ["launch.init.__main__", f"model.path={mine}", "corpus.folder=/no/texts", TARGET],
        ]
    )


OTHERS = (
    "parallel.sequence=2 cannot share 3 query and 3 key/value heads",
    "search.grid=0.7: 1 / grid must be a whole number",
    "evaluation.batch_tokens=0 must be at least 1",
    "export.cost_windows=-1 must be 0 or more",
    "generate.prompt_file=/no/prompt cannot be read",
    "plan.long_share=2.0 must be from 0 to 1",
    "doctor.plot=x.txt: must end in .svg or .png",
    "align=7 does not divide target_len=2048",
)


def test_a_refusal_loads_nothing_heavy(refusals: dict[str, Any]) -> None:
    assert refusals["loaded"] == []
    assert len(refusals["refusals"]) == len(OTHERS) + 5
    assert all(text.startswith("error: ") for text in refusals["refusals"])


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_every_command_questions_a_window_of_another_model(
    refusals: dict[str, Any], mine: Path, number: int
) -> None:
    """Beside its own faults, in one message."""
    message = refusals["refusals"][number]
    assert (
        "model.original_len=128 is the window of models/tiny, but config.json of "
        f"model.path={mine} says max_position_embeddings=256; give the window that this model was "
        "trained with: model.original_len=256" in message
    )
    assert (
        f"model.name=tiny names the model of models/tiny, but {mine / 'config.json'} is another "
        "(hidden_size=96, there 128, num_attention_heads=3, there 4, num_key_value_heads=3, "
        "there 4); give model=custom for this one, or model.name=NAME" in message
    )
    assert OTHERS[number] in message


def test_init_is_refused_for_model_and_documents_together(refusals: dict[str, Any]) -> None:
    """For keys that are missing first, for all that they name then."""
    unset, nothing, window = refusals["refusals"][-3:]
    assert "model.path is not set" in unset and "target_len is not set" in unset
    no_texts = "corpus.folder=/no/texts is not a folder"
    no_model = "model.path=/no/model does not exist; give a local Hugging Face model folder"
    assert no_texts in nothing and no_model in nothing and "2 fault(s)" in nothing
    assert no_texts in window and "2 fault(s)" in window
    assert "target_len=1000 must be a multiple of model.original_len=256, and at least" in window


def test_training_is_refused_once(refusals: dict[str, Any]) -> None:
    """What took three refusals: batch, heads and group, and what is not made yet."""
    message = refusals["refusals"][0]
    assert "parallel.sequence=2 cannot share 3 query and 3 key/value heads" in message
    assert "training.global_batch_tokens=7000 must be a multiple of target_len" in message
    assert "holds no finished segments" in message
    assert "rope.method=searched needs a factors file" in message
    assert message.splitlines()[-1] == (
        "  - these go together: parallel.sequence=1 training.same_kind_segments=2 "
        "training.global_batch_tokens=8192"
    )


def looked(*words: str) -> list[str]:
    """Faults of ``look_before`` for the model that a command line gives."""
    config = compose(SearchRoot, "search", ["target_len=4096", *words])
    return look_before(config.model).faults


def test_what_the_user_gives_is_taken_with_a_note(mine: Path) -> None:
    """config.json may say more than a model was trained with."""
    words = ["model=tiny", f"model.path={mine}", "model.name=mine", "model.original_len=128"]
    look = look_before(compose(SearchRoot, "search", [*words, "target_len=4096"]).model)
    assert look.faults == [] and look.original_len is None
    assert look.notes == [
        f"model.original_len=128 is taken, though {mine}'s config.json says "
        "max_position_embeddings=256"
    ]
    assert looked("model=custom", f"model.path={mine}", "model.original_len=256") == []


def test_a_name_alone_does_not_make_a_presets_window_right(mine: Path) -> None:
    (fault,) = looked("model=tiny", f"model.path={mine}", "model.name=mine")
    assert "model.original_len=128 is the window of models/tiny" in fault


def test_a_window_above_config_json_is_refused(mine: Path) -> None:
    (fault,) = looked("model=custom", f"model.path={mine}", "model.original_len=512")
    assert "model.original_len=512 is above max_position_embeddings=256" in fault
    larger = "model.config={max_position_embeddings: 512}"
    words = ("model=custom", f"model.path={mine}", "model.original_len=512", larger)
    assert looked(*words) == []


def test_a_copy_of_the_presets_own_model_keeps_what_the_preset_says(tmp_path: Path) -> None:
    """Phi3-mini's window is the paper's 2,048, where its config.json says 4,096."""
    copy = shutil.copytree("models/phi3_mini", tmp_path / "phi")
    assert looked("model=phi3_mini", f"model.path={copy}") == []
    config = json.loads((copy / "config.json").read_text()) | {
        "vocab_size": 99,
        "sliding_window": 2047,
    }
    (copy / "config.json").write_text(json.dumps(config))
    faults = looked("model=phi3_mini", f"model.path={copy}")
    assert len(faults) == 3
    assert "model.original_len=2048 is the window of microsoft/Phi-3-mini-4k-instruct" in faults[0]
    assert (
        f"model.sliding_window=drop is said of microsoft/Phi-3-mini-4k-instruct, but config.json "
        f"of model.path={copy} says sliding_window=2047; give model.sliding_window=keep or drop"
        in faults[1]
    )
    assert "vocab_size=99, there 32064" in faults[2]


def test_a_model_without_a_window_needs_one_given(tmp_path: Path) -> None:
    config = {key: value for key, value in TINY.items() if key != "max_position_embeddings"}
    folder = write_model(tmp_path / "x", config)
    assert looked("model=tiny", f"model.path={folder}") == []  # the miniature itself, as it seems
    folder = write_model(tmp_path / "y", config | {"vocab_size": 7})
    faults = looked("model=tiny", f"model.path={folder}")
    assert "states no window; give the window that this model was trained with: " in faults[0]
    assert faults[0].endswith("model.original_len=TOKENS")


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": 4096}, ("max_position_embeddings", 4096)),
        (
            {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
            ("original_max_position_embeddings", 4096),
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"original_max_position_embeddings": 8192},
            },
            ("rope_scaling.original_max_position_embeddings", 8192),
        ),
        (
            {"rope_parameters": {"original_max_position_embeddings": 16}, "rope_scaling": None},
            ("rope_parameters.original_max_position_embeddings", 16),
        ),
    ],
)
def test_the_window_that_a_config_states(config: dict[str, Any], window: Any) -> None:
    assert stated_window(config) == window


def test_what_is_loaded_later_meets_the_same_rule(mine: Path) -> None:
    """A model that had to be fetched is compared then."""
    model = compose(
        SearchRoot, "search", ["model=tiny", f"model.path={mine}", "target_len=2048"]
    ).model
    with pytest.raises(ArtifactError, match="model.original_len=128 is the window of models/tiny"):
        merged_config_file(mine / "config.json", model, 2048)


def test_a_plan_does_not_take_another_models_config_json() -> None:
    model = compose(
        TrainRoot, "train", ["experiment=llama3_8b_128k", "model.path=someone/other"]
    ).model
    (fault,) = look_before(model, takes_copy=True).faults
    assert (
        "model.config_folder=models/llama3_8b describes meta-llama/Meta-Llama-3-8B, not "
        "model.path=someone/other, which is not on this machine; give model.config_folder=FOLDER"
        in fault
    )


def test_files_that_a_stage_reads_are_missed_together(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy("models/tiny/config.json", folder)
    words = ["model=tiny", f"model.path={folder}", "target_len=2048", "run.name=x"]
    config = compose(SearchRoot, "search", words)
    faults = search_faults(config, look_before(config.model))
    assert [fault for fault in faults if "holds no *.safetensors weights" in fault]
    assert [fault for fault in faults if "holds neither tokenizer.json nor tokenizer.mod" in fault]


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("model=/some/where", "model=custom model.path=/some/where model.original_len=TOKENS"),
        ("corpus=/tmp", "corpus=folder corpus.folder=/tmp"),
    ],
)
def test_a_path_where_a_name_is_due(words: str, instead: str) -> None:
    given = dict([("model", "tiny"), words.split("=")])
    with pytest.raises(ConfigError) as error:
        compose(SearchRoot, "search", [f"{k}={v}" for k, v in given.items()] + ["target_len=2048"])
    assert f"{words} is a path" in str(error.value) and instead in str(error.value)


def test_an_untrained_run_offers_its_export(tmp_path: Path) -> None:
    words = ["model=tiny", "target_len=2048", f"run.root={tmp_path}", "run.name=x"]
    config = compose(GenerateRoot, "generate", [*words, "generate.prompt_file=x"])

    def fault() -> str:
        (text,) = trained_faults(config, "generate.checkpoint", None, takes_exports=True)
        return text

    missing = f"generate.checkpoint={tmp_path}/x/3_checkpoints/final does not exist; "
    assert fault() == f"{missing}run launch.train first"
    exports = tmp_path / "x" / "5_exports" / "untrained"
    files = {"hugging_face/config.json": "0", "hugging_face/factors.json": "0"}
    write_manifest(exports, Manifest("exports", files=files))
    assert fault() == (
        f"{missing}run launch.train first, or give generate.checkpoint={exports}/hugging_face, "
        "which this run exported without training"
    )


SHAPES = [ModelShape(96, 2, heads, kv, 32, 64, 100, True) for heads, kv in ((3, 3), (9, 3), (8, 2))]


def given(processes: int, sequence: int, alike: int, batch: int, tokens: int | None) -> TrainRoot:
    """A training with these settings, for a window of 256 tokens extended to 2,048 or 2,000."""
    config = compose(
        TrainRoot,
        "train",
        ["model=custom", "model.path=x", "model.original_len=256", "target_len=2048", "run.name=x"],
    )
    config.parallel.processes, config.parallel.sequence = processes, sequence
    training = config.training
    training.same_kind_segments, training.global_batch_tokens = alike, batch
    training.tokens = tokens
    return config


def apply(config: TrainRoot, settings: dict[str, int]) -> None:
    for key, value in settings.items():
        above, _, name = key.rpartition(".")
        setattr(getattr(config, above) if above else config, name, value)


def test_offered_settings_work_together() -> None:
    """Every option of every case is taken by the rules; and there always is one."""
    cases = itertools.product(
        SHAPES, (1, 2, 6), (1, 2, 3), (1, 8), (2048, 5000), (None, 10_000),
        (None, (40, 40), (3, 0)), (2048, 3000),
    )  # fmt: skip
    num_offers = 0
    base = given(1, 1, 1, 2048, None)
    for shape, processes, sequence, alike, batch, tokens, counts, target in cases:
        changed = {
            "target_len": target, "parallel.processes": processes, "parallel.sequence": sequence,
            "training.same_kind_segments": alike, "training.global_batch_tokens": batch,
            "training.tokens": tokens,
        }  # fmt: skip
        apply(base, changed)

        def faults(world_size: int, shape: ModelShape = shape, counts: Any = counts) -> list[str]:
            found = settings_faults(base, shape, world_size)
            return found + (too_few_faults(base, *counts) if counts else [])

        options = working_settings(base, processes, shape, counts)
        assert options or not faults(processes) or counts == (3, 0), changed
        assert not options or faults(processes), "nothing to mend"
        for option in options:
            apply(base, changed)
            apply(base, option)
            assert faults(base.parallel.processes) == [], (changed, option)
            num_offers += 1
    assert num_offers > 500


def test_offers_in_words() -> None:
    """Three heads on six processes: a third of them in a row, or one and two segments alike."""
    config = given(processes=6, sequence=2, alike=2, batch=12_288, tokens=None)
    config.target_len = 3072
    options = working_settings(config, 6, SHAPES[0], None)
    assert in_words(options) == (
        "these go together: parallel.sequence=3, or parallel.sequence=1 "
        "training.same_kind_segments=6 training.global_batch_tokens=18432"
    )
    config = given(processes=2, sequence=2, alike=1, batch=2048, tokens=None)
    options = working_settings(config, 2, SHAPES[0], None)
    assert in_words(options) == (
        "these go together: parallel.sequence=1 training.same_kind_segments=2 "
        "training.global_batch_tokens=4096"
    )
