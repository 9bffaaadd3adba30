"""What decides whether a suite is comparable with the paper, in the plan and in the result."""

import hashlib
import json
import runpy
import sys

import pytest
import ruler_fixtures as fixtures
from test_ruler_upstream import PROMPTS

from longrope2.config import compose
from longrope2.evaluation.config import EvaluateRoot
from longrope2.evaluation.protocol import SHORT_TASKS, basis_of, protocols
from longrope2.evaluation.ruler import qa, upstream_draws
from longrope2.model.loading import load_tokenizer
from longrope2.report import paper_values as paper

ARGUMENTS = (
    "model=tiny", "target_len=131072", "corpus=sample", "suite=paper", "checkpoint=null",
    "evaluation=miniature", "suite.long_tasks.longbench.prompts=p",
    "suite.long_tasks.infinitebench.prompts=p", "suite.long_tasks.loft.prompts=p",
    "suite.long_tasks.loft.data=d",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """RULER's layout with prompts of our own, which count as the known ones."""
    folder = tmp_path / "RULER"
    data = folder / "scripts" / "data" / "synthetic"
    data.mkdir(parents=True)
    tasks = {name: {"template": t, "answer_prefix": p} for name, (t, p) in PROMPTS.items()}
    (data / "constants.py").write_text(f"TASKS = {tasks!r}\n")
    (data.parent / "template.py").write_text("Templates = {'base': '{task_template}'}\n")
    hashes = {
        name: tuple(hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts)
        for name, parts in PROMPTS.items()
    }
    monkeypatch.setattr(upstream_draws, "PROMPT_SHA256", hashes)
    return folder


def found(checkout, *arguments):
    given = (*ARGUMENTS, f"suite.ruler.upstream_checkout={checkout}", *arguments)
    config = compose(EvaluateRoot, "evaluate", list(given))
    listed = protocols(config, load_tokenizer("models/tiny"))
    return {protocol.part: protocol for protocol in listed}


def test_the_papers_suite_is_comparable_in_every_part(checkout):
    """But for the needle map, which the paper shows without a number."""
    asked = found(checkout)
    assert list(asked) == ["ruler", "needle_map", "loft", "long", "short"]
    assert [part for part, protocol in asked.items() if protocol.differs] == ["needle_map"]
    assert asked["ruler"].facts == (
        "RULER's wording",
        "no chat template",
        "13 tasks",
        "500 samples each",
        "seed 42",
        "SQuAD rajpurkar/squad_v2@3ffb306f",
        "HotpotQA hotpotqa/hotpot_qa@1908d6af",
        "at 4,096, 8,192, 16,384, 32,768, 65,536, 131,072 tokens",
        asked["ruler"].facts[-1],
    )
    assert asked["ruler"].facts[-1].endswith(" of 2,048")
    assert "InfiniteBench@90f03943" in asked["long"].facts
    assert "LongBench@5e628be4" in asked["long"].facts
    assert "hub data at named commits" in asked["short"].facts
    assert set(SHORT_TASKS) == set(paper.SHORT_COLUMNS)


@pytest.mark.parametrize(
    ("part", "change", "differs"),
    [
        ("ruler", "suite.ruler.mode=fixed", "our own wording (RULER's is suite.ruler.mode=upstr"),
        ("ruler", "suite.ruler.tasks=[vt,fwe]", "2 of RULER's 13 tasks"),
        ("ruler", "suite.ruler.essays=/mine.json", "essays of /mine.json, not of the checkout"),
        ("needle_map", "suite.needle_map.haystack=noise", "needles in noise instead of text"),
        ("needle_map", "suite.needle_map.repeats=2", "2 needles at 11 depths instead of 10, 11"),
        ("loft", "suite.long_tasks.loft.tasks=[nq]", "1 of LOFT's 7 tasks"),
        ("loft", "suite.long_tasks.loft.split=dev", "size 128k, split dev instead of 128k, test"),
        ("long", "suite.long_tasks.num_samples=20", "the first 20 samples of each task alone"),
        ("long", "suite.long_tasks.longbench.tasks=[lcc]", "3 of the paper's 6 tasks"),
        ("long", "suite.long_tasks.longbench.revision=ab", "LongBench of another revision than 5e"),
        ("short", "suite.short_tasks.limit=50", "the first 50 questions of each task alone"),
        ("short", "suite.short_tasks.include_path=/t", "task files of suite.short_tasks.include_"),
        (
            "short",
            "suite.short_tasks.tasks=[{name: gsm8k, task: gsm8k, metric: 'a,b', num_fewshot: 5}]",
            "without mmlu, mmlu_pro, hellaswag, truthfulqa",
        ),
    ],
)
def test_what_differs_is_named(checkout, part, change, differs):
    asked = found(checkout, change)
    said = asked[part].differs[1 if part == "needle_map" else 0]
    assert said.startswith(differs) and differs in basis_of(asked[part])
    assert basis_of(asked[part]).startswith("not comparable with the paper (")
    others = {"needle_map", *({"long", "loft"} if "num_samples" in change else ())}
    assert not any(p.differs for name, p in asked.items() if name not in {part} | others)


def test_other_settings_of_a_short_task_are_named(checkout):
    change = "suite.short_tasks.tasks=[{name: gsm8k, task: gsm8k, metric: 'acc,b', num_fewshot: 5}]"
    said = "gsm8k by gsm8k acc,b 5 shots instead of gsm8k_cot exact_match,flexible-extract 8"
    assert found(checkout, change)["short"].differs[1] == said


def test_questions_of_a_file_are_counted(checkout, tmp_path, monkeypatch):
    files = fixtures.question_files(tmp_path)
    given = [f"suite.ruler.{key}={path}" for key, path in files.items()]
    assert found(checkout, *given)["ruler"].differs == (
        "SQuAD of 600 questions instead of 5,928",
        "HotpotQA of 60 questions instead of 7,405",
    )
    monkeypatch.setattr(qa, "NUM_QUESTIONS", {"qa_1": 600, "qa_2": 60})
    asked = found(checkout, *given)["ruler"]
    assert not asked.differs and asked.facts[5].startswith("SQuAD of 600 questions, ")


def test_a_chat_model_asked_bare_is_not_asked_as_ruler_does(checkout):
    config = compose(
        EvaluateRoot,
        "evaluate",
        [*ARGUMENTS, f"suite.ruler.upstream_checkout={checkout}", "suite.ruler.template=base"],
    )
    tokenizer = load_tokenizer("models/tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = protocols(config, tokenizer)[0]
    assert asked.differs == ("a chat model asked without its template (suite.ruler.template=base)",)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys, checkout):
    """The paper's suite with RULER alone, in this process; exit code and standard output."""

    def run(*arguments):
        options = (
            f"run.root={tmp_path}", "run.name=r", "model=tiny", "corpus=sample", "suite=paper",
            f"suite.ruler.upstream_checkout={checkout}", "suite.needle_map=null",
            "suite.measures=false", "suite.short_tasks.tasks=[]", "tracking.wandb=disabled",
            "suite.long_tasks.longbench.tasks=[]", "suite.long_tasks.infinitebench.tasks=[]",
            "suite.long_tasks.loft.tasks=[]", f"evaluation.sample_cache={tmp_path}/cache",
            "evaluation.subjects=[{name: base, rope: {method: none}}]",
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["evaluate", *options, *arguments])
        code = 0
        try:
            runpy.run_module("launch.evaluate", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_the_plan_says_that_all_tasks_are_comparable(evaluate):
    code, out = evaluate("dry_run=true", "target_len=131072")
    assert code == 0 and "ruler      comparable with the paper: RULER's wording, no chat" in out


@pytest.mark.slow
def test_two_tasks_end_without_a_verdict_and_say_why(evaluate, tmp_path):
    options = ("suite.ruler.tasks=[vt,fwe]", "suite.ruler.num_samples=2", "suite.lengths=[2048]")
    code, out = evaluate(*options, "target_len=2048", "suite.base_beyond_window=true")
    assert code == 0, out
    printed = " ".join(out.split())
    assert "ruler not comparable with the paper (2 of RULER's 13 tasks)" in printed
    assert "RULER, mean of 2 tasks by length ruler: not comparable with the paper" in printed
    assert (
        "(too few samples)" in printed
        and "Table" not in out
        and "above" not in out.replace("RULER average above", "")
    )
    said = "effective length of base (RULER average above 85.6, not asked as RULER does): not said"
    assert said in printed
    summary = json.loads((tmp_path / "r/4_evaluations/suite.json").read_text())
    assert summary["protocols"][0]["differs"] == ["2 of RULER's 13 tasks"]
    assert summary["effective_lengths"][0]["reason"] == "2 of RULER's 13 tasks do not tell"
