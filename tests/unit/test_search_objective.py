"""Losses of scored tokens against transformers' own loss, samples, and the self-tests with every error text."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.errors import ArtifactError, DataError
from longrope2.model import WindowedModel
from longrope2.rope import RescaleFactors, RopeGeometry, RopeMethod, Window, closed_form_factors
from longrope2.search import (
    SampleLosses,
    ScoredSample,
    SearchConfig,
    check_factors_matter,
    check_needle_guidance,
    check_needle_labels,
    cut_documents,
    needle_samples,
    perplexity,
    samples_sha256,
    token_nll,
)
from longrope2.search import objective as objective_module
from longrope2.segments.needle_set import NeedleSample, NeedleSet

GEOMETRY = RopeGeometry(16, 1e4, 16)
TARGET_LEN = 64
PI = closed_form_factors(RopeMethod.pi, GEOMETRY, TARGET_LEN)
NTK = closed_form_factors(RopeMethod.ntk, GEOMETRY, TARGET_LEN)
NONE = closed_form_factors(RopeMethod.none, GEOMETRY, TARGET_LEN)


def hf_model(factors: RescaleFactors | None = None) -> LlamaForCausalLM:
    """A small random Llama; with factors, plain transformers applies them beyond the original window."""
    torch.manual_seed(0)
    keys = factors.to_hf_config() if factors else {"max_position_embeddings": TARGET_LEN}
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.4, **keys,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> WindowedModel:
    return WindowedModel(hf_model(), NONE)


def tokens(seed: int, length: int = TARGET_LEN) -> np.ndarray:
    return np.concatenate([[1], np.random.default_rng(seed).integers(3, 48, length - 1)])


def reference_losses(factors: RescaleFactors, sample: ScoredSample) -> float:
    """Loss of the scored tokens from plain transformers with its own longrope and all logits."""
    tokens_BT = torch.from_numpy(sample.tokens)[None]
    with torch.no_grad():
        logits_TV = hf_model(factors)(tokens_BT).logits[0].double()
    log_probabilities = logits_TV.log_softmax(-1)
    return -sum(
        log_probabilities[t - 1, sample.tokens[t]].item() for t in range(sample.first_scored, len(sample.tokens))
    )


@pytest.mark.parametrize("factors", [PI, NTK], ids=["pi", "ntk"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sample_losses_against_transformers(model: WindowedModel, factors: RescaleFactors, batch_size: int) -> None:
    samples = [ScoredSample(tokens(n), first) for n, first in enumerate([56, 60, 1, 63])]
    losses = [loss for batch in SampleLosses(model, samples, batch_size)(factors, 0) for loss in batch]
    assert losses == pytest.approx([reference_losses(factors, sample) for sample in samples], rel=1e-4)


def test_losses_follow_the_factors_asked_for_even_when_interleaved(model: WindowedModel) -> None:
    losses = SampleLosses(model, [ScoredSample(tokens(n), 1) for n in range(2)])
    expected = {f.method: [loss for batch in losses(f) for loss in batch] for f in (PI, NTK)}
    pi, ntk = losses(PI), losses(NTK)
    assert [next(pi), next(ntk), next(pi), next(ntk)] == [
        [expected["pi"][0]], [expected["ntk"][0]], [expected["pi"][1]], [expected["ntk"][1]],
    ]  # fmt: skip


def test_losses_start_where_asked_and_are_lazy(model: WindowedModel) -> None:
    losses = SampleLosses(model, [ScoredSample(tokens(n), 1) for n in range(3)])
    everything = [loss for batch in losses(PI) for loss in batch]
    assert [loss for batch in losses(PI, 1) for loss in batch] == everything[1:]
    assert list(losses(PI, 3)) == []
    assert losses.num_scored_tokens == 3 * (TARGET_LEN - 1)


def test_chunks_of_the_head_change_nothing(model: WindowedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_BT = torch.from_numpy(np.stack([tokens(0), tokens(1)]))
    whole = token_nll(model, tokens_BT, Window.SHORT)
    monkeypatch.setattr(objective_module, "HEAD_CHUNK_TOKENS", 10)
    torch.testing.assert_close(token_nll(model, tokens_BT, Window.SHORT), whole, rtol=1e-5, atol=1e-5)
    assert whole.shape == (2, TARGET_LEN - 1)


def test_only_scored_positions_pass_the_head(model: WindowedModel) -> None:
    seen: list[int] = []
    model.hf.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    list(SampleLosses(model, [ScoredSample(tokens(0), 56)])(PI))
    assert seen == [8]


def test_cut_documents_joins_short_ones_and_uses_none_twice() -> None:
    documents = [[10] * 7, [11] * 3, [12] * 3, [13] * 20]
    samples = cut_documents(documents, bos_id=1, length=6, num_samples=3)
    assert [sample.tokens.tolist() for sample in samples] == [[1] + [10] * 5, [1, 11, 11, 11, 12, 12], [1] + [13] * 5]
    assert [sample.first_scored for sample in samples] == [1, 1, 1]
    with pytest.raises(DataError, match="search.num_samples=4 samples of 6 tokens are wanted.*enough for 3"):
        cut_documents(documents, bos_id=1, length=6, num_samples=4)


def test_samples_hash_covers_tokens_and_scoring() -> None:
    sample = ScoredSample(tokens(0), 5)
    others = [ScoredSample(tokens(1), 5), ScoredSample(tokens(0), 6)]
    hashes = {samples_sha256([s]) for s in (sample, *others)} | {samples_sha256([sample, sample])}
    assert len(hashes) == 4
    assert samples_sha256([sample]) == samples_sha256([ScoredSample(tokens(0), 5)])


def test_perplexity() -> None:
    assert perplexity(np.log(10.0) * 7, 7) == pytest.approx(10.0)
    assert perplexity(float("inf"), 7) == float("inf")


def needle_set(**changes: object) -> NeedleSet:
    ids = np.array([1, 20, 21, 22, 5, 5, 7, 2])
    sample = NeedleSample(tokens=ids, value_start=4, key="k", value="557", depth=0.0)
    return NeedleSet([replace(sample, **changes)], length=8)  # type: ignore[arg-type]


def decode(ids: np.ndarray) -> str:
    return " " + "".join(map(str, ids))


def test_needle_samples_are_scored_on_the_value() -> None:
    needles = needle_set()
    check_needle_labels(needles, 8, 1, decode)
    assert [(s.first_scored, s.num_scored) for s in needle_samples(needles)] == [(4, 3)]


@pytest.mark.parametrize(
    ("needles", "length", "text"),
    [
        (NeedleSet([], 8), 8, "the needle set holds no samples"),
        (needle_set(), 9, "needle sample 0 has 8 tokens, target_len is 9"),
        (needle_set(tokens=np.array([1, 1, 21, 22, 5, 5, 7, 2])), 8, r"not hold exactly one BOS \(1\), at its front"),
        (needle_set(tokens=np.array([20, 1, 21, 22, 5, 5, 7, 2])), 8, r"not hold exactly one BOS \(1\), at its front"),
        (needle_set(tokens=np.array([1, 20, 21, 22, 23, 5, 5, 2])), 8, "the scored tokens read '2355', not '557'"),
        (needle_set(value_start=5), 8, "needle sample 0: the scored tokens read '57', not '557'"),
    ],
)
def test_label_errors(needles: NeedleSet, length: int, text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        check_needle_labels(needles, length, 1, decode)


def test_factors_must_matter(model: WindowedModel) -> None:
    check_factors_matter(SampleLosses(model, [ScoredSample(tokens(0), 1)]), GEOMETRY, TARGET_LEN)
    model.hf.base_model.rotary_emb = hf_model().model.rotary_emb  # a model that applies a RoPE of its own
    with pytest.raises(ArtifactError, match="does not apply the rescale factors it is given"):
        check_factors_matter(SampleLosses(model, [ScoredSample(tokens(0), 1)]), GEOMETRY, TARGET_LEN)


class FixedLosses(SampleLosses):
    """One sample of seven scored tokens with a given mean loss."""

    def __init__(self, mean: float) -> None:
        self.num_scored_tokens = 7
        self.mean = mean

    def __call__(self, factors: RescaleFactors, first_sample: int = 0) -> Iterator[list[float]]:
        yield [7 * self.mean]


def test_needle_guidance() -> None:
    guidance = check_needle_guidance(FixedLosses(0.1), FixedLosses(2.0), NONE, SearchConfig())
    assert (guidance.needle_ppl, guidance.control_ppl) == pytest.approx((np.exp(0.1), np.exp(2.0)))


@pytest.mark.parametrize(
    ("with_needle", "without", "text"),
    [
        (2.0, 5.0, "needle perplexity at 16 tokens, inside the original window, is 7.389, above search.max_needle_ppl"),
        (float("nan"), 5.0, "inside the original window, is inf, above"),
        (0.1, 0.5, "the needle lowers the loss of its value by 0.4 nats per token at 16 tokens, below search.min_need"),
    ],
)
def test_guidance_errors(with_needle: float, without: float, text: str) -> None:
    advice = "this model cannot guide a needle search; use search.objective=perplexity"
    with pytest.raises(DataError, match=f"{text}.*{advice}"):
        check_needle_guidance(FixedLosses(with_needle), FixedLosses(without), NONE, SearchConfig())
