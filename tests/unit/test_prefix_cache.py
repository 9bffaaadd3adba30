"""Reading a common beginning of prompts once gives, bit for bit, what reading it anew gives."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longrope2.evaluation import answering
from longrope2.evaluation.answering import PrefixDecoder
from longrope2.evaluation.samples import Sample
from longrope2.inference.generation import generate_tokens
from longrope2.model.windowed import WindowedModel
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=16)
CHUNK = 4


def make_model(seed=0, method=RopeMethod.ntk):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=16,
    )
    return WindowedModel(LlamaForCausalLM(config).eval(), closed_form_factors(method, GEOMETRY, 64))


def sample(*parts):
    return Sample(np.concatenate([np.asarray(part) for part in parts]).astype(np.int32), (), 5)


@pytest.fixture
def logits(monkeypatch):
    """Logits of every forward pass."""
    seen, real = [], answering.next_logits

    def spy(model, tokens, cache, window):
        seen.append((tokens.shape[1], real(model, tokens, cache, window)))
        return seen[-1][1]

    monkeypatch.setattr(answering, "next_logits", spy)
    return seen


def test_answers_and_logits_are_those_of_a_decoder_that_forgets(logits):
    rng, model = np.random.default_rng(0), make_model()
    opening = rng.integers(8, 61, 30)
    samples = [sample(opening, rng.integers(8, 61, n)) for n in (3, 9, 1)] + [
        sample(opening[:20]),
        sample(opening),
    ]
    kept, forgetting = PrefixDecoder(CHUNK), PrefixDecoder(CHUNK)
    for number, item in enumerate(samples):
        logits.clear()
        answer = kept(model, [item], ())
        with_cache = [row for _, row in logits][
            -5:
        ]  # the last chunk of the prompt and the new tokens
        assert sum(n for n, _ in logits) < len(item.prompt_T) or number == 0
        logits.clear()
        forgetting.forget()
        assert answer == forgetting(model, [item], ())
        assert all(
            torch.equal(a, b)
            for a, b in zip(with_cache, [row for _, row in logits][-5:], strict=True)
        )
        plain = generate_tokens(
            model, item.prompt_T.tolist(), max_new_tokens=5, prefill_chunk=CHUNK
        )
        assert answer == [[token.token_id for token in plain]]
    # 30 in common: 7 chunks; then 30 again; then the whole of the 20 but its last token; then those
    # 20.
    assert kept.num_reused == 28 + 28 + 16 + 20 and forgetting.num_reused == 0


def test_other_weights_tables_and_windows_start_anew():
    rng, model = np.random.default_rng(1), make_model()
    long_one, short_one = sample(rng.integers(8, 61, 30)), sample(rng.integers(8, 61, 10))
    crossing = sample(short_one.prompt_T, [9, 9, 9])
    decoder = PrefixDecoder(CHUNK)
    decoder(model, [long_one], ())
    for other in (
        make_model(seed=1),
        make_model(),
    ):  # other weights, and equal ones in another object
        decoder(other, [long_one], ())
        assert decoder.num_reused == 0
    model = make_model()
    decoder(model, [long_one], ())
    model.set_factors(closed_form_factors(RopeMethod.pi, GEOMETRY, 64))
    expected = PrefixDecoder(CHUNK)(model, [long_one], ())
    assert decoder(model, [long_one], ()) == expected and decoder.num_reused == 0
    decoder(model, [short_one], ())
    assert decoder.num_reused == 0  # nothing in common, and another window
    plain = generate_tokens(
        model, crossing.prompt_T.tolist(), max_new_tokens=5, prefill_chunk=CHUNK
    )
    assert decoder(model, [crossing], ()) == [[token.token_id for token in plain]]
    assert decoder.num_reused == 0  # it outgrows L0 on the way


def test_a_stop_id_ends_an_answer_and_is_kept():
    model, item = make_model(), sample(range(8, 40))
    ((first, second, *_),) = PrefixDecoder(CHUNK)(model, [item], ())
    assert PrefixDecoder(CHUNK)(model, [item], {second}) == [
        [first, second] if first != second else [first]
    ]


def test_a_failure_frees_the_cache(monkeypatch):
    decoder, model, item = PrefixDecoder(CHUNK), make_model(), sample(range(8, 40))
    decoder(model, [item], ())
    assert isinstance(decoder._cache, DynamicCache)

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answering, "next_logits", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(model, [sample(range(8, 41))], ())
    assert decoder._cache is None
