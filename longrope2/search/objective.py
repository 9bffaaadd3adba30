"""What a candidate is judged by: the loss of scored tokens of fixed samples at the target length.

Needle-driven perplexity [LongRoPE2, arXiv 2502.20082, sec. 3.2] scores the tokens of the value
only; plain perplexity scores every token. Both are exp(mean negative log-likelihood over the scored
tokens of all samples).

A search would optimise noise unless the self-tests hold: (a) the scored tokens are there, whole,
and inside the window; (b) the loss depends on the rescale factors; (c) inside its own window the
model retrieves the needle, and taking the needle away raises the loss of the value.

Shape legend: B = samples of a batch, T = tokens of a sample (of this process's chunk), H = hidden
size, S = scored tokens.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longrope2.attention.layout import build_layout, chunk_bounds
from longrope2.errors import ArtifactError, DataError
from longrope2.model.scoring import head_nll, token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.search.config import SearchConfig
from longrope2.search.workers import Score
from longrope2.segments.needle_set import NeedleSet


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """Ids [T], what starts a document first, and the index of the first scored one, >= 1."""

    tokens: np.ndarray
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Scored tokens."""
        return len(self.tokens) - self.first_scored


def needle_samples(needles: NeedleSet) -> list[ScoredSample]:
    """Needle samples, scored on their value."""
    return [ScoredSample(sample.through_value, sample.value_start) for sample in needles.samples]


def cut_documents(
    documents: Iterable[Sequence[int]], start_ids: Sequence[int], length: int, num_samples: int
) -> list[ScoredSample]:
    """Long documents scored on every token: ``start_ids`` and the first ids, ``length`` in all.

    Those too short are joined; none serves two samples. ``documents`` come without ``start_ids``.

    Raises:
        DataError: too little text.
    """
    samples: list[ScoredSample] = []
    joined, needed = np.empty(0, dtype=np.int64), length - len(start_ids)
    for document in documents:
        if len(samples) == num_samples:
            break
        joined = np.concatenate([joined, np.asarray(document, dtype=np.int64)])
        if len(joined) >= needed:
            tokens = np.concatenate([np.asarray(start_ids, dtype=np.int64), joined[:needed]])
            samples.append(ScoredSample(tokens, first_scored=1))
            joined = np.empty(0, dtype=np.int64)
    if len(samples) < num_samples:
        raise DataError(
            f"search.num_samples={num_samples} samples of {length} tokens are wanted, the held-out "
            f"text is enough for {len(samples)}; lower search.num_samples or use a larger corpus"
        )
    return samples


def samples_sha256(samples: Sequence[ScoredSample]) -> str:
    """Hash of the token ids and of what is scored."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.tokens)} {sample.first_scored} ".encode())
        digest.update(sample.tokens.astype("<i8").tobytes())
    return digest.hexdigest()


def perplexity(loss_sum: float, num_scored_tokens: int) -> float:
    """exp(mean loss); infinite where the sum is not finite or the power overflows."""
    mean = loss_sum / num_scored_tokens
    return math.exp(mean) if mean < 700 else math.inf


class SampleLosses:
    """The loss of every sample under given factors, in fixed batches.

    With a ``sequence_group`` its processes share every sample: each computes a contiguous chunk of
    the tokens, heads are exchanged for tokens in every layer, and the losses are summed over the
    group.
    """

    def __init__(
        self,
        model: WindowedModel,
        samples: Sequence[ScoredSample],
        batch_size: int = 1,
        window: Window = Window.LONG,
        sequence_group: ProcessGroup | None = None,
    ) -> None:
        self.model, self.samples = model, tuple(samples)
        self.num_samples, self.num_batches = len(samples), -(-len(samples) // batch_size)
        self.num_scored_tokens = sum(sample.num_scored for sample in samples)
        self._batch_size, self._window, self._group = batch_size, window, sequence_group

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Summed loss of each sample of one batch, nats."""
        self.model.set_factors(factors)
        samples = self.samples[batch * self._batch_size : (batch + 1) * self._batch_size]
        if self._group is not None:
            return [self._shared_loss(sample, self._group) for sample in samples]
        device = next(self.model.parameters()).device
        tokens_BT = torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(device)
        first = min(sample.first_scored for sample in samples)
        losses_BS = token_nll(self.model, tokens_BT, self._window, first).double()
        starts = [sample.first_scored - first for sample in samples]
        return [row[n:].sum().item() for row, n in zip(losses_BS, starts, strict=True)]

    @torch.no_grad()
    def _shared_loss(self, sample: ScoredSample, group: ProcessGroup) -> float:
        """Loss of one sample spread over a group; the same number in all its processes."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        num_inputs, device = len(sample.tokens) - 1, self.model.hf.device
        # Padded on the right to a multiple of the group's size, which no scored token sees.
        padded = np.pad(sample.tokens, (0, -num_inputs % size), mode="edge")
        start, stop = chunk_bounds(len(padded) - 1, rank, size)
        layout = build_layout(
            self._window,
            [len(padded) - 1],
            sequence_rank=rank,
            sequence_group=group,
            sequence_size=size,
            device=device,
        )
        tokens_T = torch.from_numpy(padded).to(device)
        hidden_BTH = self.model.hidden_states(tokens_T[None, start:stop], self._window, layout)
        first, last = (min(max(p, start), stop) for p in (sample.first_scored - 1, num_inputs))
        scored_BSH = hidden_BTH[:, first - start : last - start]
        targets_BS = tokens_T[None, first + 1 : last + 1]
        loss = head_nll(self.model, scored_BSH, targets_BS).double().sum()
        dist.all_reduce(loss, group=group)
        return loss.item()


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


def check_factors_matter(unscaled: Score, interpolated: Score) -> None:
    """Self-test (b): unscaled and interpolated RoPE give different losses on the search's samples.

    It costs nothing: both are among the closed forms that every search is compared with.

    Raises:
        ArtifactError: they do not: the model's RoPE is applied elsewhere, and every candidate would
            score the same.
    """
    if unscaled.batch_losses == interpolated.batch_losses:
        raise ArtifactError(
            f"the loss is {unscaled.loss_sum:.6g} with the unscaled and with the interpolated RoPE "
            "alike: this model does not apply the rescale factors it is given; its class is not "
            "supported"
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


def _perplexity(losses: SampleLosses, factors: RescaleFactors) -> float:
    batches = (losses(factors, batch) for batch in range(losses.num_batches))
    return perplexity(math.fsum(chain.from_iterable(batches)), losses.num_scored_tokens)
