"""Scores against real greedy generation and against plain transformers in float64."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.errors import DataError
from longrope2.evaluation.scoring import score_values, score_windows
from longrope2.inference.generation import generate_tokens
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import to_hf_config
from longrope2.segments.needle_set import NeedleSample, NeedleSet

ORIGINAL_LEN, TARGET_LEN, VOCAB_SIZE = 16, 64, 97
FACTORS = RescaleFactors(
    factors=tuple(1.0 + 0.6 * i for i in range(8)),
    geometry=RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN),
    target_len=TARGET_LEN,
    method="longrope2",
)


def random_llama(**rope_config):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        **rope_config,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windowed_model():
    return WindowedModel(random_llama(max_position_embeddings=ORIGINAL_LEN), FACTORS)


@pytest.fixture(scope="module")
def plain_model():
    """Transformers' own longrope, which chooses the window by length, in float64."""
    return random_llama(**to_hf_config(FACTORS)).double()


EOS = 0  # closes the sample; never read, whatever it is


def sample_of(prompt_ids, value_ids):
    return NeedleSample(
        tokens=np.array([*prompt_ids, *value_ids, EOS]),
        value_start=len(prompt_ids),
        key="k",
        value="v",
        depth=0.0,
    )


def greedy(model, ids, num_tokens):
    return [token.token_id for token in generate_tokens(model, ids, max_new_tokens=num_tokens)]


def samples_around_greedy(model, length):
    """Values of 3 to 5 tokens: the greedy continuation, of every second sample one token wrong."""
    rng = np.random.default_rng(length)
    samples = []
    for number in range(12):
        num_value = 3 + number % 3
        prompt_ids = rng.integers(VOCAB_SIZE, size=length - num_value - 1).tolist()
        value_ids = greedy(model, prompt_ids, num_value)
        if number % 2:
            kept, wrong = (
                value_ids[: number % num_value],
                (value_ids[number % num_value] + 1) % VOCAB_SIZE,
            )
            value_ids = [*kept, wrong]
            value_ids += greedy(model, [*prompt_ids, *value_ids], num_value - len(value_ids))
        samples.append(sample_of(prompt_ids, value_ids))
    return NeedleSet(samples=samples, length=length)


@pytest.mark.parametrize("length", [ORIGINAL_LEN, 3 * ORIGINAL_LEN])
def test_exact_match_equals_real_greedy_generation(windowed_model, length):
    needle_set = samples_around_greedy(windowed_model, length)
    found = [
        score.exact for score in score_values(windowed_model, needle_set, batch_tokens=5 * length)
    ]
    generated = []
    for sample in needle_set.samples:
        ids, start = sample.through_value.tolist(), sample.value_start
        prompt_ids, value_ids = ids[:start], ids[start:]
        generated.append(greedy(windowed_model, prompt_ids, len(value_ids)) == value_ids)
    assert found == generated == [True, False] * 6


@torch.inference_mode()
def token_nlls(plain_model, tokens):
    """Negative log-likelihood of every token but the first."""
    tokens_T = torch.tensor(tokens.astype(np.int64))
    logits_TV = plain_model(input_ids=tokens_T[None]).logits[0, :-1]
    return -torch.log_softmax(logits_TV, -1)[torch.arange(len(tokens) - 1), tokens_T[1:]].numpy()


@pytest.mark.parametrize("length", [ORIGINAL_LEN, ORIGINAL_LEN + 8, TARGET_LEN])
def test_value_likelihood_equals_transformers(windowed_model, plain_model, length):
    needle_set = samples_around_greedy(windowed_model, length)
    scores = score_values(windowed_model, needle_set, batch_tokens=1)
    for sample, score in zip(needle_set.samples, scores, strict=True):
        expected = token_nlls(plain_model, sample.through_value)[sample.value_start - 1 :]
        assert score.num_tokens == len(expected)
        assert score.nll == pytest.approx(expected.sum(), rel=1e-4)


def test_scores_do_not_depend_on_the_batch(windowed_model):
    needle_set = samples_around_greedy(windowed_model, TARGET_LEN)
    alone, together = (
        score_values(windowed_model, needle_set, batch_tokens=n) for n in (1, 100_000)
    )
    assert [s.exact for s in alone] == [s.exact for s in together]
    assert [s.nll for s in alone] == pytest.approx([s.nll for s in together], rel=1e-4)


@pytest.mark.parametrize("length", [ORIGINAL_LEN, TARGET_LEN])
def test_needles_of_one_haystack_are_scored_as_alone(windowed_model, length):
    """Rows that begin alike, read once: as in a forward each, and as real greedy answers."""
    rng = np.random.default_rng(length)
    start = rng.integers(VOCAB_SIZE, size=length - 10).tolist()
    samples = []
    for number in range(6):
        prompt_ids = [*start, *rng.integers(VOCAB_SIZE, size=6).tolist()]
        value_ids = greedy(windowed_model, prompt_ids, 3)
        value_ids[-1] = (value_ids[-1] + number % 2) % VOCAB_SIZE
        samples.append(sample_of(prompt_ids, value_ids))
    alone = score_values(windowed_model, NeedleSet(samples, length), batch_tokens=1)
    shared = score_values(windowed_model, NeedleSet(samples, length, 3), batch_tokens=1)
    assert [s.exact for s in shared] == [s.exact for s in alone] == [True, False] * 3
    assert [s.nll for s in shared] == pytest.approx([s.nll for s in alone], rel=1e-5)
    assert [s.num_tokens for s in shared] == [3] * 6


def test_a_value_across_the_window_border_is_refused(windowed_model):
    needle_set = NeedleSet(samples=[sample_of(range(ORIGINAL_LEN), [1])], length=ORIGINAL_LEN + 2)
    with pytest.raises(
        DataError, match=r"evaluation\.lengths: .* 18 tokens .* original window \(16 tokens\)"
    ):
        score_values(windowed_model, needle_set, batch_tokens=64)


@pytest.mark.parametrize("num_scored", [None, 5])
def test_window_likelihood_equals_transformers(windowed_model, plain_model, num_scored):
    rng = np.random.default_rng(0)
    lengths = [ORIGINAL_LEN, 40, 4, ORIGINAL_LEN + 1, 40, ORIGINAL_LEN]
    windows = [rng.integers(VOCAB_SIZE, size=length).astype(np.uint16) for length in lengths]
    scores = score_windows(windowed_model, windows, num_scored=num_scored, batch_tokens=80)
    for tokens, score in zip(windows, scores, strict=True):
        expected = token_nlls(plain_model, tokens)[-(num_scored or len(tokens)) :]
        assert score.num_tokens == len(expected)
        assert score.nll == pytest.approx(expected.sum(), rel=1e-4)
