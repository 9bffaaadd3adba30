"""Ids of an exported tokenizer, as plain transformers calls it, against those of the training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_level_tokenizer import save_llama3_style
from transformers import AutoTokenizer

from longrope2.config import DocumentStart
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.errors import ArtifactError
from longrope2.export import tokenizer as exported_tokenizer
from longrope2.export.gguf_file import write_gguf
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.tokenizer import start_as_trained
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

TINY = Path(__file__).parents[2] / "models" / "tiny"
FACTORS = closed_form_factors(RopeMethod.ntk, RopeGeometry(32, 10_000.0, 128), 256)
TEXTS = ["A word and another one.", "import os\n", " x"]
BOS, EOS = 1, 2
Rule = DocumentStart


def model(folder: Path, *, adds_bos: bool) -> Path:
    """The miniature; or one whose tokenizer names a BOS that it does not add, as SmolLM2."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    if not adds_bos:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    return folder


def exported(folder: Path, source: Path, rule: Rule) -> Path:
    write_hugging_face_folder(source, FACTORS, folder, torch.float32)
    start_as_trained(folder, rule)
    return folder


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("rule", list(Rule))
def test_texts_start_as_documents_did(tmp_path: Path, rule: Rule, adds_bos: bool) -> None:
    source = model(tmp_path / "model", adds_bos=adds_bos)
    trained = load_document_tokenizer(source, rule)
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path / "export", source, rule))
    documents = [ids.tolist() for ids in trained.encode_documents(TEXTS)]
    assert [[*theirs(text).input_ids, EOS] for text in TEXTS] == documents
    starts = BOS if rule is Rule.bos or (rule is Rule.auto and adds_bos) else None
    assert all((ids[0] == BOS) == (starts == BOS) for ids in documents)
    again = tmp_path / "again"  # what a user saves once more stays so
    theirs.save_pretrained(again)
    assert [AutoTokenizer.from_pretrained(again)(text).input_ids for text in TEXTS] == [
        ids[:-1] for ids in documents
    ]


def test_an_export_by_the_tokenizers_own_rule_is_untouched(tmp_path: Path) -> None:
    for rule in (Rule.auto, Rule.bos):
        folder = exported(tmp_path / rule.value, TINY, rule)
        assert (folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("rule", [Rule.none, Rule.auto])
def test_gguf_says_the_same(tmp_path: Path, rule: Rule) -> None:
    import gguf

    folder = exported(tmp_path / "export", TINY, rule)
    write_gguf(folder, FACTORS, tmp_path / "model.gguf", name="tiny")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = fields["tokenizer.ggml.add_bos_token"].contents()
    assert found is (rule is Rule.auto)


def test_a_tokenizer_that_cannot_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_tokenizer, "_write", lambda path, content: None)
    with pytest.raises(ArtifactError, match=r"model\.document_start=none, and .* post_processor"):
        exported(tmp_path / "export", TINY, Rule.none)


def test_a_tokenizer_saved_by_transformers_5_is_written_for_older_ones_too(tmp_path: Path) -> None:
    """The class and the names that both know; read back by this transformers unchanged."""
    saved = AutoTokenizer.from_pretrained(save_llama3_style(tmp_path / "made"))
    saved.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    source = tmp_path / "model"
    shutil.copytree(TINY, source, ignore=shutil.ignore_patterns("token*"))
    saved.save_pretrained(source)
    before = json.loads((source / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    folder = exported(tmp_path / "export", source, Rule.auto)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {
        "additional_special_tokens": ["<one>", "<two>"],
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.get_added_vocab() == saved.get_added_vocab()
    assert theirs.chat_template == saved.chat_template
    for text in (*TEXTS, "x<one> <two>y<|eot_id|>"):
        assert theirs(text).input_ids == saved(text).input_ids
    skipped = theirs.decode(theirs("a<one>b").input_ids, skip_special_tokens=True)
    assert skipped == saved.decode(saved("a<one>b").input_ids, skip_special_tokens=True) == "ab"
