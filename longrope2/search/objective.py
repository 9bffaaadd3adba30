"""What a candidate is judged by: the loss of scored tokens of fixed samples at the target length.

Needle-driven perplexity [LongRoPE2, arXiv 2502.20082, sec. 3.2] scores the tokens of the value only; plain perplexity
scores every token. Both are exp(mean negative log-likelihood over the scored tokens of all samples).

Shape legend: B = samples of a batch, T = tokens of a sample (of this process's chunk), H = hidden size, S = scored tokens.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longrope2.attention import build_layout, chunk_bounds
from longrope2.errors import DataError
from longrope2.model import WindowedModel, head_nll, token_nll
from longrope2.rope import RescaleFactors, Window
from longrope2.segments.needle_set import NeedleSet

__all__ = ["SampleLosses", "ScoredSample", "cut_documents", "needle_samples", "perplexity", "samples_sha256"]


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """One text and where scoring starts.

    Attributes:
        tokens: Ids, shape [T], BOS first.
        first_scored: Index of the first scored token, >= 1; scoring goes to the end.
    """

    tokens: np.ndarray
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Scored tokens."""
        return len(self.tokens) - self.first_scored


def needle_samples(needles: NeedleSet) -> list[ScoredSample]:
    """Needle samples, scored on their value."""
    return [ScoredSample(sample.through_value, sample.value_start) for sample in needles.samples]


def cut_documents(documents: Iterable[Sequence[int]], bos_id: int, length: int, num_samples: int) -> list[ScoredSample]:
    """Long documents scored on every token: BOS and the first ``length - 1`` ids, documents joined where too short.

    Args:
        documents: Ids of texts without BOS, in the order they are to be used; each serves one sample only.
        bos_id: Put in front of every sample.
        length: Tokens of a sample.
        num_samples: Samples wanted.

    Raises:
        DataError: too little text.
    """
    samples: list[ScoredSample] = []
    joined = np.empty(0, dtype=np.int64)
    for document in documents:
        if len(samples) == num_samples:
            break
        joined = np.concatenate([joined, np.asarray(document, dtype=np.int64)])
        if len(joined) >= length - 1:
            samples.append(ScoredSample(np.concatenate([[bos_id], joined[: length - 1]]), first_scored=1))
            joined = np.empty(0, dtype=np.int64)
    if len(samples) < num_samples:
        raise DataError(
            f"search.num_samples={num_samples} samples of {length} tokens are wanted, the held-out text is enough for "
            f"{len(samples)}; lower search.num_samples or use a larger corpus"
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

    With a ``sequence_group`` its processes share every sample: each computes a contiguous chunk of the tokens, heads are
    exchanged for tokens in every layer, and the losses are summed over the group.

    Attributes:
        samples: The frozen samples.
        num_samples: Their number.
        num_batches: Batches they are divided into.
        num_scored_tokens: Scored tokens of all samples.
    """

    def __init__(
        self,
        model: WindowedModel,
        samples: Sequence[ScoredSample],
        batch_size: int = 1,
        window: Window = Window.LONG,
        sequence_group: ProcessGroup | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self.num_samples = len(samples)
        self.num_batches = -(-len(samples) // batch_size)
        self.num_scored_tokens = sum(sample.num_scored for sample in samples)
        self._model = model
        self._batch_size = batch_size
        self._window = window
        self._group = sequence_group

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Summed loss of each sample of one batch, nats."""
        self._model.set_factors(factors)
        samples = self.samples[batch * self._batch_size : (batch + 1) * self._batch_size]
        if self._group is not None:
            return [self._shared_loss(sample, self._group) for sample in samples]
        device = next(self._model.parameters()).device
        tokens_BT = torch.from_numpy(np.stack([sample.tokens for sample in samples])).to(device)
        first = min(sample.first_scored for sample in samples)
        losses_BS = token_nll(self._model, tokens_BT, self._window, first).double()
        return [
            losses_S[sample.first_scored - first :].sum().item()
            for sample, losses_S in zip(samples, losses_BS, strict=True)
        ]

    @torch.no_grad()
    def _shared_loss(self, sample: ScoredSample, group: ProcessGroup) -> float:
        """Loss of one sample whose tokens are spread over a group; the same number on all of its processes."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        num_inputs = len(sample.tokens) - 1
        # Padded on the right to a multiple of the group's size: under a causal mask no scored token sees it.
        padded = np.pad(sample.tokens, (0, -num_inputs % size), mode="edge")
        start, stop = chunk_bounds(len(padded) - 1, rank, size)
        layout = build_layout(
            self._window, [len(padded) - 1], sequence_rank=rank, sequence_group=group, sequence_size=size,
            device=self._model.hf.device,
        )  # fmt: skip
        tokens_T = torch.from_numpy(padded).to(self._model.hf.device)
        hidden_BTH = self._model.hidden_states(tokens_T[None, start:stop], self._window, layout)
        first, last = (min(max(p, start), stop) for p in (sample.first_scored - 1, num_inputs))
        losses_BS = head_nll(
            self._model, hidden_BTH[:, first - start : last - start], tokens_T[None, first + 1 : last + 1]
        )
        loss = losses_BS.double().sum()
        dist.all_reduce(loss, group=group)
        return loss.item()
