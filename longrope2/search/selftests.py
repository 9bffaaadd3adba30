"""Self-tests of a search: without them it would optimise noise.

(a) The scored tokens are there, whole, and inside the window; (b) the loss depends on the rescale
factors; (c) inside its own window the model retrieves the needle, and taking the needle away raises
the loss of the value; (d) so it does at the target length under the best candidate that the search
starts with: where it does not, every candidate is as ignorant of the value as the next, and ranking
them ranks how sure they are of a wrong one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import numpy as np

from longrope2.corpora.haystacks import Haystack
from longrope2.errors import ArtifactError, DataError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search.config import Algorithm, SearchConfig
from longrope2.search.objective import SampleLosses, ScoredSample, perplexity
from longrope2.segments.needle_set import NeedleSet
from longrope2.statistics import paired_lower_bound

# Self-test (d): samples from which on a gain must be beyond noise, and with what confidence.
_LEAST_PAIRS, _CONFIDENCE = 4, 0.95
# Self-test (b): tokens that are read.
_START_TOKENS = 512


@dataclass(frozen=True)
class NeedleGuidance:
    """Perplexity of the value in the original window, with the needle in the text and without."""

    needle_ppl: float
    control_ppl: float


def check_needle_labels(
    needles: NeedleSet,
    length: int,
    bos_id: int | None,
    decode: Callable[[Sequence[int] | np.ndarray], str],
) -> None:
    """Self-test (a): ``length`` tokens, one BOS (if any) at the front, the whole value at the end.

    Raises:
        ArtifactError: a sample breaks one of these; names the sample.
    """
    if not needles.samples:
        raise ArtifactError("the needle set holds no samples")
    for number, sample in enumerate(needles.samples):
        name, tokens = f"needle sample {number}", sample.tokens
        if len(tokens) != length:
            raise ArtifactError(f"{name} has {len(tokens)} tokens, target_len is {length}")
        starts_wrong = tokens[0] != bos_id or np.count_nonzero(tokens == bos_id) != 1
        if bos_id is not None and starts_wrong:
            raise ArtifactError(f"{name} does not hold exactly one BOS ({bos_id}), at its front")
        scored = decode(sample.through_value[sample.value_start :]).strip()
        if scored != sample.value:
            raise ArtifactError(f"{name}: the scored tokens read {scored!r}, not {sample.value!r}")


def check_factors_matter(losses: SampleLosses, geometry: RopeGeometry, target_len: int) -> None:
    """Self-test (b): unscaled and interpolated RoPE give the start of a sample different losses.

    Raises:
        ArtifactError: they do not: the model's RoPE is applied elsewhere, and every candidate would
            score the same.
    """
    # Of few tokens: all of a long sample would cost as much as two candidates, at every resume.
    start = SampleLosses(
        losses.model,
        [ScoredSample(losses.samples[0].tokens[:_START_TOKENS], first_scored=1)],
        window=losses.window,
        processes=losses.sharing,
    )
    none, pi = (
        start.rows([(closed_form_factors(method, geometry, target_len), 0)])[0]
        for method in (RopeMethod.none, RopeMethod.pi)
    )
    if none == pi:
        raise ArtifactError(
            f"the loss is {none:.6g} with the unscaled and with the interpolated RoPE alike: this "
            "model does not apply the rescale factors it is given; its class is not supported"
        )


def check_needle_guidance(
    with_needle: SampleLosses,
    without_needle: SampleLosses,
    factors: RescaleFactors,
    config: SearchConfig,
) -> NeedleGuidance:
    """Self-test (c), on samples of the original window computed with the original RoPE.

    The samples are the same keys and texts with and without the needle. Of ``factors``, any of the
    model, the short window is used.

    Raises:
        DataError: the model does not retrieve inside its own window, or does not use the needle.
    """
    guidance = NeedleGuidance(*(_perplexity(x, factors) for x in (with_needle, without_needle)))
    tokens = f"{factors.geometry.original_len} tokens"
    advice = "this model cannot guide a needle search; use search.objective=perplexity"
    if not guidance.needle_ppl <= config.max_needle_ppl_at_original:
        raise DataError(
            f"needle perplexity at {tokens}, inside the original window, is "
            f"{guidance.needle_ppl:.4g}, above search.max_needle_ppl_at_original="
            f"{config.max_needle_ppl_at_original:g}: {advice}"
        )
    gain = float(np.log(guidance.control_ppl) - np.log(guidance.needle_ppl))
    if not gain >= config.min_needle_loss_gain:
        raise DataError(
            f"the needle lowers the loss of its value by {gain:.4g} nats per token at {tokens}, "
            f"below search.min_needle_loss_gain={config.min_needle_loss_gain:g}: {advice}"
        )
    return guidance


@dataclass(frozen=True)
class Control:
    """What self-test (d) compares: samples of the target length, and the same without the needle.

    ``guess_ppl`` is the perplexity of a value for who knows only how many digits it has.
    """

    with_needle: SampleLosses
    without_needle: SampleLosses
    guess_ppl: float


def _remedies(config: SearchConfig) -> list[str]:
    """What may help a search whose objective cannot rank, less what it does already."""
    found = ["a shorter target_len first"]
    if config.haystack is not Haystack.noise:
        found.append("noise instead of books (search.haystack=noise)")
    if set(config.depths) == {0.0}:
        found.append("needles at spread depths (search.depths=[0,0.25,0.5,0.75])")
    if config.algorithm is not Algorithm.halving:
        found.append("search=halving (its ramps and attention scales may start better)")
    else:
        found.append(f"more starts (search.population={2 * config.population})")
    return [*found, "or search=paper search.objective=perplexity"]


def check_ranking(best_start: RescaleFactors, control: Control, config: SearchConfig) -> float:
    """Self-test (d): how far the needle lowers the loss of its value at the target length.

    Args:
        best_start: The best candidate of those the search starts with.
        control: The samples.
        config: Of the search, with ``min_needle_loss_gain_at_target`` (None asks for nothing).

    Returns:
        Nats per token.

    Raises:
        DataError: less than that; says what would help.
    """
    needle, without = (
        _losses(losses, best_start) for losses in (control.with_needle, control.without_needle)
    )
    samples = control.with_needle.samples
    gains = [
        (b - a) / sample.num_scored for a, b, sample in zip(needle, without, samples, strict=True)
    ]
    gain, noise, least = fmean(gains), "", config.min_needle_loss_gain_at_target
    if len(gains) >= _LEAST_PAIRS and all(map(math.isfinite, gains)):
        noise = "" if paired_lower_bound(gains, _CONFIDENCE) > 0 else ", which is noise"
    if least is not None and (noise or not gain >= least):
        num = control.with_needle.num_scored_tokens
        needle_ppl, without_ppl = (perplexity(math.fsum(x), num) for x in (needle, without))
        length = len(samples[0].tokens) + 1  # its EOS is never read
        raise DataError(
            f"the objective cannot rank candidates at {length} tokens: under the best one that the "
            f"search starts with the needle perplexity is {needle_ppl:.4g}, and {without_ppl:.4g} "
            f"without the needle in the text ({gain:.3g} nats per token{noise}; "
            f"search.min_needle_loss_gain_at_target={least:g}; guessing the digits gives "
            f"{control.guess_ppl:.3g} with this tokenizer). Use {', '.join(_remedies(config))}"
        )
    return gain


def _perplexity(losses: SampleLosses, factors: RescaleFactors) -> float:
    return perplexity(math.fsum(_losses(losses, factors)), losses.num_scored_tokens)


def _losses(losses: SampleLosses, factors: RescaleFactors) -> list[float]:
    """Summed loss of every sample."""
    batches = (losses(factors, batch) for batch in range(losses.num_batches))
    return list(chain.from_iterable(batches))
