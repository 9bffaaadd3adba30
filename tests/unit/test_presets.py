"""Presets, experiments and files of one's own: what each command takes of them, and the faults."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PackConfig
from launch.doctor.rope import DoctorRoot
from launch.plan import PlanRoot
from launch.report import ReportRoot
from longrope2.config import compose
from longrope2.corpora.config import CorpusKind
from longrope2.errors import ConfigError
from longrope2.evaluation.config import EvaluateRoot
from longrope2.export.variants import ExportRoot
from longrope2.inference.config import GenerateRoot
from longrope2.presets import CONF_FOLDER, SECTIONS, read_groups
from longrope2.rope.methods import RopeMethod
from longrope2.search.config import Algorithm, SearchRoot
from longrope2.training.config import TrainRoot

ROOTS = {
    "pack": PackConfig, "search": SearchRoot, "train": TrainRoot, "evaluate": EvaluateRoot,
    "export": ExportRoot, "generate": GenerateRoot, "plan": PlanRoot, "report": ReportRoot,
    "doctor": DoctorRoot,
}  # fmt: skip
OWN = """\
# Mine.
defaults:
  - override /model: custom
  - override /corpus: folder
  - override /training: miniature
  - override /search: halving
  - _self_
run:
  name: mine
model:
  name: my_model
  path: /models/my model
  original_len: 256
target_len: 1024
corpus:
  folder: /data/my texts
quotas:
  folder: {short: 100, long: 200}
align: 2
training:
  learning_rate: 5e-4
search:
  num_samples: 3
export:
  gguf: true
generate:
  max_new_tokens: 7
"""


def own_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def made_by_all(experiment: str) -> dict[str, Any]:
    """Command -> configuration."""
    prompt = {"generate": ["generate.prompt_file=-"]}
    return {
        name: compose(root, name, [experiment, *prompt.get(name, [])])
        for name, root in ROOTS.items()
    }


@pytest.mark.parametrize("place", ["mine.yaml", "with a space/lr=1e-3,x.yaml", "own.yml"])
def test_every_command_takes_its_part_of_an_experiment(tmp_path: Path, place: str) -> None:
    made = made_by_all(f"experiment={own_file(tmp_path, place, OWN)}")
    for name, config in made.items():
        assert config.run.name == "mine"
        if name != "report":
            model = config.model
            found = (model.name, model.path, model.original_len, config.target_len)
            assert found == ("my_model", "/models/my model", 256, 1024), name
    pack, search, train = made["pack"], made["search"], made["train"]
    assert (pack.align, vars(pack.quotas["folder"])) == (2, {"short": 100, "long": 200})
    for config in (pack, search, made["evaluate"]):
        corpus = config.corpus
        assert (corpus.kind, corpus.folder) == (CorpusKind.folder, "/data/my texts")
        assert corpus.members == [] and corpus.heldout_characters is None
    assert (search.search.algorithm, search.search.num_samples) == (Algorithm.halving, 3)
    assert (train.training.learning_rate, train.training.warmup_steps) == (5e-4, 10)
    assert made["export"].export.gguf and made["generate"].generate.max_new_tokens == 7


def test_the_command_line_goes_before_an_experiment(tmp_path: Path) -> None:
    given = [f"experiment={own_file(tmp_path, 'x.yaml', OWN)}", "training=paper"]
    training = compose(TrainRoot, "train", [*given, "training.beta1=0.5"]).training
    assert (training.global_batch_tokens, training.beta1) == (8_388_608, 0.5)
    assert training.learning_rate == 5e-4


def test_an_experiment_of_the_current_folder_by_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_file(tmp_path, "conf/experiment/mine.yaml", OWN)
    base = "defaults: [mine]\ntraining: {beta2: 0.5}\n"
    own_file(tmp_path, "conf/experiment/varied.yaml", base)
    assert compose(TrainRoot, "train", ["experiment=mine"]).training.beta2 == 0.95
    varied = compose(TrainRoot, "train", ["experiment=varied"])
    assert varied.training.beta2 == 0.5 and varied.model.name == "my_model"
    with pytest.raises(ConfigError, match="choose experiment= one of .*, mine, .*, varied, or a"):
        compose(TrainRoot, "train", ["experiment=nope"])
    relative = compose(TrainRoot, "train", ["experiment=conf/experiment/mine.yaml"])
    assert relative == compose(TrainRoot, "train", ["experiment=mine"])


def test_shipped_experiments_serve_every_stage() -> None:
    made = made_by_all("experiment=llama3_8b_128k_yarn")
    assert {config.run.name for config in made.values()} == {"llama3_8b_128k_yarn"}
    assert made["train"].rope.method is RopeMethod.yarn
    assert made["search"].parallel.processes == 64
    # A trained model has the RoPE of its training.
    assert made["export"].rope is None
    by_hand = compose(ExportRoot, "export", ["experiment=llama3_8b_128k_yarn", "rope=pi"])
    assert by_hand.rope is not None and by_hand.rope.method is RopeMethod.pi


def test_model_and_corpus_in_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "# Mine.\nname: mine\npath: /m\noriginal_len: 64\n"
    model = own_file(tmp_path, "my=model.yaml", text)
    relative = "sub folder/corpus.yaml"
    own_file(tmp_path, relative, "kind: folder\nname: texts\nfolder: /t\n")
    words = [f"model={model}", f"corpus={relative}", "target_len=128"]
    pack = compose(PackConfig, "pack", words)
    assert (pack.model.name, pack.run.name) == ("mine", "mine_128")
    assert (pack.corpus.name, pack.corpus.members, pack.corpus.folder) == ("texts", [], "/t")
    assert set(pack.quotas) == {"folder", "retrieval"}
    assert compose(SearchRoot, "search", words).corpus == pack.corpus
    monkeypatch.setenv("HOME", str(tmp_path))
    home = compose(PackConfig, "pack", ["model=~/my=model.yaml", *words[1:]])
    assert home.model == pack.model
    built_on = own_file(tmp_path, "on.yaml", "defaults: [llama3_8b]\nname: other\n")
    on = compose(TrainRoot, "train", [f"model={built_on}", "target_len=16384"]).model
    assert (on.name, on.original_len) == ("other", 8192)


def faults_of(root: type, command: str, *words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(root, command, words)
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "trainning: {beta1: 0.5}",
            "sets trainning, which no command has (did you mean training?); there are ",
        ),
        ("defaults:\n- override /modell: tiny", "chooses modell (did you mean model?); there are "),
        ("defaults:\n- override /model: nope", "x.yaml: model=nope does not exist; choose model="),
        ("defaults:\n- nope", "experiment=nope does not exist; choose experiment= one of "),
        ("defaults: 3", "x.yaml: defaults must be a list of NAME and 'override /GROUP: NAME'"),
        ("- a\n- b", "x.yaml holds no keys; write KEY: VALUE lines"),
        ("a: [", "x.yaml cannot be read as YAML: while parsing a flow"),
        (
            "training: {learning_rat: 1}",
            "training.learning_rat (did you mean training.learning_rate?); ",
        ),
    ],
)
def test_faults_of_an_experiment(tmp_path: Path, text: str, fault: str) -> None:
    path = own_file(tmp_path, "x.yaml", text)
    words = ["model=tiny", "target_len=256", f"experiment={path}"]
    (found,) = faults_of(TrainRoot, "train", *words)
    assert fault in found


def test_faults_of_files(tmp_path: Path) -> None:
    (found,) = faults_of(TrainRoot, "train", "model=tiny", "experiment=/nope/x.yaml")[:1]
    assert found.startswith("experiment=/nope/x.yaml: no such file; give one of llama3_8b_128k, ")
    ring = own_file(tmp_path, "ring.yaml", f"defaults: [{tmp_path}/ring.yaml]\n")
    (found,) = faults_of(TrainRoot, "train", "model=tiny", f"experiment={ring}")
    assert f"builds on itself: {ring} -> {ring}" in found
    chooser = own_file(tmp_path, "chooser.yaml", "defaults: [{override /rope: pi}]\nname: x\n")
    (found,) = faults_of(TrainRoot, "train", f"model={chooser}")
    assert found.endswith("chooses rope: pi; only an experiment chooses groups")
    mixed = own_file(tmp_path, "mix.yaml", "kind: mix\nname: mix\nmembers: [pg19]\n")
    (found,) = faults_of(PackConfig, "pack", f"corpus={mixed}", "target_len=256")
    assert found.startswith("corpus.kind=mix has no mixture of its own; give mixture= one of ")
    words = [f"corpus={mixed}", "mixture=folder", "target_len=256"]
    assert compose(PackConfig, "pack", words).corpus.name == "mix"


def test_the_experiments_model_is_not_hidden(tmp_path: Path) -> None:
    path = own_file(tmp_path, "x.yaml", OWN)
    (found,) = faults_of(TrainRoot, "train", f"experiment={path}", "model=tiny")
    assert found == (
        f"model=tiny, but experiment={path} names a model itself; leave one of them out, or set "
        "model.* by key"
    )


def test_sections_are_all_that_commands_have() -> None:
    """Without the commands' own; what only ``launch.init`` takes is no part of an experiment."""
    schemas = {field.name for root in ROOTS.values() for field in dataclasses.fields(root)}
    assert schemas == SECTIONS
    for name in ROOTS:
        assert "experiment" in read_groups(name), CONF_FOLDER / f"{name}.yaml"
