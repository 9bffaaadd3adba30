"""The runner of generation tasks on a small model: shards, resuming, kills, memory, sides."""

import os
import random
import signal
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.errors import ArtifactError, ConfigError
from longrope2.evaluation.answering import (
    NotMeasured,
    answer_requests,
    answer_windows,
    batches_of,
    make_decoder,
    plan_requests,
    shard_requests,
)
from longrope2.evaluation.results import AnswersLog, Shard, read_answers
from longrope2.evaluation.run import _lacking
from longrope2.evaluation.samples import GenerationTask, Sample
from longrope2.evaluation.schema import Average, EffectiveLength
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.evaluation.summary import average_cells, effective_length, paired_rows, score_cells
from longrope2.model.folder import weights_sha256
from longrope2.model.loading import load_windowed_model
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ORIGINAL_LEN, TARGET_LEN, VOCABULARY, STOP = 16, 64, 61, 7
GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL_LEN)
ASKED = {"dtype": torch.float32, "stop_ids": {STOP}}


class NumberTokenizer:
    """Ids as numbers."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=ORIGINAL_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    weights = weights_sha256(folder)
    factors = {
        name: closed_form_factors(RopeMethod[name], GEOMETRY, TARGET_LEN)
        for name in ("none", "ntk")
    }
    return [Subject(name, folder, value, weights, False, {}) for name, value in factors.items()]


def make_task(name, lengths, seed, score=lambda sample, text: float(text == sample.answers[0])):
    rng = np.random.default_rng(seed)
    samples = tuple(
        Sample(rng.integers(8, VOCABULARY, n).astype(np.int32), ("8",), 6) for n in lengths
    )
    return GenerationTask("ruler", name, max(lengths) + 6, samples, score)


@pytest.fixture(scope="module")
def tasks():
    # Below L0 all the way, across it, exactly at it, and beyond it.
    return [
        make_task("a", [5, 8, 10], 1),
        make_task("b", [11, 14, 16, 17], 2),
        make_task("c", [30, 40, 58, 33], 3),
    ]


def answer_all(folder, subjects, tasks, shard=None, batch_tokens=1, generate=None):
    shard = shard or Shard()
    requests = shard_requests(plan_requests(subjects, tasks, **ASKED), shard)
    with AnswersLog(folder, shard) as log:
        return list(
            answer_requests(
                requests,
                log,
                NumberTokenizer(),
                SubjectModels(torch.device("cpu"), torch.float32),
                stop_ids={STOP},
                batch_tokens=batch_tokens,
                generate=generate or make_decoder(1, 8),
            )
        )


def known(folder):
    return {
        key: (a.token_ids, a.num_short, a.num_long, a.text)
        for key, a in read_answers(folder).items()
    }


@pytest.fixture(scope="module")
def expected(subjects, tasks, tmp_path_factory):
    """One process, one request at a time."""
    folder = tmp_path_factory.mktemp("expected")
    answer_all(folder, subjects, tasks)
    return known(folder)


def test_answers_are_those_of_plain_greedy_decoding_in_the_right_window(
    subjects, tasks, expected, tmp_path
):
    """Reference: the whole sequence read anew for every token, in the window of its length."""
    for request in plan_requests(subjects, tasks, **ASKED):
        model = load_windowed_model(request.subject.folder, request.subject.factors).eval()
        ids, sides = request.sample.prompt_T.tolist(), []
        for _ in range(request.sample.max_new_tokens):
            window = "short" if len(ids) <= ORIGINAL_LEN else "long"
            sides.append(window)
            with torch.no_grad():
                ids.append(int(model.logits(torch.tensor([ids]), window)[0, -1].argmax()))
            if ids[-1] == STOP:
                break
        found, num_short, num_long, _ = expected[request.key]
        assert list(found) == ids[len(request.sample.prompt_T) :]
        assert (num_short, num_long) == (sides.count("short"), sides.count("long"))


def test_subjects_share_the_answers_that_only_the_original_rope_is_asked_for(
    subjects, tasks, expected
):
    """A prompt of 11 with 6 new tokens reads 16 at most, still short; one of 12 may read 17."""
    requests = plan_requests(subjects, tasks, **ASKED)
    own = [r for r in requests if r.subject.name == "ntk"]
    assert len(requests) == len(expected) == 11 + 7
    assert sorted(len(r.sample.prompt_T) for r in own) == [14, 16, 17, 30, 33, 40, 58]


def test_windows_switch_after_the_original_length():
    assert answer_windows(11, 6, 16) == (6, 0)
    assert answer_windows(12, 6, 16) == (5, 1)
    assert answer_windows(16, 6, 16) == (1, 5)
    assert answer_windows(17, 6, 16) == (0, 6)


@pytest.mark.parametrize(("count", "batch_tokens", "rows"), [(1, 10_000, 4), (3, 60, 2), (5, 1, 1)])
def test_answers_do_not_depend_on_shards_or_batches(
    subjects, tasks, expected, tmp_path, count, batch_tokens, rows
):
    for index in reversed(range(count)):
        answer_all(
            tmp_path, subjects, tasks, Shard(index, count), batch_tokens, make_decoder(rows, 8)
        )
    assert known(tmp_path) == expected
    assert len(list(tmp_path.glob("answers*.jsonl"))) == count


def test_another_shard_count_asks_nothing_twice(subjects, tasks, expected, tmp_path):
    answer_all(tmp_path, subjects, tasks, Shard(0, 3))
    before = (tmp_path / "answers-1-of-3.jsonl").read_bytes()
    asked = []

    def generate(model, samples, stop_ids):
        asked.extend(samples)
        return make_decoder(1, 8)(model, samples, stop_ids)

    answer_all(tmp_path, subjects, tasks, generate=generate)
    assert known(tmp_path) == expected
    assert len(asked) == len(expected) - before.count(b"\n")
    assert (tmp_path / "answers-1-of-3.jsonl").read_bytes() == before


def test_a_torn_last_line_is_asked_again_and_whole_lines_stay(subjects, tasks, expected, tmp_path):
    answer_all(tmp_path, subjects, tasks)
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert len(read_answers(tmp_path)) == len(expected) - 1
    answer_all(tmp_path, subjects, tasks)
    assert path.read_bytes() == whole


def test_a_damaged_line_and_a_second_writer_are_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"key": "k"}\n')
    with pytest.raises(
        ArtifactError, match=r"answers.jsonl, line 1 is not an answer .* remove the line"
    ):
        AnswersLog(tmp_path, Shard())
    (tmp_path / "answers.jsonl").write_text("")
    with (
        AnswersLog(tmp_path, Shard()),
        pytest.raises(ArtifactError, match="is being written by another process"),
    ):
        AnswersLog(tmp_path, Shard())
    AnswersLog(tmp_path, Shard()).close()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_an_impossible_shard_is_refused(text):
    with pytest.raises(ConfigError, match=f"evaluation.shard={text} must be i/n"):
        Shard.parse(text)


def test_a_shard_splits_among_ranks():
    parts = [Shard.parse(f"{i}/2").within(rank, 3) for i in (1, 2) for rank in range(3)]
    assert sorted(part.index for part in parts) == list(range(6)) and {
        part.count for part in parts
    } == {6}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_gives_up_one_task_and_loses_nothing(
    subjects, tasks, expected, tmp_path, error
):
    """A batch too large is split; a request too large ends its task there for its subject."""

    def generate(model, samples, stop_ids):
        if sum(len(sample.prompt_T) for sample in samples) > 50:
            raise error
        return make_decoder(1, 8)(model, samples, stop_ids)

    done = answer_all(tmp_path, subjects, tasks, batch_tokens=10_000, generate=generate)
    lost = [row for row in done if isinstance(row, NotMeasured)]
    assert [(row.subject, row.task, row.length) for row in lost] == [
        ("none", "c", 64),
        ("ntk", "c", 64),
    ]
    assert str(lost[0]) == (
        "ruler/c at 64 tokens, none: not measured, out of memory on cpu with one sequence of "
        "64 tokens"
    )
    found = known(tmp_path)
    assert found == {key: expected[key] for key in found} and len(found) == len(expected) - 8
    with AnswersLog(tmp_path, Shard()) as log:
        cells = score_cells(subjects, tasks, log, lost, **ASKED)
    assert [(c.subject, c.task) for c in cells if c.score is None] == [("none", "c"), ("ntk", "c")]
    assert cells[2].reason.startswith("out of memory on cpu") and cells[2].num_missing == 4
    assert answer_all(tmp_path, subjects, tasks) and known(tmp_path) == expected


def test_what_one_subject_gave_up_another_still_owes(subjects, tasks, tmp_path):
    """A reason is its subject's own, and a shard does not sum up before the others' answers."""
    lost = [NotMeasured("none", "ruler", "c", 64, "out of memory on cpu")]
    with AnswersLog(tmp_path, Shard()) as log:
        cells = score_cells(subjects, tasks[2:], log, lost, **ASKED)
    assert [cell.reason for cell in cells] == ["out of memory on cpu", "not answered yet"]
    assert _lacking(cells, lost, short_elsewhere=False) == "4 answers of other shards are"
    lost.append(NotMeasured("ntk", "ruler", "c", 64, "out of memory on cpu"))
    assert _lacking(cells, lost, short_elsewhere=False) == ""


def test_another_fault_of_the_model_is_not_taken_for_memory(subjects, tasks, tmp_path):
    def generate(model, samples, stop_ids):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        answer_all(tmp_path, subjects, tasks, generate=generate)


def test_requests_are_put_in_order_without_a_copy_of_every_prompt(subjects):
    """The long suites ask 6,500 prompts of 131,072 tokens."""
    num_tokens, names = 90_000, [f"task {n:02d}" for n in reversed(range(12))]
    tasks = [
        GenerationTask(
            "ruler",
            name,
            num_tokens + 6,
            tuple(
                Sample(np.full(num_tokens, number, dtype=np.int32), (name,), 6)
                for number in (3, 1, 2)
            ),
            str.__eq__,
        )
        for name in names
    ]
    tracemalloc.start()
    requests = plan_requests(subjects[:1], tasks, **ASKED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 4 * num_tokens
    assert [r.task.name for r in requests] == [name for name in sorted(names) for _ in range(3)]
    assert [int(r.sample.prompt_T[0]) for r in requests] == [1, 2, 3] * len(names)


def test_batches_hold_one_task_and_fit(subjects, tasks):
    requests = plan_requests(subjects, tasks, **ASKED)
    batches = batches_of(requests, 60)
    assert [r for batch in batches for r in batch] == requests
    for batch in batches:
        assert len({(r.subject.name, r.task.name) for r in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(r.num_tokens for r in batch) <= 60
    assert any(len(batch) > 1 for batch in batches)


def test_cells_hold_scores_sides_averages_and_paired_tests(subjects, tasks, expected, tmp_path):
    by_length_of_text = [
        GenerationTask(t.suite, t.name, t.length, t.samples, lambda s, text: float(len(text) % 2))
        for t in tasks
    ]
    answer_all(tmp_path, subjects, by_length_of_text)
    with AnswersLog(tmp_path, Shard()) as log:
        cells = score_cells(subjects, by_length_of_text, log, [], **ASKED)
    by_place = {(c.subject, c.task): c for c in cells}
    across, beyond = by_place["ntk", "b"], by_place["ntk", "c"]
    sides = {side: row.num_samples for side, row in across.sides.items()}
    assert sides == {"short": 1, "both": 2, "long": 1}
    assert by_place["none", "c"].sides.keys() == {"long"}
    assert across.score == sum(across.scores) / 4 and across.first_100 == across.score
    (row,) = average_cells([replace(beyond, length=9), replace(across, length=9)])
    assert row.score == (beyond.score + across.score) / 2 and row.num_tasks == 2
    pairs = paired_rows(cells)
    assert [(p.first, p.second, p.task) for p in pairs] == [("ntk", "none", name) for name in "abc"]
    assert pairs[0].difference == 0 and pairs[0].p_value == 1
    assert pairs[2].difference == beyond.score - by_place["none", "c"].score
    # A base model that was not asked, beyond its window say, leaves the others to be compared with
    # each other.
    third = [replace(by_place["ntk", task], subject="pi") for task in "bc"]
    asked = [cell for cell in cells if (cell.subject, cell.task) != ("none", "c")]
    found = [(p.first, p.second, p.task) for p in paired_rows([*asked, *third], "none")]
    assert found == [
        ("ntk", "none", "a"),
        ("ntk", "none", "b"),
        ("pi", "none", "b"),
        ("pi", "ntk", "c"),
    ]


def test_effective_length_ends_at_the_first_gap_at_either_end_of_the_interval():
    def row(length, low, high, num_tasks=13):
        interval = None if low is None else (low, high)
        return Average("s", "ruler", length, num_tasks, low, interval=interval)

    def found(*rows):
        return effective_length(rows, "s")

    sure = row(4096, 0.857, 0.9)
    assert found(sure, row(8192, 0.86, 0.9), row(16384, 0.8, 0.856)) == EffectiveLength(
        "s", 8192, 8192
    )
    assert found(row(8192, 0.856, 0.87), row(16384, 0.9, 0.95), sure) == EffectiveLength(
        "s", 4096, 16384
    )
    assert found(sure, row(8192, None, None), row(16384, 0.9, 0.95)) == EffectiveLength(
        "s", 4096, 4096
    )
    assert found(row(4096, 0.7, 0.8), row(8192, 0.9, 0.95)) == EffectiveLength("s")
    two = found(row(4096, 0.9, 1.0, num_tasks=2))
    assert (two.surely, two.perhaps) == (None, None)
    assert two.reason == "2 of RULER's 13 tasks do not tell"


@pytest.mark.slow
def test_twenty_kills_change_no_answer(subjects, tasks, expected, tmp_path):
    """SIGKILL at random moments of forked processes, then one that ends by itself."""
    rng, kills, torch_threads = random.Random(5), 0, torch.get_num_threads()
    torch.set_num_threads(1)
    while kills < 20:
        child = os.fork()
        if child == 0:
            answer_all(tmp_path, subjects, tasks, Shard(kills % 2, 2), rng.choice([1, 100]))
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        for name in ("answers-1-of-2.jsonl", "answers-2-of-2.jsonl"):
            if (
                (tmp_path / name).is_file() and rng.random() < 0.3
            ):  # a tear that the fsync of a whole line rarely leaves
                data = (tmp_path / name).read_bytes()
                (tmp_path / name).write_bytes(data[: max(len(data) - rng.randrange(30), 0)])
        assert all(expected[key] == value for key, value in known(tmp_path).items())
    torch.set_num_threads(torch_threads)
    for index in range(2):
        answer_all(tmp_path, subjects, tasks, Shard(index, 2))
    assert known(tmp_path) == expected
