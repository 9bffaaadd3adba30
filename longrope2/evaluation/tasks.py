"""Tasks (one suite at one length, on fixed data) and the loop that measures them for every subject.

Suites: ``needle`` (exact match and likelihood of a hidden value), ``perplexity`` (the same text tokens after more and
more context), ``retention`` (text inside the original window). Lengths up to L0 are read in the short window, longer
ones in the long window, as in generation.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longrope2.evaluation.results import Measurement, ResultsLog
from longrope2.evaluation.scoring import WindowScore, score_values, score_windows
from longrope2.evaluation.subjects import Subject
from longrope2.inference import window_for_length
from longrope2.model import WindowedModel, load_windowed_model
from longrope2.rope import Window
from longrope2.segments.needle_set import NeedleSet

__all__ = ["Task", "device_and_dtype", "measure_all", "needle_task", "perplexity_task", "retention_task"]


@dataclass(frozen=True)
class Task:
    """One suite at one length: the same data for every subject."""

    suite: str
    length: int
    window: Window
    data_sha256: str
    measure: Callable[[WindowedModel], dict[str, Any]]
    """Raw numbers of one model; plain JSON values."""


def needle_task(needle_set: NeedleSet, original_len: int, batch_tokens: int) -> Task:
    """Retrieval at the length of ``needle_set``; one entry per sample and list."""

    def measure(model: WindowedModel) -> dict[str, Any]:
        scores = score_values(model, needle_set, batch_tokens)
        return {
            "depths": [sample.depth for sample in needle_set.samples],
            "exact": [int(score.exact) for score in scores],
            "nll": [score.nll for score in scores],
            "num_tokens": [score.num_tokens for score in scores],
        }

    data = [np.append(sample.tokens, sample.value_start) for sample in needle_set.samples]
    window = window_for_length(needle_set.length, original_len)
    return Task("needle", needle_set.length, window, _data_sha256(data), measure)


def perplexity_task(windows: Sequence[np.ndarray], num_scored: int, original_len: int, batch_tokens: int) -> Task:
    """Likelihood of the last ``num_scored`` tokens of windows of one length."""

    def measure(model: WindowedModel) -> dict[str, Any]:
        return _window_values(score_windows(model, windows, num_scored=num_scored, batch_tokens=batch_tokens))

    length = len(windows[0]) + 1  # a window leaves the place of a closing EOS empty
    data_sha256 = _data_sha256([*windows, np.array([num_scored])])
    return Task("perplexity", length, window_for_length(length, original_len), data_sha256, measure)


def retention_task(windows: Sequence[np.ndarray], original_len: int, batch_tokens: int) -> Task:
    """Likelihood of all tokens (but each BOS) of windows of at most L0 tokens."""

    def measure(model: WindowedModel) -> dict[str, Any]:
        return _window_values(score_windows(model, windows, num_scored=None, batch_tokens=batch_tokens))

    return Task("retention", original_len, Window.SHORT, _data_sha256(windows), measure)


def measure_all(subjects: Iterable[Subject], tasks: Sequence[Task], results: ResultsLog) -> Iterator[Measurement]:
    """Measure every task of every subject, subject by subject; what ``results`` holds already is not measured again.

    A model is loaded when its first missing measurement comes up, and stays loaded while subjects share its weights.
    """
    loaded: tuple[str, WindowedModel] | None = None
    device, dtype = device_and_dtype()
    for subject in subjects:
        for task in tasks:
            fingerprint = _fingerprint(subject, task, dtype)
            values = results.find(fingerprint)
            if values is None:
                if loaded is None or loaded[0] != subject.weights_sha256:
                    loaded = None  # free the weights before the next ones are read
                    model = load_windowed_model(subject.folder, subject.factors, device=device, dtype=dtype).eval()
                    loaded = (subject.weights_sha256, model)
                loaded[1].set_factors(subject.factors)
                values = task.measure(loaded[1])
            measurement = Measurement(subject.name, task.suite, task.length, fingerprint, values)
            results.append(measurement)
            yield measurement


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """GPU in bf16 where there is one, else CPU in fp32: bf16 products on a CPU are some hundred times slower."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _window_values(scores: Sequence[WindowScore]) -> dict[str, Any]:
    """Raw numbers of text windows, one entry per window."""
    return {"nll": [score.nll for score in scores], "num_tokens": [score.num_tokens for score in scores]}


def _fingerprint(subject: Subject, task: Task, dtype: torch.dtype) -> str:
    """Hash of everything a measurement depends on."""
    parts = [subject.weights_sha256, subject.table_identity(task.window), str(dtype), task.suite, task.data_sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _data_sha256(arrays: Iterable[np.ndarray]) -> str:
    """Hash over token arrays, their borders included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()
