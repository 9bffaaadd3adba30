"""What starts a document is the tokenizer's rule, obeyed everywhere; its ids fit the model's."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.config import PackConfig
from data_prep.pack import pack
from launch import generate
from longrope2.config import DocumentStart, compose
from longrope2.corpora.haystacks import build_texts
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.tokenizer import (
    DocumentTokenizer,
    load_document_tokenizer,
    prepared_tokenizer,
    save_prepared_tokenizer,
    start_ids,
)
from longrope2.errors import ArtifactError, ConfigError, DataError
from longrope2.evaluation import config as evaluation_config
from longrope2.evaluation.needle_map import NeedleMapConfig, needle_map_tasks
from longrope2.evaluation.ruler.config import RulerConfig
from longrope2.evaluation.ruler.tasks import ruler_tasks
from longrope2.evaluation.scoring import context_windows, short_windows
from longrope2.inference import generation
from longrope2.inference.config import GenerateRoot
from longrope2.model.loading import load_tokenizer
from longrope2.search import prepare
from longrope2.search.config import SearchRoot
from longrope2.search.selftests import check_needle_labels
from longrope2.segments.format import SegmentStore
from longrope2.training.config import TrainRoot
from longrope2.training.plan import resolve_run

TINY = Path(__file__).parent.parent.parent / "models" / "tiny"
BOS, EOS = 1, 2
TEXT = "A word and another one. " * 400
AUTO, WITH_BOS, NONE = DocumentStart.auto, DocumentStart.bos, DocumentStart.none


def changed(folder: Path, **files: dict) -> Path:
    """The miniature with entries of its JSON files replaced, without sentencepiece's own file."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    for name, entries in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen: no BOS at all."""
    return changed(
        tmp_path_factory.mktemp("models") / "no_bos",
        tokenizer={"post_processor": None},
        tokenizer_config={"bos_token": None},
    )


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EOS is an added token whose id is the number of embeddings."""
    folder = changed(tmp_path_factory.mktemp("models") / "beyond")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    return folder


def test_auto_is_what_the_tokenizer_itself_does(tmp_path: Path, no_bos: Path) -> None:
    adds = load_tokenizer(TINY)
    names_it = load_tokenizer(changed(tmp_path / "x", tokenizer={"post_processor": None}))
    assert [start_ids(adds, rule) for rule in (AUTO, WITH_BOS, NONE)] == [[BOS], [BOS], []]
    assert [start_ids(names_it, rule) for rule in (AUTO, WITH_BOS, NONE)] == [[], [BOS], []]
    none = load_tokenizer(no_bos)
    assert [start_ids(none, rule) for rule in (AUTO, NONE)] == [[], []]
    with pytest.raises(DataError, match=r"model\.document_start=bos: .* names no BOS token"):
        start_ids(none, WITH_BOS)


def test_documents_without_bos(tmp_path: Path, no_bos: Path) -> None:
    encoder = load_document_tokenizer(no_bos)
    assert (encoder.bos_id, encoder.start_ids, encoder.num_boundary_tokens) == (None, [], 1)
    save_prepared_tokenizer(encoder, tmp_path / "prepared.json")
    for own in (encoder, prepared_tokenizer(tmp_path / "prepared.json")):
        (document,) = own.encode_documents(["one"])
        assert document.tolist() == [*own.encode("one"), EOS]
    # A BOS that starts nothing is a control id all the same.
    assert BOS in DocumentTokenizer(load_tokenizer(TINY), NONE).control_ids


def test_a_tokenizer_without_eos_is_refused_with_what_to_set(tmp_path: Path) -> None:
    folder = changed(tmp_path / "x", tokenizer_config={"eos_token": None})
    with pytest.raises(DataError, match=r"names no EOS token.*set eos_token in its tokenizer_conf"):
        load_document_tokenizer(folder)


def test_ids_that_the_model_does_not_embed(tmp_path: Path, beyond: Path) -> None:
    fault = r"highest id is 2048 \('<\|end\|>'\), the model embeds 2048 ids .* 0 to 2047; resize"
    with pytest.raises(DataError, match=fault):
        load_document_tokenizer(beyond)
    words = ["model=tiny", f"model.path={beyond}", "target_len=256", f"run.root={tmp_path}"]
    words += ["run.name=x"]
    sample = [*words, "corpus=sample"]
    with pytest.raises(DataError, match=fault):
        pack(compose(PackConfig, "pack", sample))
    with pytest.raises(ConfigError, match=fault):
        prepare.check(compose(SearchRoot, "search", sample))
    with pytest.raises(DataError, match=fault):
        evaluation_config.check(compose(evaluation_config.EvaluateRoot, "evaluate", sample))
    train = ["experiment=tiny_extend", "training.tokens=4096", *words, "rope=yarn"]
    with pytest.raises(DataError, match=fault):
        resolve_run(compose(TrainRoot, "train", train), 2)
    # More embeddings than ids are fine.
    config = json.loads((beyond / "config.json").read_text())
    padded = changed(tmp_path / "padded", config={**config, "vocab_size": 2112})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(beyond / name, padded / name)
    assert load_document_tokenizer(padded).eos_id == 2048


def test_segments_packed_under_another_rule_are_refused(tmp_path: Path) -> None:
    words = ["model=tiny", "target_len=256", f"run.root={tmp_path}"]
    quotas = ["modules={short: 3000, long: 3000}", "topics={short: 0, long: 0}"]
    words_of_pack = [f"quotas.stdlib_{quota}" for quota in quotas]
    words_of_pack += ["quotas.retrieval={short: 600, long: 600}", "corpus=sample", "run.name=none"]
    none = "model.document_start=none"
    folder = pack(compose(PackConfig, "pack", [*words, none, *words_of_pack]))
    details = SegmentStore(folder).manifest.details
    assert (details["bos_id"], details["document_start"]) == (None, "none")
    train = ["experiment=tiny_extend", "training.global_batch_tokens=512", "rope=yarn"]
    train += [*words[1:], "training.tokens=1024", "run.name=x", f"segments={folder}"]
    assert resolve_run(compose(TrainRoot, "train", [*train, none]), 2).total_steps == 2
    with pytest.raises(
        ArtifactError,
        match=r"none/1_segments: its documents start with nothing, with model\.document_start=auto "
        r"and this tokenizer they start with id 1; pack again, or set model\.document_start",
    ):
        resolve_run(compose(TrainRoot, "train", train), 2)


def test_needle_samples_without_bos() -> None:
    tokenizer = load_tokenizer(TINY)
    both = [
        build_needle_set(
            tokenizer, [TEXT], length=256, depths=[0.5], num_samples=3, seed=1, document_start=rule
        )
        for rule in (WITH_BOS, NONE)
    ]
    for with_bos, without in zip(both[0].samples, both[1].samples, strict=True):
        assert len(without.tokens) == 256 and not (without.tokens == BOS).any()
        assert without.tokens[:5].tolist() == with_bos.tokens[1:6].tolist()
        assert without.record["num_haystack_tokens"] == with_bos.record["num_haystack_tokens"] + 1
    encoder = DocumentTokenizer(tokenizer, NONE)
    check_needle_labels(both[1], 256, encoder.bos_id, encoder.decode)


def test_text_windows_without_bos() -> None:
    documents = [np.arange(100 * n, 100 * n + size) for n, size in ((1, 63), (2, 80), (3, 17))]
    windows = context_windows(documents, [16, 64], num_windows=2, num_scored=8, seed=0, num_start=0)
    for short, long in zip(windows[16], windows[64], strict=True):
        assert (len(short), len(long)) == (15, 63)
        assert short.tolist() == long[-15:].tolist() and (np.diff(long) == 1).all()
    pieces = short_windows(documents, 16, num_windows=13, seed=0, num_start=0)
    assert all(2 <= len(piece) <= 15 for piece in pieces)
    tokens = sorted(token for piece in pieces for token in piece.tolist())
    # 63 = 4 * 15 + 3, 80 = 5 * 15 + 5, 17 = 15 + 2: every token once, and none is added.
    assert tokens == sorted(np.concatenate(documents).tolist())
    for rule, start in ((WITH_BOS, [1]), (NONE, [])):
        tokenizer = load_tokenizer(TINY)
        given = {"length": 20, "num_samples": 1, "seed": 0, "document_start": rule}
        (text,) = build_texts(tokenizer, [TEXT], **given)
        assert len(text) == 20 and text[: len(start)].tolist() == start
        assert (text[len(start) :] != 1).all()


def test_prompts_of_ruler_and_the_needle_map_without_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    ruler = RulerConfig(tasks=["niah_single_1"], num_samples=1)
    the_map = NeedleMapConfig(depths=[0.5], repeats=1)
    for rule in (WITH_BOS, NONE):
        options = {"cache_folder": tmp_path / rule.value, "document_start": rule}
        tasks = ruler_tasks(ruler, tokenizer, [TEXT], [1024], **options)
        tasks += needle_map_tasks(the_map, tokenizer, [TEXT], [512], **options)
        for task in tasks:
            prompt = task.samples[0].prompt_T
            assert (prompt == BOS).sum() == (rule is WITH_BOS)


def test_generation_starts_as_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        generation, "generate_tokens", lambda model, ids, **options: given.append(ids) or iter(())
    )
    model = SimpleNamespace(
        factors=SimpleNamespace(geometry=SimpleNamespace(original_len=128), target_len=256)
    )
    for rule in ("auto", "none"):
        words = ["model=tiny", "target_len=256", "run.name=x", "generate.prompt_file=p"]
        words += [f"model.document_start={rule}"]
        config = compose(GenerateRoot, "generate", words)
        generate._stream_text(model, load_tokenizer(TINY), "import os", config)
    with_bos, without = given
    assert with_bos == [BOS, *without] and BOS not in without
