"""Greedy answers that read a common beginning of prompts once.

Prompts are read in chunks of fixed size, counted from the first token. The cache of the last prompt
is kept, and the next prompt takes over the whole chunks that both have in common: those keys and
values were computed from the same ids in the same chunks, so they are bit for bit what reading them
again would give. A cache is taken over only under the same weights and the same RoPE table; a
sequence that will outgrow L0 starts anew.

Shape legend: T = tokens, V = vocabulary.

The runner of generation tasks: every sample answered for every subject, once.

A question is one sample put to one subject. Its answer is looked up by a fingerprint of what it
depends on: weights, the RoPE tables of the window(s) it is read in, L0, dtype, stop ids and the
sample itself. Decoding is greedy. Questions are ordered subject by subject and longest first, so
that a length that does not fit into memory shows at once and the time left is never underestimated;
shards take every n-th question of that order. An answer depends on its question alone: not on the
batch, the shard, or how often the run was killed.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from longrope2.evaluation.results import Answer, AnswersLog, Shard
from longrope2.evaluation.samples import GenerationTask, Sample
from longrope2.evaluation.subjects import Subject
from longrope2.inference.batch import generate_batch
from longrope2.inference.cache import next_logits
from longrope2.inference.generation import generate_tokens, window_for_length
from longrope2.model.loading import load_windowed_model
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window

LENGTH_CLASSES = 32
"""Steps of a task's length; prompts of one step count as equally long."""
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
GenerateAnswers = Callable[[WindowedModel, Sequence[Sample], Collection[int]], list[list[int]]]


class PrefixDecoder:
    """Answers one question after another, keeping the last prompt's keys and values.

    Attributes:
        num_reused: Prompt tokens that did not have to be read again, over all questions.
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
        """One answer."""
        original_len = model.factors.geometry.original_len
        window = window_for_length(len(sample.prompt_T), original_len)
        longest_read = len(sample.prompt_T) + sample.max_new_tokens - 1
        if (
            window_for_length(longest_read, original_len) is not window
            or longest_read >= model.factors.target_len
        ):
            self.forget()  # it changes its window on the way, or does not fit: the plain decoder knows both
            tokens = generate_tokens(
                model,
                sample.prompt_T.tolist(),
                max_new_tokens=sample.max_new_tokens,
                stop_ids=stop_ids,
                prefill_chunk=self.chunk_tokens,
            )
            return [token.token_id for token in tokens]
        try:
            return self._decode(model, sample, window, frozenset(stop_ids))
        except BaseException:
            self.forget()
            raise

    def _decode(
        self, model: WindowedModel, sample: Sample, window: Window, stop_ids: frozenset[int]
    ) -> list[int]:
        """Read what is new of the prompt, then decode."""
        cache, start = self._taken_over(model, sample.prompt_T, window)
        self.num_reused += start
        prompt_1T = torch.from_numpy(sample.prompt_T.astype(np.int64))[None]
        logits_1V = torch.empty(0)
        for first in range(start, prompt_1T.shape[1], self.chunk_tokens):
            logits_1V = next_logits(
                model, prompt_1T[:, first : first + self.chunk_tokens], cache, window
            )
        new_ids = [int(logits_1V[0].argmax())]
        while len(new_ids) < sample.max_new_tokens and new_ids[-1] not in stop_ids:
            new_ids.append(
                int(next_logits(model, torch.tensor([new_ids[-1:]]), cache, window)[0].argmax())
            )
        self._cache, self._prompt_T = cache, sample.prompt_T
        self._table, self._weights = _table(model, window), weakref.ref(model.hf)
        return new_ids

    def _taken_over(
        self, model: WindowedModel, prompt_T: np.ndarray, window: Window
    ) -> tuple[DynamicCache, int]:
        """The last cache cut back to the whole chunks in common, or a fresh one; and how many tokens it holds."""
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
    """All that decides the RoPE of a window."""
    scale = repr(model.factors.attention_scale(window)).encode()
    return model.factors.inverse_frequencies(window).numpy().tobytes() + scale


@dataclass(frozen=True)
class Question:
    """One sample put to one subject."""

    subject: Subject
    task: GenerationTask
    sample: Sample
    key: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.sample.prompt_T) + self.sample.max_new_tokens


@dataclass(frozen=True)
class NotMeasured:
    """A task that one subject could not finish at one length."""

    subject: str
    suite: str
    task: str
    length: int
    reason: str

    def __str__(self) -> str:
        return f"{self.suite}/{self.task} at {self.length} tokens, {self.subject}: not measured, {self.reason}"


def answer_windows(num_prompt: int, num_new: int, original_len: int) -> tuple[int, int]:
    """New tokens predicted with the original and with the rescaled RoPE, for a prompt of ``num_prompt`` tokens."""
    num_short = sum(
        window_for_length(num_prompt + i, original_len) is Window.SHORT for i in range(num_new)
    )
    return num_short, num_new - num_short


def sample_key(
    subject: Subject, sample: Sample, *, dtype: torch.dtype, stop_ids: Collection[int]
) -> str:
    """Fingerprint of everything an answer depends on; subjects that are the same model for it share it."""
    original_len = subject.factors.geometry.original_len
    num_short, num_long = answer_windows(len(sample.prompt_T), sample.max_new_tokens, original_len)
    windows = ([Window.SHORT] if num_short else []) + ([Window.LONG] if num_long else [])
    tables = [subject.table_identity(window) for window in windows]
    boundary = original_len if len(windows) == 2 else None
    parts = [subject.weights_sha256, tables, boundary, str(dtype), sorted(stop_ids), sample.sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_questions(
    subjects: Sequence[Subject],
    tasks: Sequence[GenerationTask],
    *,
    dtype: torch.dtype,
    stop_ids: Collection[int],
) -> list[Question]:
    """Every question once, in the order in which they are put.

    Within a subject: longest first; questions of about one length are ordered by their prompts'
    ids, so that prompts with much in common follow each other (lines of noise up to the needle,
    say) and are read once (``PrefixDecoder``).
    """
    questions, known = [], set()
    for subject in subjects:
        own = []
        for task in tasks:
            asked = []
            for sample in task.samples:
                key = sample_key(subject, sample, dtype=dtype, stop_ids=stop_ids)
                if key not in known:
                    known.add(key)
                    asked.append(Question(subject, task, sample, key))
            own += sorted(asked, key=_place_in_task)
        questions += sorted(
            own,
            key=lambda question: (-question.task.length, question.task.suite, question.task.name),
        )
    return questions


def _place_in_task(question: Question) -> tuple[int, bytes]:
    """Sort key of a question within its task: it copies the prompt, so no more than one task is sorted by it at a time."""
    # Rounded up: prompts cut to length are in one.
    length_class = -(-LENGTH_CLASSES * question.num_tokens // question.task.length)
    ids = question.sample.prompt_T.astype(">u4").tobytes()  # big-endian: bytes sort as the ids do
    return -length_class, ids


def shard_questions(questions: Sequence[Question], shard: Shard) -> list[Question]:
    """The questions of one shard."""
    return list(questions[shard.index :: shard.count])


def answer_questions(
    questions: Sequence[Question],
    log: AnswersLog,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    dtype: torch.dtype,
    stop_ids: Collection[int],
    batch_tokens: int,
    generate: GenerateAnswers,
) -> Iterator[Question | NotMeasured]:
    """Answer what ``log`` does not hold yet; yields every question as it is done, and every task
    that was given up.

    When memory runs out for one question alone, the rest of its task at that length is given up for
    this subject, and everything else goes on; when it runs out for a batch, the batch is split.

    Args:
        questions: From ``plan_questions``, or a shard of them.
        log: Where answers are kept; each batch is on disk before the next one starts.
        tokenizer: Turns new ids into text.
        device: Where the model runs.
        dtype: Of the weights.
        stop_ids: Ids that end an answer.
        batch_tokens: Tokens of the prompts and answers that are decoded together; at least one
            question is taken.
        generate: Decodes a batch; see ``make_decoder``.
    """
    loaded: tuple[str, WindowedModel] | None = None
    given_up: set[tuple[str, str, str, int]] = set()
    open_questions = [question for question in questions if log.find(question.key) is None]
    yield from (question for question in questions if log.find(question.key) is not None)
    waiting = list(reversed(batches_of(open_questions, batch_tokens)))
    while waiting:
        batch = [question for question in waiting.pop() if _cell(question) not in given_up]
        if not batch:
            continue
        subject = batch[0].subject
        if loaded is None or loaded[0] != subject.weights_sha256:
            loaded = None  # free the weights before the next ones are read
            model = load_windowed_model(
                subject.folder, subject.factors, device=device, dtype=dtype
            ).eval()
            loaded = (subject.weights_sha256, model)
        loaded[1].set_factors(subject.factors)
        try:
            token_ids = generate(loaded[1], [question.sample for question in batch], stop_ids)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            token_ids = None  # leave the handler first: its traceback holds the tensors that filled the memory
        if token_ids is not None:
            log.append(
                _answer(q, ids, tokenizer, stop_ids)
                for q, ids in zip(batch, token_ids, strict=True)
            )
            yield from batch
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]
        else:
            given_up.add(_cell(batch[0]))
            yield _out_of_memory(batch[0], device)


def batches_of(questions: Sequence[Question], batch_tokens: int) -> list[list[Question]]:
    """Consecutive questions of one subject and one task whose padded tokens fit ``batch_tokens`` together."""
    batches: list[list[Question]] = []
    for question in questions:
        last = batches[-1] if batches else []
        longest = max((q.num_tokens for q in [*last, question]), default=0)
        if last and _cell(last[0]) == _cell(question) and longest * (len(last) + 1) <= batch_tokens:
            last.append(question)
        else:
            batches.append([question])
    return batches


def make_decoder(decode_rows: int, prefill_chunk: int) -> GenerateAnswers:
    """How answers are decoded: one by one with common beginnings read once, or several rows together."""
    if decode_rows == 1:
        return PrefixDecoder(prefill_chunk)

    def decode(
        model: WindowedModel, samples: Sequence[Sample], stop_ids: Collection[int]
    ) -> list[list[int]]:
        answers = generate_batch(
            model,
            [sample.prompt_T.tolist() for sample in samples],
            max_new_tokens=[sample.max_new_tokens for sample in samples],
            stop_ids=stop_ids,
            prefill_chunk=prefill_chunk,
            max_rows=decode_rows,
        )
        return [[token.token_id for token in tokens] for tokens in answers]

    return decode


def _answer(
    question: Question,
    token_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> Answer:
    """The line to keep; the text is that of the new ids alone, without the stop id and other special tokens."""
    sample, task = question.sample, question.task
    num_short, num_long = answer_windows(
        len(sample.prompt_T), len(token_ids), question.subject.factors.geometry.original_len
    )
    kept = token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Answer(
        question.key,
        question.subject.name,
        task.suite,
        task.name,
        task.length,
        sample.sha256,
        text,
        tuple(token_ids),
        num_short,
        num_long,
    )


def _cell(question: Question) -> tuple[str, str, str, int]:
    """Who is asked what at which length."""
    return question.subject.name, question.task.suite, question.task.name, question.task.length


def _out_of_memory(question: Question, device: torch.device) -> NotMeasured:
    """The record of a task given up."""
    subject, suite, task, length = _cell(question)
    reason = f"out of memory on {device.type} with one sequence of {question.num_tokens} tokens"
    return NotMeasured(subject, suite, task, length, reason)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch raises a plain RuntimeError on the CPU and for cuBLAS's own memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
