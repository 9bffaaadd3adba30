"""What must hold before a search may start: it would otherwise optimise noise.

(a) the scored tokens are there, whole, and inside the window; (b) the loss depends on the rescale factors; (c) inside
its own window the model retrieves the needle, and taking the needle away raises the loss of the value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope2.errors import ArtifactError, DataError
from longrope2.rope import RescaleFactors
from longrope2.search.config import SearchConfig
from longrope2.search.objective import SampleLosses, perplexity
from longrope2.search.workers import Score
from longrope2.segments.needle_set import NeedleSet

__all__ = ["NeedleGuidance", "check_factors_matter", "check_needle_guidance", "check_needle_labels"]


@dataclass(frozen=True)
class NeedleGuidance:
    """How well the needle guides inside the original window.

    Attributes:
        needle_ppl: Perplexity of the value with the needle in the text.
        control_ppl: The same without the needle.
    """

    needle_ppl: float
    control_ppl: float


def check_needle_labels(
    needles: NeedleSet, length: int, bos_id: int, decode: Callable[[Sequence[int] | np.ndarray], str]
) -> None:
    """Self-test (a): exactly ``length`` tokens, one BOS at the front, and the whole value at the end.

    Raises:
        ArtifactError: a sample breaks one of these; names the sample.
    """
    if not needles.samples:
        raise ArtifactError("the needle set holds no samples")
    for number, sample in enumerate(needles.samples):
        if len(sample.tokens) != length:
            raise ArtifactError(f"needle sample {number} has {len(sample.tokens)} tokens, target_len is {length}")
        if sample.tokens[0] != bos_id or np.count_nonzero(sample.tokens == bos_id) != 1:
            raise ArtifactError(f"needle sample {number} does not hold exactly one BOS ({bos_id}), at its front")
        scored = decode(sample.through_value[sample.value_start :]).strip()
        if scored != sample.value:
            raise ArtifactError(f"needle sample {number}: the scored tokens read {scored!r}, not {sample.value!r}")


def check_factors_matter(unscaled: Score, interpolated: Score) -> None:
    """Self-test (b): unscaled and interpolated RoPE give different losses on the samples of the search.

    It costs nothing: both are among the closed forms that every search is compared with.

    Raises:
        ArtifactError: they do not: the model's RoPE is applied elsewhere, and every candidate would score the same.
    """
    if unscaled.batch_losses == interpolated.batch_losses:
        raise ArtifactError(
            f"the loss is {unscaled.loss_sum:.6g} with the unscaled and with the interpolated RoPE alike: this model does "
            "not apply the rescale factors it is given; its class is not supported"
        )


def check_needle_guidance(
    with_needle: SampleLosses, without_needle: SampleLosses, factors: RescaleFactors, config: SearchConfig
) -> NeedleGuidance:
    """Self-test (c), on samples of the original window computed with the original RoPE.

    Args:
        with_needle: Needle samples of the original length, in the short window.
        without_needle: The same keys and texts without the needle.
        factors: Any factors of the model; their short window is used.
        config: Holds the two limits.

    Raises:
        DataError: the model does not retrieve inside its own window, or does not use the needle.
    """
    guidance = NeedleGuidance(_perplexity(with_needle, factors), _perplexity(without_needle, factors))
    original_len = factors.geometry.original_len
    advice = "this model cannot guide a needle search; use search.objective=perplexity"
    if not guidance.needle_ppl <= config.max_needle_ppl_at_original:
        raise DataError(
            f"needle perplexity at {original_len} tokens, inside the original window, is {guidance.needle_ppl:.4g}, "
            f"above search.max_needle_ppl_at_original={config.max_needle_ppl_at_original:g}: {advice}"
        )
    gain = float(np.log(guidance.control_ppl) - np.log(guidance.needle_ppl))
    if not gain >= config.min_needle_loss_gain:
        raise DataError(
            f"the needle lowers the loss of its value by {gain:.4g} nats per token at {original_len} tokens, below "
            f"search.min_needle_loss_gain={config.min_needle_loss_gain:g}: {advice}"
        )
    return guidance


def _perplexity(losses: SampleLosses, factors: RescaleFactors) -> float:
    """Perplexity over all samples."""
    batches = (losses(factors, batch) for batch in range(losses.num_batches))
    return perplexity(math.fsum(loss for batch in batches for loss in batch), losses.num_scored_tokens)
