"""Generation against transformers that reads the whole sequence anew for every token.

The reference model carries a longrope config, so transformers itself picks the factors by length.
"""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longrope2.inference.generation import generate_tokens
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import to_hf_config

ORIGINAL_LEN, TARGET_LEN = 16, 64
GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN)
FACTORS = RescaleFactors(
    factors=tuple(4.0 ** (i / 5) if i < 5 else 4.0 + 0.3 * i for i in range(8)),
    geometry=GEOMETRY,
    target_len=TARGET_LEN,
    method="longrope2",
)


def random_llama(**rope_config):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        **rope_config,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windowed_model():
    rope_parameters = {"rope_type": "default", "rope_theta": GEOMETRY.rope_base}
    return WindowedModel(
        random_llama(max_position_embeddings=ORIGINAL_LEN, rope_parameters=rope_parameters), FACTORS
    )


@pytest.fixture(scope="module")
def longrope_model():
    return random_llama(**to_hf_config(FACTORS))


@torch.inference_mode()
def generate_without_cache(model, prompt_ids, num_tokens):
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize(
    "prompt_len", [ORIGINAL_LEN + extra for extra in (-10, -2, -1, 0, 1, ORIGINAL_LEN)]
)
def test_tokens_equal_generation_without_cache(windowed_model, longrope_model, prompt_len):
    prompt_ids = torch.randint(
        97, (prompt_len,), generator=torch.Generator().manual_seed(prompt_len)
    ).tolist()
    tokens = list(generate_tokens(windowed_model, prompt_ids, max_new_tokens=20))
    assert [token.token_id for token in tokens] == generate_without_cache(
        longrope_model, prompt_ids, 20
    )
    num_short = max(ORIGINAL_LEN - prompt_len + 1, 0)
    assert [token.window for token in tokens] == [Window.SHORT] * num_short + [Window.LONG] * (
        20 - num_short
    )


def test_reference_can_tell_a_stale_cache(windowed_model, longrope_model):
    """Keeping the cached keys at the switch gives other tokens: the test above has teeth."""
    ids = list(range(1, ORIGINAL_LEN))
    exact = generate_without_cache(longrope_model, ids, 20)
    cache, prompt_len = DynamicCache(), len(ids)
    with torch.inference_mode():
        for _ in range(20):
            windowed_model.use_window(Window.SHORT if len(ids) <= ORIGINAL_LEN else Window.LONG)
            new_ids = torch.tensor([ids[cache.get_seq_length() :]])
            ids.append(
                int(
                    windowed_model.hf(input_ids=new_ids, past_key_values=cache)
                    .logits[0, -1]
                    .argmax()
                )
            )
    assert ids[prompt_len : prompt_len + 2] == exact[:2]
    assert ids[prompt_len:] != exact
