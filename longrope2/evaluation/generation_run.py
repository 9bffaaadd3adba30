"""The runner of generation tasks: every sample answered for every subject, once.

A question is one sample put to one subject. Its answer is looked up by a fingerprint of what it depends on: weights,
the RoPE tables of the window(s) it is read in, L0, dtype, stop ids and the sample itself. Decoding is greedy. Questions
are ordered subject by subject and longest first, so that a length that does not fit into memory shows at once and the
time left is never underestimated; shards take every n-th question of that order. An answer depends on its question
alone: not on the batch, the shard, or how often the run was killed.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from longrope2.evaluation.answers import Answer, AnswersLog, Shard
from longrope2.evaluation.prefix_cache import PrefixDecoder
from longrope2.evaluation.samples import GenerationTask, Sample
from longrope2.evaluation.subjects import Subject
from longrope2.inference import generate_batch, window_for_length
from longrope2.model import WindowedModel, load_windowed_model
from longrope2.rope import Window

__all__ = [
    "NotMeasured",
    "Question",
    "answer_questions",
    "answer_windows",
    "batches_of",
    "make_decoder",
    "plan_questions",
    "sample_key",
    "shard_questions",
]

LENGTH_CLASSES = 32
"""Steps of a task's length; prompts of one step count as equally long."""

OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

GenerateAnswers = Callable[[WindowedModel, Sequence[Sample], Collection[int]], list[list[int]]]


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
    num_short = sum(window_for_length(num_prompt + i, original_len) is Window.SHORT for i in range(num_new))
    return num_short, num_new - num_short


def sample_key(subject: Subject, sample: Sample, *, dtype: torch.dtype, stop_ids: Collection[int]) -> str:
    """Fingerprint of everything an answer depends on; subjects that are the same model for it share it."""
    original_len = subject.factors.geometry.original_len
    num_short, num_long = answer_windows(len(sample.prompt_T), sample.max_new_tokens, original_len)
    windows = ([Window.SHORT] if num_short else []) + ([Window.LONG] if num_long else [])
    tables = [subject.table_identity(window) for window in windows]
    boundary = original_len if len(windows) == 2 else None
    parts = [subject.weights_sha256, tables, boundary, str(dtype), sorted(stop_ids), sample.sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def plan_questions(
    subjects: Sequence[Subject], tasks: Sequence[GenerationTask], *, dtype: torch.dtype, stop_ids: Collection[int]
) -> list[Question]:
    """Every question once, in the order in which they are put.

    Within a subject: longest first; questions of about one length are ordered by their prompts' ids, so that prompts
    with much in common follow each other (lines of noise up to the needle, say) and are read once (``PrefixDecoder``).
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
        questions += sorted(own, key=lambda question: (-question.task.length, question.task.suite, question.task.name))
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
    """Answer what ``log`` does not hold yet; yields every question as it is done, and every task that was given up.

    When memory runs out for one question alone, the rest of its task at that length is given up for this subject, and
    everything else goes on; when it runs out for a batch, the batch is split.

    Args:
        questions: From ``plan_questions``, or a shard of them.
        log: Where answers are kept; each batch is on disk before the next one starts.
        tokenizer: Turns new ids into text.
        device: Where the model runs.
        dtype: Of the weights.
        stop_ids: Ids that end an answer.
        batch_tokens: Tokens of the prompts and answers that are decoded together; at least one question is taken.
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
            model = load_windowed_model(subject.folder, subject.factors, device=device, dtype=dtype).eval()
            loaded = (subject.weights_sha256, model)
        loaded[1].set_factors(subject.factors)
        try:
            token_ids = generate(loaded[1], [question.sample for question in batch], stop_ids)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            token_ids = None  # leave the handler first: its traceback holds the tensors that filled the memory
        if token_ids is not None:
            log.append(_answer(q, ids, tokenizer, stop_ids) for q, ids in zip(batch, token_ids, strict=True))
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

    def decode(model: WindowedModel, samples: Sequence[Sample], stop_ids: Collection[int]) -> list[list[int]]:
        answers = generate_batch(
            model, [sample.prompt_T.tolist() for sample in samples],
            max_new_tokens=[sample.max_new_tokens for sample in samples], stop_ids=stop_ids,
            prefill_chunk=prefill_chunk, max_rows=decode_rows,
        )  # fmt: skip
        return [[token.token_id for token in tokens] for tokens in answers]

    return decode


def _answer(
    question: Question, token_ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
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
        question.key, question.subject.name, task.suite, task.name, task.length, sample.sha256, text, tuple(token_ids),
        num_short, num_long,
    )  # fmt: skip


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
