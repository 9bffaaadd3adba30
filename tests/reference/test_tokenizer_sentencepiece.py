"""The miniature's tokenizer: both forms give the same ids, and text comes back exactly."""

import pytest
import sentencepiece
from transformers import AutoTokenizer

from longrope2.corpora.corpus import Split
from longrope2.corpora.needle_wording import ADJECTIVES, NOUNS
from longrope2.corpora.sample import SampleCorpus
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError

NASTY = [
    "a\tb\r\n  c", "</s> <s> <unk>", "日本語 é ü 😀\u200b \x00 \x7f", "   lead", "trail   ",
    "\n\n\n", "x" * 300, " " * 77, "12345 67\t8", " \n \n  ", "a  b   c    d     e      f", "", " ",
    "def f(x):\n\treturn  x\n", "<0x0A>", "é" * 50,
]  # fmt: skip


@pytest.fixture(scope="module")
def hugging_face():
    return AutoTokenizer.from_pretrained("models/tiny")


@pytest.fixture(scope="module")
def encoder(hugging_face):
    return DocumentTokenizer(hugging_face)


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file="models/tiny/tokenizer.model")


@pytest.mark.slow
def test_ids_and_round_trip_on_the_sample_corpus(encoder, processor):
    texts = [d.text for split in Split for d in SampleCorpus().documents(split)] + NASTY
    for text, ids in zip(texts, encoder.encode_documents(texts), strict=True):
        assert ids[0] == encoder.bos_id and ids[-1] == encoder.eos_id
        assert ids[1:-1].tolist() == processor.encode(text), text[:80]
        assert encoder.decode(ids[1:-1]) == text


@pytest.mark.parametrize("text", ["</s>", "<s>", "a</s>b", "<unk>", "</s><s></s>"])
def test_control_text_never_becomes_a_control_id(encoder, hugging_face, text):
    assert hugging_face.encode(text, add_special_tokens=False) != encoder.encode(
        text
    )  # plain use does inject
    ids = encoder.encode(text)
    assert not {0, 1, 2} & set(ids) and encoder.decode(ids) == text
    # The private copy did not change the caller's tokenizer.
    assert hugging_face.encode("</s>", add_special_tokens=False) == [2]


def test_plain_auto_tokenizer(hugging_face):
    assert (hugging_face.unk_token_id, hugging_face.bos_token_id, hugging_face.eos_token_id) == (
        0,
        1,
        2,
    )
    assert len(hugging_face) == 2048
    assert hugging_face("some text").input_ids[0] == 1
    ids = hugging_face("def f(x):\n    return  x", add_special_tokens=False).input_ids
    assert hugging_face.decode(ids) == "def f(x):\n    return  x"


def test_needle_words_and_digits(processor):
    assert all(len(processor.encode(f" {word}")) == 1 for word in ADJECTIVES)
    assert all(len(processor.encode(f"-{word}")) == 2 for word in NOUNS)
    assert processor.encode("90210", out_type=str) == list("90210")


def test_token_spans_cut_text_exactly(encoder):
    text = "def f(x):\n    return 'é日本'  # 😀\n"
    [spans] = encoder.token_spans([text])
    assert len(spans) == len(encoder.encode(text)) == encoder.count_tokens([text])[0]
    ascii_spans = encoder.token_spans(["plain text, 42 words\n"])[0]
    assert (
        "".join("plain text, 42 words\n"[a:b] for a, b in ascii_spans) == "plain text, 42 words\n"
    )


def test_tokenizers_that_cannot_be_used(hugging_face, tmp_path):
    from longrope2.corpora.tokenizer import load_document_tokenizer

    with pytest.raises(DataError, match="holds no tokenizer that can be loaded"):
        load_document_tokenizer(tmp_path)
    hugging_face.save_pretrained(tmp_path)
    without_eos = AutoTokenizer.from_pretrained(tmp_path)
    without_eos.eos_token = None
    with pytest.raises(
        DataError, match="names no EOS token, which ends every document; set eos_token"
    ):
        DocumentTokenizer(without_eos)


def test_text_that_becomes_a_control_id_is_refused(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(
        ["STOP"], special_tokens=False
    )  # matched in text even with encode_special_tokens
    other.eos_token = "STOP"
    encoder = DocumentTokenizer(other)
    encoder.eos_id = other.convert_tokens_to_ids("STOP")
    encoder._is_control[encoder.eos_id] = True
    with pytest.raises(DataError, match="produced the control id"):
        encoder.encode_documents(["please STOP here"])


def test_training_is_deterministic(tmp_path):
    from data_prep.train_tokenizer import hugging_face_tokenizer_json, train_sentencepiece

    lines = [d.text for d in list(SampleCorpus().documents(Split.train))[:15]]
    sentences = [line for text in lines for line in text.splitlines()]
    models = [train_sentencepiece(iter(sentences), 600) for _ in range(2)]
    assert models[0] == models[1]
    assert hugging_face_tokenizer_json(models[0]) == hugging_face_tokenizer_json(models[1])
