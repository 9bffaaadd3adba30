"""The runner of generation tasks: every sample answered for every subject, once.

A request is one sample put to one subject. Its answer, decoded greedily, depends on the request
alone: not on the batch, the shard, or how often the run was killed. Requests are ordered longest
first, so that a length that does not fit into memory shows at once and the time left is never
underestimated.

``PrefixDecoder`` reads a common beginning of prompts once. Prompts are read in chunks of fixed
size; the next prompt takes over the whole chunks that it has in common with the last: keys and
values of the same ids in the same chunks are bit for bit what reading them again would give. A
cache is taken over only under the same weights and the same RoPE table; a sequence that will
outgrow L0 starts anew.

Shape legend: T = tokens, V = vocabulary.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from longrope2.evaluation.results import Answer, AnswersLog, Shard
from longrope2.evaluation.samples import GenerationTask, Sample
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.inference.batch import generate_batch
from longrope2.inference.cache import next_logits
from longrope2.inference.generation import generate_tokens, window_for_length
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window

_LENGTH_CLASSES = 32
"""Steps of a task's length; prompts of one step count as equally long."""
_OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
GenerateAnswers = Callable[[WindowedModel, Sequence[Sample], Collection[int]], list[list[int]]]


class PrefixDecoder:
    """Answers one prompt after another, keeping the last one's keys and values.

    Attributes:
        num_reused: Prompt tokens that did not have to be read again, over all prompts.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.num_reused = 0
        self._cache: DynamicCache | None = None
        self._prompt_T = np.empty(0, dtype=np.int32)
        self._table = b""
        self._weights: weakref.ref | None = None

    def __call__(
        self, model: WindowedModel, samples: Sequence[Sample], stop_ids: Collection[int]
    ) -> list[list[int]]:
        """Greedy answers: the new ids of each, a stop id included."""
        return [self._answer(model, sample, stop_ids) for sample in samples]

    def forget(self) -> None:
        """Free the cache."""
        self._cache = None

    def _answer(self, model: WindowedModel, sample: Sample, stop_ids: Collection[int]) -> list[int]:
        original_len, num_prompt = model.factors.geometry.original_len, len(sample.prompt_T)
        window = window_for_length(num_prompt, original_len)
        longest_read = num_prompt + sample.max_new_tokens - 1
        switches = window_for_length(longest_read, original_len) is not window
        if switches or longest_read >= model.factors.target_len:
            # It changes its window on the way, or does not fit: the plain decoder knows both.
            self.forget()
            prompt, most = sample.prompt_T.tolist(), sample.max_new_tokens
            options: Any = {"stop_ids": stop_ids, "prefill_chunk": self.chunk_tokens}
            tokens = generate_tokens(model, prompt, max_new_tokens=most, **options)
            return [token.token_id for token in tokens]
        try:
            return self._decode(model, sample, window, frozenset(stop_ids))
        except BaseException:
            self.forget()
            raise

    def _decode(
        self, model: WindowedModel, sample: Sample, window: Window, stop_ids: frozenset[int]
    ) -> list[int]:
        cache, start = self._taken_over(model, sample.prompt_T, window)
        self.num_reused += start
        prompt_1T = torch.from_numpy(sample.prompt_T.astype(np.int64))[None]
        logits_1V = torch.empty(0)
        for first in range(start, prompt_1T.shape[1], self.chunk_tokens):
            chunk_1T = prompt_1T[:, first : first + self.chunk_tokens]
            logits_1V = next_logits(model, chunk_1T, cache, window)
        new_ids = [int(logits_1V[0].argmax())]
        while len(new_ids) < sample.max_new_tokens and new_ids[-1] not in stop_ids:
            logits_1V = next_logits(model, torch.tensor([new_ids[-1:]]), cache, window)
            new_ids.append(int(logits_1V[0].argmax()))
        self._cache, self._prompt_T = cache, sample.prompt_T
        self._table, self._weights = _table(model, window), weakref.ref(model.hf)
        return new_ids

    def _taken_over(
        self, model: WindowedModel, prompt_T: np.ndarray, window: Window
    ) -> tuple[DynamicCache, int]:
        """The last cache cut back to the chunks in common, or a fresh one; and its tokens."""
        cache, self._cache = self._cache, None
        same_weights = self._weights is not None and self._weights() is model.hf
        if cache is None or not same_weights or self._table != _table(model, window):
            return DynamicCache(), 0
        # The last token of a prompt is always read: its logits are needed.
        both = min(len(prompt_T) - 1, len(self._prompt_T))
        differ = np.flatnonzero(prompt_T[:both] != self._prompt_T[:both])
        common = int(differ[0]) if len(differ) else both
        kept = common // self.chunk_tokens * self.chunk_tokens
        if kept == 0:
            return DynamicCache(), 0
        if (removed := cache.get_seq_length() - kept) > 0:
            cache.crop(-removed)
        return cache, kept


def _table(model: WindowedModel, window: Window) -> bytes:
    scale = repr(model.factors.attention_scale(window)).encode()
    return model.factors.inverse_frequencies(window).numpy().tobytes() + scale


@dataclass(frozen=True)
class Request:
    """One sample put to one subject."""

    subject: Subject
    task: GenerationTask
    sample: Sample
    key: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.sample.prompt_T) + self.sample.max_new_tokens

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Who is asked what at which length: subject, suite, task, tokens."""
        return self.subject.name, self.task.suite, self.task.name, self.task.length


@dataclass(frozen=True)
class NotMeasured:
    """A task that one subject could not finish at one length."""

    subject: str
    suite: str
    task: str
    length: int
    reason: str

    @property
    def place(self) -> tuple[str, str, str, int]:
        """As ``Request.place``: another subject may have been able to."""
        return self.subject, self.suite, self.task, self.length

    def __str__(self) -> str:
        place = f"{self.suite}/{self.task} at {self.length} tokens, {self.subject}"
        return f"{place}: not measured, {self.reason}"


def answer_windows(num_prompt: int, num_new: int, original_len: int) -> tuple[int, int]:
    """New tokens predicted with the original and with the rescaled RoPE."""
    read = range(num_prompt, num_prompt + num_new)
    num_short = sum(window_for_length(n, original_len) is Window.SHORT for n in read)
    return num_short, num_new - num_short


def sample_key(
    subject: Subject, sample: Sample, *, dtype: torch.dtype, stop_ids: Collection[int]
) -> str:
    """Fingerprint of everything an answer depends on; equal for subjects that are alike in it."""
    original_len = subject.factors.geometry.original_len
    num_short, num_long = answer_windows(len(sample.prompt_T), sample.max_new_tokens, original_len)
    windows = ([Window.SHORT] if num_short else []) + ([Window.LONG] if num_long else [])
    tables = [subject.table_identity(window) for window in windows]
    boundary = original_len if len(windows) == 2 else None
    parts = [subject.weights_sha256, tables, boundary, str(dtype), sorted(stop_ids), sample.sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_requests(
    subjects: Sequence[Subject],
    tasks: Sequence[GenerationTask],
    *,
    dtype: torch.dtype,
    stop_ids: Collection[int],
) -> list[Request]:
    """Every request once, in the order in which they are put.

    Within a subject: longest first; requests of about one length are ordered by their prompts'
    ids, so that what prompts have in common is read once (``PrefixDecoder``).
    """
    requests, known = [], set()
    for subject in subjects:
        own = []
        for task in tasks:
            asked = []
            for sample in task.samples:
                key = sample_key(subject, sample, dtype=dtype, stop_ids=stop_ids)
                if key not in known:
                    known.add(key)
                    asked.append(Request(subject, task, sample, key))
            # Task by task: the sort key copies the prompts.
            own += sorted(asked, key=_place_in_task)
        requests += sorted(own, key=lambda r: (-r.task.length, r.task.suite, r.task.name))
    return requests


def _place_in_task(request: Request) -> tuple[int, bytes]:
    # Rounded up: prompts cut to length are in one.
    length_class = -(-_LENGTH_CLASSES * request.num_tokens // request.task.length)
    ids = request.sample.prompt_T.astype(">u4").tobytes()  # big-endian: bytes sort as the ids do
    return -length_class, ids


def shard_requests(requests: Sequence[Request], shard: Shard) -> list[Request]:
    """The requests of one shard."""
    return list(requests[shard.index :: shard.count])


def answer_requests(
    requests: Sequence[Request],
    log: AnswersLog,
    tokenizer: PreTrainedTokenizerBase,
    models: SubjectModels,
    *,
    stop_ids: Collection[int],
    batch_tokens: int,
    generate: GenerateAnswers,
) -> Iterator[Request | NotMeasured]:
    """Answer what ``log`` does not hold yet.

    Yields every request as it is done, and every task that was given up. When memory runs out for
    a batch, it is split; for one request alone, the rest of its task at that length is given up for
    this subject. Each batch is on disk before the next one starts; ``batch_tokens`` counts prompts
    and longest answers.
    """
    given_up: set[tuple[str, str, str, int]] = set()
    unanswered = [request for request in requests if log.find(request.key) is None]
    yield from (request for request in requests if log.find(request.key) is not None)
    waiting = list(reversed(batches_of(unanswered, batch_tokens)))
    while waiting:
        batch = [request for request in waiting.pop() if request.place not in given_up]
        if not batch:
            continue
        subject, samples = batch[0].subject, [request.sample for request in batch]
        models.of(subject)  # not under the handler: weights that do not fit are no request's fault
        try:
            token_ids = generate(models.of(subject), samples, stop_ids)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            # Leave the handler first: its traceback holds the tensors that filled the memory.
            token_ids = None
        if token_ids is not None:
            pairs = zip(batch, token_ids, strict=True)
            log.append(_answer(request, ids, tokenizer, stop_ids) for request, ids in pairs)
            yield from batch
            continue
        if models.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]
        else:
            given_up.add(batch[0].place)
            where = f"{models.device.type} with one sequence of {batch[0].num_tokens} tokens"
            yield NotMeasured(*batch[0].place, f"out of memory on {where}")


def batches_of(requests: Sequence[Request], batch_tokens: int) -> list[list[Request]]:
    """Consecutive requests of one place whose padded tokens fit ``batch_tokens`` together."""
    batches: list[list[Request]] = []
    for request in requests:
        last = batches[-1] if batches else []
        longest = max(r.num_tokens for r in [*last, request])
        if last and last[0].place == request.place and longest * (len(last) + 1) <= batch_tokens:
            last.append(request)
        else:
            batches.append([request])
    return batches


def make_decoder(decode_rows: int, prefill_chunk: int) -> GenerateAnswers:
    """How answers are decoded: one by one (``PrefixDecoder``), or several rows together."""
    if decode_rows == 1:
        return PrefixDecoder(prefill_chunk)
    how = {"prefill_chunk": prefill_chunk, "max_rows": decode_rows}

    def decode(
        model: WindowedModel, samples: Sequence[Sample], stop_ids: Collection[int]
    ) -> list[list[int]]:
        prompts = [sample.prompt_T.tolist() for sample in samples]
        most = [sample.max_new_tokens for sample in samples]
        options: Any = {"stop_ids": stop_ids, **how}
        ids = []
        for tokens in generate_batch(model, prompts, max_new_tokens=most, **options):
            ids.append([token.token_id for token in tokens])
        return ids

    return decode


def _answer(
    request: Request,
    token_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> Answer:
    """The line to keep; its text is that of the new ids alone, without special tokens."""
    sample, original_len = request.sample, request.subject.factors.geometry.original_len
    num_read, num_new = len(sample.prompt_T), len(token_ids)
    num_short, num_long = answer_windows(num_read, num_new, original_len)
    kept = token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    about = request.key, *request.place, sample.sha256
    return Answer(*about, text, tuple(token_ids), num_short=num_short, num_long=num_long)


def _is_out_of_memory(error: BaseException) -> bool:
    """Also on the CPU and for cuBLAS's own memory, where torch raises a plain RuntimeError."""
    is_said = any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)
    return is_said or isinstance(error, (MemoryError, torch.OutOfMemoryError))
