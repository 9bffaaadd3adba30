"""Losses of scored tokens against transformers' own, samples, and every self-test's error text."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.corpora.haystacks import Haystack
from longrope2.errors import ArtifactError, DataError
from longrope2.model import scoring as scoring_module
from longrope2.model.scoring import token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import to_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search.config import Algorithm, SearchConfig
from longrope2.search.objective import (
    SampleLosses,
    ScoredSample,
    needle_samples,
    perplexity,
    samples_sha256,
)
from longrope2.search.selftests import (
    Control,
    check_factors_matter,
    check_needle_guidance,
    check_needle_labels,
    check_ranking,
)
from longrope2.segments.needle_set import NeedleSample, NeedleSet

GEOMETRY = RopeGeometry(16, 1e4, 16)
TARGET_LEN = 64
PI = closed_form_factors(RopeMethod.pi, GEOMETRY, TARGET_LEN)
NTK = closed_form_factors(RopeMethod.ntk, GEOMETRY, TARGET_LEN)
NONE = closed_form_factors(RopeMethod.none, GEOMETRY, TARGET_LEN)


def hf_model(factors: RescaleFactors | None = None) -> LlamaForCausalLM:
    """A small random Llama; with factors, transformers applies them beyond the original window."""
    torch.manual_seed(0)
    keys = to_hf_config(factors) if factors else {"max_position_embeddings": TARGET_LEN}
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
        **keys,
    )
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
        log_probabilities[t - 1, sample.tokens[t]].item()
        for t in range(sample.first_scored, len(sample.tokens))
    )


@pytest.mark.parametrize("factors", [PI, NTK], ids=["pi", "ntk"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sample_losses_against_transformers(
    model: WindowedModel, factors: RescaleFactors, batch_size: int
) -> None:
    samples = [ScoredSample(tokens(n), first) for n, first in enumerate([56, 60, 1, 63])]
    losses = all_losses(SampleLosses(model, samples, batch_size), factors)
    assert losses == pytest.approx(
        [reference_losses(factors, sample) for sample in samples], rel=1e-4
    )


def all_losses(losses: SampleLosses, factors: RescaleFactors) -> list[float]:
    return [loss for batch in range(losses.num_batches) for loss in losses(factors, batch)]


def test_losses_follow_the_factors_asked_for_even_when_interleaved(model: WindowedModel) -> None:
    losses = SampleLosses(model, [ScoredSample(tokens(n), 1) for n in range(2)])
    expected = {f.method: all_losses(losses, f) for f in (PI, NTK)}
    assert [losses(PI, 0), losses(NTK, 0), losses(PI, 1), losses(NTK, 1)] == [
        [expected["pi"][0]],
        [expected["ntk"][0]],
        [expected["pi"][1]],
        [expected["ntk"][1]],
    ]


def test_rows_of_one_forward_have_factors_and_scales_of_their_own(model: WindowedModel) -> None:
    """Against transformers, one model for each row's factors; the second has a scale, too."""
    scaled = replace(NTK, long_attention_scale=1.3, short_attention_scale=1.3)
    samples = [ScoredSample(tokens(n), first) for n, first in enumerate([56, 60, 1])]
    losses = SampleLosses(model, samples, batch_size=3)
    pairs = [(PI, 0), (scaled, 1), (NONE, 2), (scaled, 0)]
    expected = [reference_losses(factors, samples[number]) for factors, number in pairs[:2]]
    rows = losses.rows(pairs)
    assert rows[:2] == pytest.approx(expected, rel=1e-4)
    alone = [losses.rows([pair])[0] for pair in pairs]
    assert rows == pytest.approx(alone, rel=1e-5)
    assert abs(rows[1] - losses.rows([(NTK, 1)])[0]) > 1e-3, "the scale is applied"


def alike(num: int, common: int, first: int) -> ScoredSample:
    """Rows that begin with the same tokens, the later ones scored from further on."""
    start = tokens(7)[:common]
    rows = [
        ScoredSample(np.concatenate([start, tokens(20 + n)[common:]]), first + n)
        for n in range(num)
    ]
    return replace(rows[0], others=tuple(rows[1:]))


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize(("common", "first"), [(40, 50), (40, 41), (55, 50), (1, 50), (0, 1)])
def test_rows_that_begin_alike_against_transformers(
    model: WindowedModel, window: Window, common: int, first: int
) -> None:
    """Whatever the common beginning, also one that reaches into what is scored."""
    sample = alike(3, common, first)
    losses = SampleLosses(model, [sample, sample], batch_size=2, window=window)
    applied = NTK if window is Window.LONG else None
    expected = sum(reference_losses(applied or NONE, row) for row in sample.rows)
    if window is Window.SHORT:
        one_by_one = SampleLosses(model, sample.rows, window=window)
        expected = sum(all_losses(one_by_one, NTK))
    assert losses(NTK, 0) == pytest.approx([expected, expected], rel=1e-4)
    assert losses.num_scored_tokens == 2 * sum(len(r.tokens) - r.first_scored for r in sample.rows)


def test_what_rows_have_in_common_is_read_once(
    model: WindowedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, read = alike(3, 40, 50), []
    forward = type(model.hf.base_model).forward

    def counted(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model.hf.base_model), "forward", counted)
    SampleLosses(model, [sample])(NTK, 0)
    assert read == [40, *[TARGET_LEN - 40 - 1] * 3]


def test_a_haystack_is_one_sample_of_all_its_needles() -> None:
    samples = [NeedleSample(tokens(n, 12), 8, f"k{n}", "v", 0.0) for n in range(4)]
    first, second = needle_samples(NeedleSet(samples, 12, needles_per_haystack=2))
    assert [row.tokens.tolist() for row in first.rows] == [
        tokens(n, 12)[:-1].tolist() for n in (0, 1)
    ]
    assert (first.num_scored, len(second.others)) == (6, 1)
    alone = needle_samples(NeedleSet(samples, 12))
    assert samples_sha256([first, second]) != samples_sha256(alone)


def test_clipped_losses_of_rows_that_begin_alike(model: WindowedModel) -> None:
    sample = alike(2, 30, 40)
    by_hand = [SampleLosses(model, [row], highest_loss=2.0) for row in sample.rows]
    clipped = SampleLosses(model, [sample], highest_loss=2.0).rows([(NTK, 0)])[0]
    assert clipped == pytest.approx(sum(x.rows([(NTK, 0)])[0] for x in by_hand), rel=1e-5)
    assert clipped < SampleLosses(model, [sample]).rows([(NTK, 0)])[0] - 1


def test_batches_hold_samples_of_one_length(model: WindowedModel) -> None:
    lengths = [20, 20, 20, 30, 30, 20]
    samples = [ScoredSample(tokens(n, length), 1) for n, length in enumerate(lengths)]
    losses = SampleLosses(model, samples, batch_size=2)
    assert losses.batches == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert [len(losses(PI, batch)) for batch in range(losses.num_batches)] == [2, 1, 2, 1]


def test_clipped_losses(model: WindowedModel) -> None:
    sample = ScoredSample(tokens(0), 40)
    token_losses = token_nll(model, torch.from_numpy(tokens(0))[None], Window.LONG, 40)[0]
    highest = float(token_losses.median())
    clipped = SampleLosses(model, [sample], highest_loss=highest).rows([(NONE, 0)])[0]
    by_hand = sum(min(loss, highest) for loss in token_losses.double().tolist())
    assert clipped == pytest.approx(by_hand, rel=1e-6)
    assert clipped < token_losses.double().sum().item()


def test_batches_hold_all_samples(model: WindowedModel) -> None:
    samples = [ScoredSample(tokens(n), 1) for n in range(3)]
    losses = SampleLosses(model, samples, batch_size=2)
    assert (losses.num_batches, losses.num_samples) == (2, 3)
    assert [len(losses(PI, batch)) for batch in range(2)] == [2, 1]
    assert losses.num_scored_tokens == 3 * (TARGET_LEN - 1)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("first_scored", [1, 2, 40, TARGET_LEN - 1])
def test_leaving_out_what_the_losses_do_not_need_changes_nothing(
    num_layers: int, first_scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.4,
    )
    windowed = WindowedModel(LlamaForCausalLM(config).eval(), NTK)
    tokens_BT = torch.from_numpy(np.stack([tokens(0), tokens(1)]))
    cut = token_nll(windowed, tokens_BT, Window.LONG, first_scored)
    monkeypatch.setattr(scoring_module, "CUT_BELOW_SCORED", 0)
    whole = token_nll(windowed, tokens_BT, Window.LONG, first_scored)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    assert not list(windowed.hf.model.layers[-1].mlp._forward_hooks)


def test_the_last_layer_computes_the_needed_positions_only(model: WindowedModel) -> None:
    rows: list[int] = []
    for layer in model.hf.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output: rows.append(output.shape[1])
        )
    token_nll(model, torch.from_numpy(tokens(0))[None], Window.LONG, first_scored=56)
    assert rows == [TARGET_LEN - 1, 8]


def test_chunks_of_the_head_change_nothing(
    model: WindowedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_BT = torch.from_numpy(np.stack([tokens(0), tokens(1)]))
    whole = token_nll(model, tokens_BT, Window.SHORT)
    monkeypatch.setattr(scoring_module, "HEAD_CHUNK_TOKENS", 10)
    torch.testing.assert_close(
        token_nll(model, tokens_BT, Window.SHORT), whole, rtol=1e-5, atol=1e-5
    )
    assert whole.shape == (2, TARGET_LEN - 1)


def test_only_scored_positions_pass_the_head(model: WindowedModel) -> None:
    seen: list[int] = []
    model.hf.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[1])
    )
    SampleLosses(model, [ScoredSample(tokens(0), 56)])(PI, 0)
    assert seen == [8]


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
        (
            needle_set(tokens=np.array([1, 1, 21, 22, 5, 5, 7, 2])),
            8,
            r"not hold exactly one BOS \(1\), at its front",
        ),
        (
            needle_set(tokens=np.array([20, 1, 21, 22, 5, 5, 7, 2])),
            8,
            r"not hold exactly one BOS \(1\), at its front",
        ),
        (
            needle_set(tokens=np.array([1, 20, 21, 22, 23, 5, 5, 2])),
            8,
            "the scored tokens read '2355', not '557'",
        ),
        (needle_set(value_start=5), 8, "needle sample 0: the scored tokens read '57', not '557'"),
    ],
)
def test_label_errors(needles: NeedleSet, length: int, text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        check_needle_labels(needles, length, 1, decode)


def test_factors_must_matter(model: WindowedModel) -> None:
    losses = SampleLosses(model, [ScoredSample(tokens(0), 1)])
    check_factors_matter(losses, GEOMETRY, TARGET_LEN)
    # A model that applies a RoPE of its own.
    model.hf.base_model.rotary_emb = hf_model().model.rotary_emb
    with pytest.raises(ArtifactError, match="does not apply the rescale factors it is given"):
        check_factors_matter(losses, GEOMETRY, TARGET_LEN)


class FixedLosses(SampleLosses):
    """One sample of seven scored tokens with a given mean loss."""

    def __init__(self, mean: float) -> None:
        self.num_scored_tokens = 7
        self.num_batches = 1
        self.mean = mean

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        return [7 * self.mean]


def test_needle_guidance() -> None:
    guidance = check_needle_guidance(FixedLosses(0.1), FixedLosses(2.0), NONE, SearchConfig())
    assert (guidance.needle_ppl, guidance.control_ppl) == pytest.approx((np.exp(0.1), np.exp(2.0)))


@pytest.mark.parametrize(
    ("with_needle", "without", "text"),
    [
        (
            2.0,
            5.0,
            "needle perplexity at 16 tokens, inside the original window, is 7.389, above "
            "search.max_needle_ppl",
        ),
        (float("nan"), 5.0, "inside the original window, is inf, above"),
        (
            0.1,
            0.5,
            "the needle lowers the loss of its value by 0.4 nats per token at 16 tokens, below "
            "search.min_need",
        ),
    ],
)
def test_guidance_errors(with_needle: float, without: float, text: str) -> None:
    advice = "this model cannot guide a needle search; use search.objective=perplexity"
    with pytest.raises(DataError, match=f"{text}.*{advice}"):
        check_needle_guidance(FixedLosses(with_needle), FixedLosses(without), NONE, SearchConfig())


class GivenLosses(SampleLosses):
    """One sample a batch, one scored token each, with given losses."""

    def __init__(self, losses: list[float]) -> None:
        self.samples = tuple(ScoredSample(tokens(n, 63), 62) for n in range(len(losses)))
        self.num_scored_tokens = self.num_batches = len(losses)
        self.given = losses

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        return [self.given[batch]]


def ranking(needle: list[float], control: list[float], **settings: Any) -> float:
    given = Control(GivenLosses(needle), GivenLosses(control), 9.85)
    return check_ranking(PI, given, SearchConfig(**settings))


def test_remedies_leave_out_what_is_done_already() -> None:
    with pytest.raises(DataError) as error:
        ranking([4.0] * 4, [4.0] * 4)
    for key in ("haystack=noise", "depths=[0,0.25,0.5,0.75]", "objective=perplexity"):
        assert f"search.{key}" in str(error.value)
    assert "search=halving" in str(error.value)
    done = {"algorithm": Algorithm.halving, "depths": [0.0, 0.5], "haystack": Haystack.noise}
    with pytest.raises(DataError) as error:
        ranking([4.0] * 4, [4.0] * 4, **done)
    text = str(error.value)
    assert "search.population=128" in text and "a shorter target_len" in text
    assert not any(key in text for key in ("haystack=", "depths=", "search=halving"))
    assert ranking([4.0] * 4, [4.0] * 4, min_needle_loss_gain_at_target=None) == 0


def test_ranking_is_the_mean_gain() -> None:
    assert ranking([0.1, 0.2, 0.3, 0.4], [2.1, 2.3, 2.2, 2.4]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("needle", "control", "text"),
    [
        (
            [4.3, 4.3, 4.4, 4.4],
            [4.4, 4.4, 4.5, 4.5],
            r"needle perplexity is 77.48, and 85.63 without the needle in the text \(0.1 nats per "
            r"token; search.min_needle_loss_gain_at_target=0.5; guessing the digits gives 9.85 ",
        ),
        # A mean of 0.6, but within noise: half of the samples say the opposite.
        ([1.0, 5.0, 1.0, 5.0], [5.6, 1.6, 5.6, 1.6], "nats per token, which is noise"),
        ([float("nan")] * 4, [1.0] * 4, "cannot rank candidates at 64 tokens"),
    ],
)
def test_ranking_errors(needle: list[float], control: list[float], text: str) -> None:
    with pytest.raises(DataError, match=text):
        ranking(needle, control)
