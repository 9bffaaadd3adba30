"""Tokenizer keys of GGUF files, against transformers' tokens and llama.cpp's defaults.

That the program itself makes these tokens of these keys: ``test_engine_llama_cpp.py``.
"""

import json
import shutil
from pathlib import Path

import pytest
from byte_level_tokenizer import LLAMA3_PATTERN, save_llama3_style
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from longrope2.errors import ArtifactError
from longrope2.export.gguf_vocabulary import AWKWARD_TEXTS, check_read_back, tokenizer_keys
from longrope2.export.llama_cpp_tokens import SPLITTINGS, LlamaCppTokenizer, TokenKind

TINY = Path(__file__).parents[2] / "models" / "tiny"
PRE = "tokenizer.ggml.pre"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return save_llama3_style(tmp_path_factory.mktemp("llama3"))


def size_of(folder):
    return len(AutoTokenizer.from_pretrained(folder)) + 3  # an embedding with spare rows


@pytest.fixture(params=["miniature", "llama3"])
def folder(request, llama3):
    return TINY if request.param == "miniature" else llama3


def test_sixteen_awkward_texts_are_read_as_by_transformers(folder):
    assert len(AWKWARD_TEXTS) == len(set(AWKWARD_TEXTS)) == 16
    keys = tokenizer_keys(folder, size_of(folder))
    ours, theirs = LlamaCppTokenizer(keys), AutoTokenizer.from_pretrained(folder)
    for text in AWKWARD_TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special=False) == bare and bare


def test_every_key_that_llama_cpp_would_default_is_written(folder):
    keys = tokenizer_keys(folder, size_of(folder))
    for name in (
        "add_space_prefix", "remove_extra_whitespaces", "add_bos_token", "add_eos_token",
        "add_sep_token", "bos_token_id", "eos_token_id", "eot_token_id",
    ):  # fmt: skip
        assert f"tokenizer.ggml.{name}" in keys
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys.get("tokenizer.chat_template") == tokenizer.chat_template


def test_the_space_in_front_is_what_the_miniature_lost_to_the_default():
    """348 is the piece with a space in front, 1964 the one without."""
    keys = tokenizer_keys(TINY, 2048)
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert LlamaCppTokenizer(keys).encode("a") == [1, 1964]
    del keys["tokenizer.ggml.add_space_prefix"]
    assert LlamaCppTokenizer(keys).encode("a") == [1, 348]
    with pytest.raises(
        ArtifactError, match=r"llama\.cpp would read 'a' as \[1, 348\], .* \[1, 1964\]; nothing"
    ):
        check_read_back(keys, TINY, Path("model.gguf"))


def test_scores_follow_the_merges_as_sentencepiece_scores_do():
    """Pieces by their place among the merges and by their own score: the same order."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    scores = tokenizer_keys(TINY, 2048)["tokenizer.ggml.scores"]
    merged = [n for n in range(2048) if scores[n] != min(scores)]
    assert len(merged) > 1000
    by_theirs = sorted(merged, key=model.get_score)
    assert sorted(merged, key=scores.__getitem__) == by_theirs


def test_kinds_of_tokens():
    keys = tokenizer_keys(TINY, 2050)
    kinds, tokens = keys["tokenizer.ggml.token_type"], keys["tokenizer.ggml.tokens"]
    assert kinds[:3] == [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL]
    assert kinds[tokens.index("<0x0A>")] == TokenKind.BYTE and kinds.count(TokenKind.BYTE) == 256
    assert tokens[2048:] == ["[PAD2048]", "[PAD2049]"]
    assert kinds[2048:] == [TokenKind.UNUSED] * 2


def test_the_splitting_is_found(llama3, tmp_path):
    assert tokenizer_keys(llama3, size_of(llama3))[PRE] == "llama-bpe"

    def digits_alone(fields):
        fields["model"]["ignore_merges"] = False
        split = fields["pre_tokenizer"]["pretokenizers"][0]
        assert split["pattern"]["Regex"] == LLAMA3_PATTERN
        split["pattern"]["Regex"] = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

    other = changed(llama3, tmp_path / "other", digits_alone)
    assert tokenizer_keys(other, size_of(other))[PRE] == "qwen2"


def test_a_wrong_splitting_is_refused_with_the_text_that_tells(llama3):
    known = ", ".join(SPLITTINGS)
    told = r"would read .def f.* with export\.gguf_pretokenizer=gpt-2, the model's"
    with pytest.raises(ArtifactError, match=told):
        tokenizer_keys(llama3, size_of(llama3), "gpt-2")
    with pytest.raises(ArtifactError, match=f"gguf_pretokenizer=dbrx is not one .* are {known}"):
        tokenizer_keys(llama3, size_of(llama3), "dbrx")
    with pytest.raises(ArtifactError, match="is for byte-level BPE tokenizers; .* leave it out"):
        tokenizer_keys(TINY, 2048, "smollm")


def changed(source, folder, change):
    """A copy of a tokenizer with its tokenizer.json changed."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.model"))
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    return folder


def lowercased(fields):
    fields["normalizer"] = {"type": "Lowercase"}


def without_bytes(fields):
    vocab = fields["model"]["vocab"]
    vocab["<gone>"] = vocab.pop("<0x00>")


def split_by_words(fields):
    fields["pre_tokenizer"] = {"type": "Whitespace"}


def framed(fields):
    template = fields["post_processor"]
    template["single"] = [template["single"][0], *template["single"]]


REFUSALS = {
    "none fits": ("llama3", lowercased, r"none of llama\.cpp's splittings known here \(llama-bpe"),
    "another text": ("tiny", lowercased, r"would read .Hello world, it.* nothing was exported"),
    "no bytes": ("tiny", without_bytes, r"neither SentencePiece's byte tokens .* nor a byte-level"),
    "words": ("llama3", split_by_words, r"neither SentencePiece's byte tokens .* nor a byte-level"),
    "two BOS": (
        "tiny",
        framed,
        r"makes \[1, 1, 1964\] of a text whose tokens are \[1964\]; .*else",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_tokenizers_that_llama_cpp_cannot_be(name, llama3, tmp_path):
    source, change, message = REFUSALS[name]
    folder = changed(llama3 if source == "llama3" else TINY, tmp_path / "t", change)
    with pytest.raises(ArtifactError, match=message):
        tokenizer_keys(folder, size_of(folder))


def test_other_kinds_are_named(tmp_path):
    def words(fields):
        fields["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 3}, "unk_token": "<unk>"}

    folder = changed(TINY, tmp_path / "t", words)
    with pytest.raises(ArtifactError, match="WordLevel tokenizers are not supported, BPE ones are"):
        tokenizer_keys(folder, 10)


def test_a_token_that_stands_twice_is_refused(tmp_path):
    def doubled(fields):
        token = fields["added_tokens"][-1]
        fields["added_tokens"].append(token | {"id": 2048, "content": "[PAD2049]"})

    folder = changed(TINY, tmp_path / "t", doubled)
    with pytest.raises(ArtifactError, match=r"'\[PAD2049\]' has the ids 2048 and 2049"):
        tokenizer_keys(folder, 2050)


def test_a_second_token_that_ends_a_generation(llama3, tmp_path):
    """Llama 3's chats end with another token than its texts; by default llama.cpp goes by names."""
    end, turn_end = (
        Tokenizer.from_file(str(llama3 / "tokenizer.json")).token_to_id(token)
        for token in ("<|end_of_text|>", "<|eot_id|>")
    )
    folder = changed(llama3, tmp_path / "t", lambda fields: None)
    for given, expected in (([end, turn_end], turn_end), ([end], end), (end, end)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        keys = tokenizer_keys(folder, size_of(folder))
        assert keys["tokenizer.ggml.eos_token_id"] == end
        assert keys["tokenizer.ggml.eot_token_id"] == expected


def test_added_tokens_around_which_blanks_are_read_otherwise_are_noted(tmp_path):
    """``rstrip`` of an added token is not known to GGUF."""

    def added(fields):
        token = {"id": 2048, "content": "<|user|>", "special": True, "rstrip": True}
        token |= {"single_word": False, "lstrip": False, "normalized": False}
        fields["added_tokens"].append(token)

    folder = changed(TINY, tmp_path / "t", added)
    size = size_of(folder)
    (note,) = check_read_back(tokenizer_keys(folder, size), folder, Path("model.gguf"))
    assert "model.gguf: llama.cpp reads blanks around <|user|> inside a text otherwise" in note
    assert check_read_back(tokenizer_keys(TINY, 2048), TINY, Path("model.gguf")) == []
