"""A dry run before its inputs are made: what would be done, what is missing, and exit code 0.

The real run is refused for the same.
"""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
GENERATE = ("generate", "generate.prompt_file=prompt.txt")
NO_CHECKPOINT = "generate.checkpoint={run}/3_checkpoints/final does not exist; run launch.train"
NO_CORPUS = "corpus is not chosen, and {run}/1_segments holds no segments to take it from; give"


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``python -m launch.<verb> ...`` of a new run of the miniature; exit code, output, errors."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def read(")

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        words = [argument.replace("prompt.txt", str(prompt)) for argument in arguments]
        place = ["model=tiny", "target_len=2048", f"run.root={tmp_path}", "run.name=r"]
        monkeypatch.setattr("sys.argv", [verb, *place, *words])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_module(f"launch.{verb}", run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("words", "plan", "stage", "missing"),
    [
        (
            ("evaluate", "evaluation=training_free"),
            "subject    longrope2-searched: not there yet",
            "evaluation",
            [
                NO_CORPUS,
                "evaluation.subjects[5] (longrope2-searched): rope.method=searched needs a factors "
                "file, but {run}/2_factors/factors.json does not exist; run launch.search first",
            ],
        ),
        (
            ("evaluate", "checkpoint={run}/3_checkpoints/final", "corpus=sample"),
            "subject    extended: not there yet",
            "evaluation",
            [
                "evaluation.subjects[1] (extended): checkpoint={run}/3_checkpoints/final does not "
                "exist; run launch.train first"
            ],
        ),
        (
            ("export",),
            "checkpoint not there yet: window 128 -> 2048\nexport     {run}/5_exports/hugging_face",
            "export",
            ["export.checkpoint={run}/3_checkpoints/final does not exist; run launch.train first"],
        ),
        (
            ("export", "export.trained=false"),
            "export     {run}/5_exports/untrained/hugging_face, fp32",
            "export",
            ["{run}/2_factors/factors.json does not exist; run launch.search first"],
        ),
        (GENERATE, "checkpoint not there yet: window 128 -> 2048", "generation", [NO_CHECKPOINT]),
        (
            ("search", "search=miniature"),
            "tokens, held out of the segments' corpus, not packed yet",
            "search",
            [NO_CORPUS],
        ),
    ],
)
def test_it_names_what_is_missing_and_the_real_run_is_refused(
    command: Command,
    tmp_path: Path,
    words: tuple[str, ...],
    plan: str,
    stage: str,
    missing: list[str],
) -> None:
    run = str(tmp_path / "r")
    verb, *given = (word.replace("{run}", run) for word in words)
    code, out, err = command(verb, *given, "dry_run=true")
    assert (code, err) == (0, "")
    assert plan.replace("{run}", run) in out
    told = out.partition(f"missing; the {stage} will not start without:\n")[2].splitlines()
    assert len(told) == len(missing)
    code, _, err = command(verb, *given)
    assert code == 2
    for line, expected in zip(told, missing, strict=True):
        assert expected.replace("{run}", run) in line and line.strip() in err
    assert not Path(run).exists()


def test_a_dry_run_is_still_refused_for_what_does_not_fit(command: Command, tmp_path: Path) -> None:
    """Missing is one thing, wrong another."""
    (tmp_path / "r" / "3_checkpoints" / "final").mkdir(parents=True)
    for words in (("export",), ("evaluate", "checkpoint={}", "corpus=sample"), GENERATE):
        verb, *given = words
        given = [word.replace("{}", f"{tmp_path}/r/3_checkpoints/final") for word in given]
        code, _, err = command(verb, *given, "dry_run=true")
        assert code == 2 and "final holds no finished checkpoint" in err, err
