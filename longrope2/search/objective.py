"""What a candidate is judged by: the loss of scored tokens of fixed samples at the target length.

Needle-driven perplexity [LongRoPE2, arXiv 2502.20082, sec. 3.2] scores the tokens of the value
only; plain perplexity scores every token. Both are exp(mean negative log-likelihood over the scored
tokens of all samples).

Shape legend: B = samples of a batch, T = tokens of a sample (of this process's share), H = hidden
size, S = scored tokens.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longrope2.attention.layout import Axis, build_layout
from longrope2.model.scoring import head_nll, logits_of_alike, token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import token_multiple
from longrope2.parallel.processes import Processes
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.segments.needle_set import NeedleSet


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """Ids [T], what starts a document first, and the index of the first scored one, >= 1.

    With ``others`` it is one of several rows of one length that begin alike: all are scored, and
    count as one sample, because what one text does to them is not independent.
    """

    tokens: np.ndarray
    first_scored: int
    others: tuple["ScoredSample", ...] = ()

    @property
    def rows(self) -> tuple["ScoredSample", ...]:
        """Each of them by itself."""
        return (replace(self, others=()), *self.others)

    @property
    def num_scored(self) -> int:
        """Scored tokens of all rows."""
        return sum(len(row.tokens) - row.first_scored for row in self.rows)


def needle_samples(needles: NeedleSet) -> list[ScoredSample]:
    """A sample for every haystack, scored on the values of its needles."""
    found = []
    for haystack in needles.haystacks:
        rows = [ScoredSample(sample.through_value, sample.value_start) for sample in haystack]
        found.append(replace(rows[0], others=tuple(rows[1:])))
    return found


def samples_sha256(samples: Sequence[ScoredSample]) -> str:
    """Hash of the token ids and of what is scored."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.others)} others ".encode() if sample.others else b"")
        for row in sample.rows:
            digest.update(f"{len(row.tokens)} {row.first_scored} ".encode())
            digest.update(row.tokens.astype("<i8").tobytes())
    return digest.hexdigest()


def perplexity(loss_sum: float, num_scored_tokens: int) -> float:
    """exp(mean loss); infinite where the sum is not finite or the power overflows."""
    mean = loss_sum / num_scored_tokens
    return math.exp(mean) if mean < 700 else math.inf


def _batches(lengths: Sequence[int], size: int) -> list[range]:
    """Consecutive sample numbers, at most ``size``, of one length."""
    found: list[range] = []
    for number, length in enumerate(lengths):
        last = found[-1] if found else range(0)
        if len(last) in (0, size) or lengths[last.start] != length:
            found.append(range(number, number + 1))
        else:
            found[-1] = range(last.start, number + 1)
    return found


class SampleLosses:
    """The loss of every sample under given factors, in fixed batches of samples of one length.

    Processes of a grid share every sample where the grid has ranks that share segments: each
    computes its share of the tokens, every layer exchanges what attention needs, and the losses are
    summed over them. The loss of a single token counts as ``highest_loss`` nats at most. Of a
    sample with others the beginning is read once, but not by such a grid, which reads every row.
    """

    def __init__(
        self,
        model: WindowedModel,
        samples: Sequence[ScoredSample],
        batch_size: int = 1,
        window: Window = Window.LONG,
        processes: Processes | None = None,
        *,
        highest_loss: float = math.inf,
    ) -> None:
        self.model, self.samples = model, tuple(samples)
        self.batches = _batches([len(sample.tokens) for sample in samples], batch_size)
        self.num_samples, self.num_batches = len(samples), len(self.batches)
        self.num_scored_tokens = sum(sample.num_scored for sample in samples)
        self.batch_size = batch_size
        self.window, self.highest_loss = window, highest_loss
        shares = processes is not None and processes.dims.segment_ranks > 1
        self.sharing = processes if shares else None

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Summed loss of each sample of one batch, nats."""
        return self.rows([(factors, number) for number in self.batches[batch]])

    def rows(self, pairs: Sequence[tuple[RescaleFactors, int]]) -> list[float]:
        """Summed loss, nats, of each sample (by its number) under its factors.

        The samples have one length, and are read in one forward; those with others one by one.
        """
        samples = [self.samples[number] for _, number in pairs]
        if self.sharing is not None:
            return [
                sum(self._shared_loss(factors, row, self.sharing) for row in sample.rows)
                for (factors, _), sample in zip(pairs, samples, strict=True)
            ]
        if any(sample.others for sample in samples):
            return [self._loss_of_alike(factors, self.samples[n]) for factors, n in pairs]
        is_same = all(factors is pairs[0][0] for factors, _ in pairs)
        self.model.set_factors(*[factors for factors, _ in (pairs[:1] if is_same else pairs)])
        device = next(self.model.parameters()).device
        tokens_BT = torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(device)
        first = min(sample.first_scored for sample in samples)
        nll_BS = token_nll(self.model, tokens_BT, self.window, first)
        losses_BS = nll_BS.double().clamp(max=self.highest_loss)
        starts = [sample.first_scored - first for sample in samples]
        return [row[n:].sum().item() for row, n in zip(losses_BS, starts, strict=True)]

    @torch.no_grad()
    def _loss_of_alike(self, factors: RescaleFactors, sample: ScoredSample) -> float:
        """Loss of all rows of one sample, what they have in common read once."""
        self.model.set_factors(factors)
        device = self.model.hf.device
        tokens_BT = torch.from_numpy(np.stack([row.tokens for row in sample.rows])).to(device)
        firsts = [row.first_scored for row in sample.rows]
        total = 0.0
        for row, logits_SV in enumerate(
            logits_of_alike(self.model, tokens_BT, self.window, firsts)
        ):
            nll_S = F.cross_entropy(logits_SV, tokens_BT[row, firsts[row] :], reduction="none")
            total += nll_S.double().clamp(max=self.highest_loss).sum().item()
        return total

    @torch.no_grad()
    def _shared_loss(
        self, factors: RescaleFactors, sample: ScoredSample, sharing: Processes
    ) -> float:
        """Loss of one row spread over ``sharing``; the same number in all its processes."""
        self.model.set_factors(factors)
        dims = sharing.dims
        num_inputs, device = len(sample.tokens) - 1, self.model.hf.device
        # Padded on the right to what can be shared, which no scored token sees.
        padding = -num_inputs % token_multiple(dims.sequence, dims.context)
        tokens_L = torch.from_numpy(np.pad(sample.tokens, (0, padding), mode="edge")).to(device)
        layout = build_layout(
            self.window,
            [len(tokens_L) - 1],
            sequence=Axis(dims.sequence_rank, dims.sequence, sharing.sequence_group),
            context=Axis(dims.context_rank, dims.context, sharing.context_group),
            device=device,
        )
        own_T = torch.cat([torch.arange(*span, device=device) for span in layout.own_spans])
        hidden_BTH = self.model.hidden_states(tokens_L[None, own_T], self.window, layout)
        is_scored_T = (own_T >= sample.first_scored - 1) & (own_T < num_inputs)
        targets_BS = tokens_L[None, own_T[is_scored_T] + 1]
        nll_BS = head_nll(self.model, hidden_BTH[:, is_scored_T], targets_BS)
        loss = nll_BS.double().clamp(max=self.highest_loss).sum()
        dist.all_reduce(loss, group=sharing.segment_group)
        return loss.item()
