"""What a candidate is judged by: the loss of scored tokens of fixed samples at the target length.

Needle-driven perplexity [LongRoPE2, arXiv 2502.20082, sec. 3.2] scores the tokens of the value only; plain perplexity
scores every token. Both are exp(mean negative log-likelihood over the scored tokens of all samples).

Shape legend: B = samples of a batch, T = tokens of a sample, H = hidden size, S = scored tokens, V = vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope2.errors import DataError
from longrope2.model import WindowedModel
from longrope2.rope import RescaleFactors, Window
from longrope2.segments.needle_set import NeedleSet

__all__ = [
    "SampleLosses",
    "ScoredSample",
    "cut_documents",
    "needle_samples",
    "perplexity",
    "samples_sha256",
    "token_nll",
]

HEAD_CHUNK_TOKENS = 1024  # scored positions that pass the LM head together; bounds the memory of plain perplexity


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


@torch.no_grad()
def token_nll(model: WindowedModel, tokens_BT: Tensor, window: Window, first_scored: int = 1) -> Tensor:
    """Negative log-likelihood of the tokens from ``first_scored`` on, each row plain causal from position 0.

    The last token is only predicted, never fed, and only the positions that predict a scored token pass the LM head.

    Args:
        model: Model with the factors to judge.
        tokens_BT: Token ids.
        window: Which RoPE table to apply.
        first_scored: Index of the first scored token, >= 1.

    Returns:
        [B, T - first_scored], float32, nats.
    """
    hidden_BTH = model.hidden_states(tokens_BT[:, :-1], window)[:, first_scored - 1 :]
    head = model.hf.get_output_embeddings()
    losses_BS = [
        F.cross_entropy(head(hidden_BSH).float().transpose(1, 2), labels_BS, reduction="none")
        for hidden_BSH, labels_BS in zip(
            hidden_BTH.split(HEAD_CHUNK_TOKENS, dim=1),
            tokens_BT[:, first_scored:].split(HEAD_CHUNK_TOKENS, dim=1),
            strict=True,
        )
    ]
    return torch.cat(losses_BS, dim=1)


class SampleLosses:
    """The loss of every sample under given factors, batch by batch.

    Attributes:
        samples: The frozen samples.
        num_scored_tokens: Scored tokens of all samples.
    """

    def __init__(
        self, model: WindowedModel, samples: Sequence[ScoredSample], batch_size: int = 1, window: Window = Window.LONG
    ) -> None:
        self.samples = tuple(samples)
        self.num_scored_tokens = sum(sample.num_scored for sample in samples)
        self._model = model
        self._batch_size = batch_size
        self._window = window

    def __call__(self, factors: RescaleFactors, first_sample: int = 0) -> Iterator[list[float]]:
        """Summed loss of each sample from ``first_sample`` on; nothing is computed for batches that are not asked for.

        A batch is computed only when the iterator is advanced, so a caller may set other factors in between.
        """
        for start in range(first_sample, len(self.samples), self._batch_size):
            self._model.set_factors(factors)
            yield self._batch_losses(self.samples[start : start + self._batch_size])

    def _batch_losses(self, batch: Sequence[ScoredSample]) -> list[float]:
        """Summed loss of each sample of one batch; scoring starts at its own index in each."""
        device = next(self._model.parameters()).device
        tokens_BT = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(device)
        first = min(sample.first_scored for sample in batch)
        losses_BS = token_nll(self._model, tokens_BT, self._window, first).double()
        return [
            losses_S[sample.first_scored - first :].sum().item()
            for sample, losses_S in zip(batch, losses_BS, strict=True)
        ]
