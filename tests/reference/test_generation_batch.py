"""Batched generation against transformers that reads each sequence anew for every token."""

from dataclasses import replace

import pytest
import torch
from test_generation import FACTORS, ORIGINAL_LEN, generate_without_cache, random_llama
from transformers import DynamicCache

from longrope2.inference.batch import generate_batch
from longrope2.inference.cache import join_caches, next_logits, prefill, rerotate_keys
from longrope2.inference.config import KvPolicy
from longrope2.inference.generation import GeneratedToken, generate_tokens
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window
from longrope2.rope.hf_config import to_hf_config

LENGTHS = (
    ORIGINAL_LEN - 2,
    2 * ORIGINAL_LEN,
    ORIGINAL_LEN,
    3,
    ORIGINAL_LEN - 1,
    ORIGINAL_LEN + 1,
    33,
    9,
)
NEW_TOKENS = (20, 12, 20, 30, 1, 20, 25, 7)


def random_ids(length, seed=0):
    return torch.randint(
        97, (length,), generator=torch.Generator().manual_seed(100 * seed + length)
    ).tolist()


@pytest.fixture(scope="module")
def model():
    rope_parameters = {"rope_type": "default", "rope_theta": FACTORS.geometry.rope_base}
    return WindowedModel(
        random_llama(max_position_embeddings=ORIGINAL_LEN, rope_parameters=rope_parameters), FACTORS
    )


@pytest.fixture(scope="module")
def expected():
    """The new tokens of each prompt, by plain transformers."""
    longrope_model = random_llama(**to_hf_config(FACTORS))
    return [
        generate_without_cache(longrope_model, random_ids(n), new)
        for n, new in zip(LENGTHS, NEW_TOKENS, strict=True)
    ]


def ids_of(rows):
    return [[token.token_id for token in row] for row in rows]


@pytest.mark.parametrize(
    "prefill_chunk", [None, pytest.param(1, marks=pytest.mark.slow), 5, ORIGINAL_LEN]
)
@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_mixed_lengths_equal_generation_without_cache(model, expected, max_rows, prefill_chunk):
    prompts = [random_ids(length) for length in LENGTHS]
    options = {"max_new_tokens": NEW_TOKENS, "prefill_chunk": prefill_chunk, "max_rows": max_rows}
    rows = generate_batch(model, prompts, **options)
    assert ids_of(rows) == expected
    for length, row in zip(LENGTHS, rows, strict=True):
        num_short = min(max(ORIGINAL_LEN - length + 1, 0), len(row))
        assert [token.window for token in row] == [Window.SHORT] * num_short + [Window.LONG] * (
            len(row) - num_short
        )


@pytest.mark.parametrize("prefill_chunk", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_streamed_tokens_in_chunks_equal_generation_without_cache(model, expected, prefill_chunk):
    for length, new, wanted in zip(LENGTHS, NEW_TOKENS, expected, strict=True):
        tokens = list(
            generate_tokens(
                model, random_ids(length), max_new_tokens=new, prefill_chunk=prefill_chunk
            )
        )
        assert [token.token_id for token in tokens] == wanted


def test_a_stop_token_ends_its_own_row_only(model, expected):
    prompts = [random_ids(length) for length in LENGTHS]
    stop = expected[0][5]
    rows = generate_batch(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids={stop})
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert ids_of(rows) == cut
    assert cut[0] != expected[0]


def test_one_row_at_a_time_is_bit_for_bit_the_stream(model):
    """Logits, not tokens: what max_rows=1 computes is what generate_tokens computes."""
    seen = {"batch": [], "stream": []}
    for name in seen:
        hook = model.hf.lm_head.register_forward_hook(
            lambda *args, name=name: seen[name].append(args[2].clone())
        )
        if name == "batch":
            generate_batch(model, [random_ids(14)], max_new_tokens=10, max_rows=1)
        else:
            list(generate_tokens(model, random_ids(14), max_new_tokens=10))
        hook.remove()
    assert len(seen["batch"]) == 10
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


@pytest.mark.parametrize("window", list(Window))
def test_logits_of_a_padded_row_are_those_of_the_row_alone(model, window):
    """The padding holds anything: here keys of the other rows' tokens would show at once."""
    lengths = (4, 30, 17, 11)
    alone, caches = [], []
    for seed, length in enumerate(lengths):
        _, cache = prefill(model, random_ids(length, seed), window, None)
        alone.append(next_logits(model, torch.tensor([[7]]), cache, window)[0])
        caches.append(prefill(model, random_ids(length, seed), window, None)[1])
    joined, first_key_B = join_caches(caches)
    assert first_key_B.tolist() == [26, 0, 13, 19]
    for layer in joined.layers:
        for row, padding in enumerate(first_key_B):
            layer.keys[row, :, :padding] = 1e3
            layer.values[row, :, :padding] = -1e3
    positions_B1 = torch.tensor(lengths)[:, None]
    tokens_B1 = torch.full((4, 1), 7)
    found_BV = next_logits(model, tokens_B1, joined, window, positions_B1, first_key_B)
    expected_BV = torch.stack(alone)
    assert (found_BV - expected_BV).abs().max() < 3e-6 * expected_BV.abs().max()


def test_rerotated_keys_are_exact_in_the_first_layer_only(model):
    ids = random_ids(ORIGINAL_LEN)
    _, rerotated = prefill(model, ids, Window.SHORT, None)
    _, exact = prefill(model, ids, Window.LONG, None)
    _, before = prefill(model, ids, Window.SHORT, None)
    rerotate_keys(rerotated, FACTORS)
    differences = [
        float((a.keys - b.keys).abs().max() / b.keys.abs().max())
        for a, b in zip(rerotated.layers, exact.layers, strict=True)
    ]
    assert differences[0] < 1e-6 and min(differences[1:]) > 1e-2
    assert (before.layers[0].keys - exact.layers[0].keys).abs().max() > 0.1
    assert torch.equal(rerotated.layers[0].values, exact.layers[0].values)


def rerotating_reference(model, prompt_ids, num_tokens):
    """The approximate policy written out: one cache, turned once at the crossing."""
    ids, cache, window = list(prompt_ids), DynamicCache(), Window.SHORT
    for _ in range(num_tokens):
        if window is Window.SHORT and len(ids) > ORIGINAL_LEN:
            rerotate_keys(cache, FACTORS)
            window = Window.LONG
        new_ids = torch.tensor([ids[cache.get_seq_length() :]])
        ids.append(int(next_logits(model, new_ids, cache, window)[0].argmax()))
    return ids[len(prompt_ids) :]


@pytest.mark.slow
def test_rerotation_in_batches_equals_one_by_one_and_differs_from_the_exact_policy(model, expected):
    prompts = [random_ids(length) for length in LENGTHS]
    options = {"max_new_tokens": NEW_TOKENS, "kv_policy": KvPolicy.rerotate}
    crossing = [
        n
        for n, (length, new) in enumerate(zip(LENGTHS, NEW_TOKENS, strict=True))
        if length <= ORIGINAL_LEN < length + new - 1
    ]
    assert len(crossing) == 3
    rows = ids_of(generate_batch(model, prompts, **options))
    for number, prompt_ids in enumerate(prompts):
        stream = generate_tokens(
            model, prompt_ids, max_new_tokens=NEW_TOKENS[number], kv_policy=KvPolicy.rerotate
        )
        assert rows[number] == [token.token_id for token in stream]
        wanted = (
            rerotating_reference(model, prompt_ids, NEW_TOKENS[number])
            if number in crossing
            else expected[number]
        )
        assert rows[number] == wanted
    assert [rows[n] for n in crossing] != [expected[n] for n in crossing]


def test_rerotation_respects_rotated_part_and_attention_scales():
    """Both scales, and channels that are not rotated, against keys rotated in float64."""
    factors = replace(FACTORS, short_attention_scale=1.25, long_attention_scale=0.8)
    torch.manual_seed(5)
    unrotated_C = torch.randn(1, 2, 12, 24, dtype=torch.float64)

    def rotated(window):
        table_I = factors.inverse_frequencies(window)
        angles_CI = (torch.arange(12.0)[:, None] * table_I).double()
        turn_CI = torch.polar(
            torch.full_like(angles_CI, factors.attention_scale(window)), angles_CI
        )
        pairs = torch.complex(unrotated_C[..., :8], unrotated_C[..., 8:16]) * turn_CI
        return torch.cat((pairs.real, pairs.imag, unrotated_C[..., 16:]), dim=-1).float()

    cache = DynamicCache([(rotated(Window.SHORT), rotated(Window.SHORT))])
    rerotate_keys(cache, factors)
    assert (cache.layers[0].keys - rotated(Window.LONG)).abs().max() < 1e-6
    assert torch.equal(cache.layers[0].values, rotated(Window.SHORT))


def test_no_prompt_no_output(model):
    assert generate_batch(model, [], max_new_tokens=3) == []
    row = generate_batch(model, [[1, 2]], max_new_tokens=1)[0]
    assert row == [GeneratedToken(row[0].token_id, Window.SHORT)]
