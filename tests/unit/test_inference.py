"""Generation's limits and stops, sampling, and streaming text."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch import generate
from longrope2.config import compose
from longrope2.errors import DataError
from longrope2.inference.batch import generate_batch
from longrope2.inference.config import GenerateRoot, settings_faults
from longrope2.inference.generation import TextStream, generate_tokens, window_for_length
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ORIGINAL_LEN, TARGET_LEN = 16, 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=ORIGINAL_LEN,
    )
    geometry = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN)
    return WindowedModel(
        LlamaForCausalLM(config).eval(), closed_form_factors(RopeMethod.pi, geometry, TARGET_LEN)
    )


def token_ids(model, prompt_ids, **options):
    return [token.token_id for token in generate_tokens(model, prompt_ids, **options)]


def test_window_changes_after_exactly_the_original_length():
    assert [window_for_length(n, 128) for n in (1, 127, 128, 129)] == [Window.SHORT] * 3 + [
        Window.LONG
    ]


def test_stop_token_ends_the_text_and_is_yielded(model):
    free = token_ids(model, [1, 2, 3], max_new_tokens=12)
    stop = free[4]
    stopped = token_ids(model, [1, 2, 3], max_new_tokens=12, stop_ids={stop})
    assert stopped == free[: free.index(stop) + 1]
    assert len(free) == 12


def test_the_last_token_may_fill_the_target_window_but_not_exceed_it(model):
    assert len(token_ids(model, [5] * (TARGET_LEN - 2), max_new_tokens=2)) == 2
    with pytest.raises(
        DataError,
        match=r"62 tokens and generate\.max_new_tokens=3 exceed .* 64 tokens; .* at most 2$",
    ):
        generate_tokens(model, [5] * (TARGET_LEN - 2), max_new_tokens=3)


def test_bad_requests_are_refused_at_the_call(model):
    with pytest.raises(DataError, match="the prompt has no tokens"):
        generate_tokens(model, [], max_new_tokens=1)
    with pytest.raises(DataError, match=r"generate\.prefill_chunk=0 must be at least 1, or null"):
        generate_tokens(model, [1], max_new_tokens=1, prefill_chunk=0)
    with pytest.raises(DataError, match=r"generate\.temperature=-0\.5 is below 0"):
        generate_tokens(model, [1], max_new_tokens=1, temperature=-0.5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {"max_new_tokens": 2}, "prompt 1 has no tokens"),
        (
            [[1], [5] * 60],
            {"max_new_tokens": [60, 5]},
            r"prompt 1's 60 tokens and .*=5 exceed .* 64 tokens; .* at most 4$",
        ),
        ([[1], [2]], {"max_new_tokens": [3]}, "max_new_tokens has 1 values for 2 prompts"),
        ([[1]], {"max_new_tokens": 3, "max_rows": 0}, "max_rows=0 must be at least 1"),
        (
            [[1]],
            {"max_new_tokens": 3, "prefill_chunk": 0},
            r"generate\.prefill_chunk=0 must be at least 1",
        ),
    ],
)
def test_bad_batches_are_refused(model, prompts, options, message):
    with pytest.raises(DataError, match=message):
        generate_batch(model, prompts, **options)


def test_sampling_follows_the_tempered_distribution(model):
    prompt_ids, temperature, num_draws = [7, 8, 9], 2.0, 600
    with torch.inference_mode():
        logits_V = model.logits(torch.tensor([prompt_ids]), Window.SHORT)[0, -1].double()
    expected_V = torch.softmax(logits_V / temperature, dim=-1)
    options = {"max_new_tokens": 1, "temperature": temperature}
    draws = [token_ids(model, prompt_ids, seed=seed, **options)[0] for seed in range(num_draws)]
    found_V = torch.bincount(torch.tensor(draws), minlength=31) / num_draws
    # Four standard errors of a frequency, for every token.
    allowed_V = 4 * (expected_V * (1 - expected_V) / num_draws).sqrt() + 1 / num_draws
    assert ((found_V - expected_V).abs() <= allowed_V).all()


def test_the_same_seed_samples_the_same_text(model):
    first, again, other = (
        token_ids(model, [1], max_new_tokens=30, temperature=1.5, seed=seed) for seed in (4, 4, 5)
    )
    assert first == again != other


def test_low_temperature_is_greedy(model):
    greedy = token_ids(model, [1, 2], max_new_tokens=20)
    for temperature in (1e-4, 1e-39):  # the logits over the second do not fit into float32
        assert token_ids(model, [1, 2], max_new_tokens=20, temperature=temperature) == greedy


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused(temperature):
    run = ["model=tiny", "target_len=2048", "generate.prompt_file=x"]
    overrides = [*run, f"generate.temperature={temperature}"]
    (fault,) = settings_faults(compose(GenerateRoot, "generate", overrides))
    assert re.fullmatch(r"generate\.temperature=\S+ must be 0 or more, and finite", fault)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Two words with a word-start mark and one token per byte, decoded as SentencePiece decodes."""
    vocabulary = {"▁good": 0, "▁day": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_streamed_pieces_join_to_the_decoded_text(byte_tokenizer):
    snowman = [2 + byte for byte in "☃".encode()]
    generated = [1, *snowman, 0, 1]
    stream = TextStream(byte_tokenizer, prompt_ids=[0])
    pieces = [stream.push(token_id) for token_id in generated]
    assert pieces == [" day", "", "", "☃", " good", " day"]
    assert stream.finish() == ""
    assert "good" + "".join(pieces) == byte_tokenizer.decode([0, *generated])


def test_a_prompt_that_ends_in_a_character_of_bytes_spoils_no_streamed_one(byte_tokenizer):
    snowman, umbrella = ([2 + byte for byte in character.encode()] for character in "☃☂")
    stream = TextStream(byte_tokenizer, prompt_ids=[0, *snowman])
    assert [stream.push(token_id) for token_id in [*umbrella, 1]] == ["", "", "☂", " day"]


def test_an_unfinished_character_is_shown_at_the_end_only(byte_tokenizer):
    stream = TextStream(byte_tokenizer, prompt_ids=[0])
    assert [stream.push(2 + byte) for byte in "é".encode()[:1]] == [""]
    assert set(stream.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_generation_ends_with_tokens_window_and_speed() -> None:
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(32, 1e4, original_len=128), 256)
    # The first token waits two seconds for the prompt, the next four come half a second apart.
    times = [12.0, 12.5, 13.0, 13.5, 14.0]
    assert generate._summary(124, factors, 10.0, times) == (
        "124 tokens read in 2.0 s, 5 written at 2.0 tokens/s; 129 of 256 tokens, original RoPE at "
        "the end"
    )
    assert generate._summary(128, factors, 10.0, times[:2]) == (
        "128 tokens read in 2.0 s, 2 written at 2.0 tokens/s; 130 of 256 tokens, rescaled RoPE at "
        "the end"
    )
    assert "read in 2.0 s, 1 written; 4 of 256" in generate._summary(3, factors, 10.0, times[:1])
