"""Short tasks through lm-eval: our model in the harness, with local tasks."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from longrope2.errors import ConfigError, DataError
from longrope2.evaluation import config, subjects
from longrope2.evaluation.config import (
    ShortTaskConfig,
    ShortTasksConfig,
    require_lm_eval,
    short_task_faults,
)
from longrope2.evaluation.results import ResultsLog
from longrope2.evaluation.short_tasks import measure_short_tasks, short_task_cell
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.inference.generation import generate_tokens
from longrope2.model.folder import weights_sha256
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ROOT = Path(__file__).parent.parent.parent
MINIATURE = ROOT / "models" / "tiny"
ORIGINAL_LEN, TARGET_LEN = 128, 512
QUESTIONS = [
    {"q": "import os\nimport", "choices": [" sys", " zebra cat"], "gold": 0},
    {
        "q": "def f(self):\n    " + "x = x + 1\n    " * 16,
        "choices": ["return x", "banana"],
        "gold": 1,
    },
    {"q": "x = y + z\n" * 20, "choices": ["x = y", "y = x"], "gold": 0},
]


def test_faults_of_the_settings_are_reported_together(monkeypatch):
    monkeypatch.setattr(config, "lm_eval_version", lambda: None)
    tasks = [ShortTaskConfig("a", "t", "acc"), ShortTaskConfig("a", "", "acc,none", -1)]
    faults = "\n".join(short_task_faults(ShortTasksConfig(tasks, limit=0)))
    for part in (
        "tasks[0]: name='a' and task='t' must be given, every name once",
        "tasks[0].metric='acc' must be",
        "tasks[1].num_fewshot=-1 must be 0 or more",
        "limit=0 must be at least 1",
        "needs lm-eval, which is not installed: pip install '.[lm-eval]'",
    ):
        assert part in faults
    with pytest.raises(ConfigError, match="lm-eval is not installed"):
        require_lm_eval()


lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
from lm_eval.api.instance import Instance  # noqa: E402

from longrope2.evaluation.lm_eval_model import LongRope2LM  # noqa: E402


@pytest.fixture(scope="module")
def model():
    factors = closed_form_factors(
        RopeMethod.ntk, rope_geometry(MINIATURE, ORIGINAL_LEN), TARGET_LEN
    )
    return load_windowed_model(MINIATURE, factors).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINIATURE)


def pair(context, continuation, number=0):
    return Instance("loglikelihood", {}, (context, continuation), 0, ("t", number, 1))


def alone(model, tokenizer, context, continuation):
    """Log-probability from a plain forward pass over one unpadded sequence, in its own window."""
    whole = [
        tokenizer.bos_token_id,
        *tokenizer(context + continuation, add_special_tokens=False).input_ids,
    ]
    first = 1 + len(tokenizer(context, add_special_tokens=False).input_ids)
    logits_TV = model.logits(
        torch.tensor([whole]), "short" if len(whole) <= ORIGINAL_LEN else "long"
    )[0]
    log_probs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    targets = whole[first:]
    return len(whole), float(
        sum(log_probs_TV[first - 1 + k, token] for k, token in enumerate(targets))
    )


@torch.inference_mode()
def test_padding_and_batch_mates_change_no_log_probability(model, tokenizer):
    """Rows below, at and above L0 in one request: padding by a longer row moves no short one."""
    text = "value = value + 1\n" * 60
    borders = [
        place for place, letter in enumerate(text) if letter == " " and place > 20
    ]  # no token spans one
    ends = [*borders[::12], *borders[40:90]]
    pairs = [(text[:end], text[end : end + 10].rstrip()) for end in ends]
    expected = [alone(model, tokenizer, *p) for p in pairs]
    lengths = [length for length, _ in expected]
    assert min(lengths) < ORIGINAL_LEN - 20 and any(0 <= ORIGINAL_LEN - n < 8 for n in lengths)
    assert any(0 < n - ORIGINAL_LEN < 8 for n in lengths)
    for batch_tokens in (1, 3000, 100_000):
        lm = LongRope2LM.around(model, tokenizer, batch_tokens)
        found = lm.loglikelihood(
            [pair(*p, number=i) for i, p in enumerate(pairs)], disable_tqdm=True
        )
        assert [score for score, _ in found] == pytest.approx(
            [score for _, score in expected], abs=2e-4
        )
        assert [lm.sides["t", i] for i in range(len(pairs))] == [
            {"short" if length <= ORIGINAL_LEN else "long"} for length in lengths
        ]


def test_greedy_flag_agrees_with_generation_and_stops_are_kept_out(model, tokenizer):
    lm = LongRope2LM.around(model, tokenizer)
    context = "import os\nimport sys\nimport"
    request = Instance(
        "generate_until", {}, (context, {"until": ["\n"], "max_gen_toks": 12}), 0, ("g", 4, 1)
    )
    (text,) = lm.generate_until([request], disable_tqdm=True)
    assert "\n" not in text and lm.sides["g", 4] == {"short"}
    ((_, greedy),) = lm.loglikelihood([pair(context, text)], disable_tqdm=True)
    assert text == "" or greedy
    ((_, wrong),) = lm.loglikelihood([pair(context, " qzx qzx")], disable_tqdm=True)
    assert not wrong


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_every_name_of_the_longest_answer_is_heeded(model, tokenizer, name):
    lm = LongRope2LM.around(model, tokenizer)
    options = {name: 3, "do_sample": False, "temperature": 0.7, "until": None}
    request = Instance("generate_until", {}, ("import os\nimport", options), 0, ("g", 0, 1))
    prompt_ids = [
        tokenizer.bos_token_id,
        *tokenizer("import os\nimport", add_special_tokens=False).input_ids,
    ]
    expected = [token.token_id for token in generate_tokens(model, prompt_ids, max_new_tokens=3)]
    assert tokenizer.eos_token_id not in expected
    assert lm.generate_until([request], disable_tqdm=True) == [tokenizer.decode(expected)]


def test_rolling_log_likelihood_is_that_of_the_whole_text(model, tokenizer):
    lm = LongRope2LM.around(model, tokenizer)
    request = Instance("loglikelihood_rolling", {}, ("import os\n",), 0, ("r", 0, 1))
    with torch.inference_mode():
        _, expected = alone(model, tokenizer, "", "import os\n")
    assert lm.loglikelihood_rolling([request], disable_tqdm=True) == pytest.approx(
        [expected], abs=1e-4
    )


def test_a_question_beyond_the_window_is_an_error_never_cut(model, tokenizer):
    lm = LongRope2LM.around(model, tokenizer)
    long_text = "value = 1\n" * 200
    with pytest.raises(
        DataError,
        match=r"a question of \d+ tokens .* exceeds the window of 512; nothing is cut here",
    ):
        lm.loglikelihood([pair(long_text, " x")], disable_tqdm=True)
    request = Instance("generate_until", {}, ("x", {"max_gen_toks": 600}), 0, ("g", 0, 1))
    with pytest.raises(DataError, match="exceeds the window of 512"):
        lm.generate_until([request], disable_tqdm=True)
    request = Instance("generate_until", {}, ("x", {"do_sample": True}), 0, ("g", 0, 1))
    with pytest.raises(DataError, match="task g asks for sampling; answers here are greedy"):
        lm.generate_until([request], disable_tqdm=True)


@pytest.fixture
def task_folder(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/questions.jsonl\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    return tmp_path


@pytest.mark.slow
def test_a_local_task_is_scored_as_by_hand_and_not_twice(
    model, tokenizer, task_folder, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subject = Subject("ntk", MINIATURE, model.factors, weights_sha256(MINIATURE), False, {})
    config = ShortTasksConfig(
        [ShortTaskConfig("choice", "tiny_choice", "acc,none")], str(task_folder)
    )
    results = ResultsLog(task_folder / "results.jsonl")

    def measure():
        models = SubjectModels(torch.device("cpu"), torch.float32)
        found = measure_short_tasks(
            config, [subject], results, tokenizer, models, task_folder / "files"
        )
        return [short_task_cell(measurement) for measurement in found]

    (cell,) = measure()
    with torch.inference_mode():
        scores = [
            [alone(model, tokenizer, item["q"], c) for c in item["choices"]] for item in QUESTIONS
        ]
    right = [
        float(max(range(2), key=lambda i: row[i][1]) == item["gold"])
        for row, item in zip(scores, QUESTIONS, strict=True)
    ]
    assert list(cell.scores) == right and cell.score == pytest.approx(sum(right) / 3)
    sides = ["short" if max(n for n, _ in row) <= ORIGINAL_LEN else "long" for row in scores]
    found = {side: part.num_samples for side, part in cell.sides.items()}
    assert found == {s: sides.count(s) for s in set(sides)} and len(found) == 2
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "load_windowed_model", None)  # a second measurement would call it
        assert measure() == [cell]
    config.tasks[0].metric = "f1,none"
    with pytest.raises(DataError, match=r"tiny_choice has no metric 'f1,none'; it has acc,none"):
        measure()
    config.tasks[0].task = "no_such_task"
    with pytest.raises(DataError, match=r"lm-eval cannot run no_such_task .*is the name right"):
        measure()


@pytest.mark.slow
def test_true_files_of_benchmarks_are_scored_as_by_hand(model, tokenizer, tmp_path, monkeypatch):
    """HellaSwag by the length of its endings, TruthfulQA by the share of its right answers."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = ROOT / "tests/fixtures/benchmarks"
    factors = closed_form_factors(RopeMethod.ntk, rope_geometry(MINIATURE, ORIGINAL_LEN), 2048)
    subject = Subject("ntk", MINIATURE, factors, weights_sha256(MINIATURE), False, {})
    tasks = [
        ShortTaskConfig("hellaswag", "hellaswag", "acc_norm,none", 0),
        ShortTaskConfig("truthfulqa", "truthfulqa_mc2", "acc,none", 0),
        ShortTaskConfig("gsm8k", "gsm8k_cot", "exact_match,flexible-extract", 0),
    ]
    config = ShortTasksConfig(tasks, data=str(data))
    models = SubjectModels(torch.device("cpu"), torch.float32)
    results = ResultsLog(tmp_path / "results.jsonl")
    of = (subject,), results, tokenizer, models, tmp_path / "files"
    cells = {m.values["name"]: short_task_cell(m) for m in measure_short_tasks(config, *of)}
    assert {name: cell.num_samples for name, cell in cells.items()} == dict.fromkeys(cells, 6)
    extended = models.of(subject)
    rows = [
        json.loads(r) for r in (data / "hellaswag/hellaswag_val.jsonl").read_text().splitlines()
    ]
    right = []
    with torch.inference_mode():
        for row in rows:
            query = f"{row['activity_label']}: {row['ctx_a']}".strip()
            found = [alone(extended, tokenizer, query, f" {e}")[1] / len(e) for e in row["endings"]]
            right.append(float(found.index(max(found)) == row["label"]))
    assert list(cells["hellaswag"].scores) == right
    with (data / "truthfulqa/TruthfulQA.csv").open() as file:
        table = list(csv.DictReader(file))
    shares = []
    with torch.inference_mode():
        for row in table:
            odds = [
                [
                    math.exp(alone(extended, tokenizer, _primed(row["Question"]), f" {answer}")[1])
                    for answer in row[column].split("; ")
                ]
                for column in ("Correct Answers", "Incorrect Answers")
            ]
            shares.append(sum(odds[0]) / (sum(odds[0]) + sum(odds[1])))
    assert list(cells["truthfulqa"].scores) == pytest.approx(shares, rel=2e-3)


def _primed(question):
    """The question behind the six that the benchmark puts in front of every one."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    text = yaml.safe_load((folder / "truthfulqa_mc1.yaml").read_text())["doc_to_text"]
    before = re.search(r"prompt_qa = '(.*?)'%}", text, re.DOTALL)
    assert before is not None
    return f"{before[1]}\n\nQ: {question}\nA:"


@pytest.mark.slow
def test_the_harness_own_command_knows_our_model(task_folder):
    command = [
        sys.executable,
        "-m",
        "launch.lm_eval",
        "--model",
        "longrope2",
        "--tasks",
        "tiny_choice",
        "--include_path",
        str(task_folder),
        "--model_args",
        f"model={MINIATURE},original_len={ORIGINAL_LEN},target_len={TARGET_LEN},rope=ntk",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny_choice|" in done.stdout and "acc" in done.stdout
