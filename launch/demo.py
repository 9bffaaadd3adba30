"""``python -m launch.demo`` (``make demo``): the whole flow on the miniature, as a user types it.

Every stage is the real command in a process of its own; finished stages are reused. ``--baseline``
also trains YaRN on the same segments for the same steps (about five minutes more).
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from longrope2.command import run_command
from longrope2.errors import UserError

NAME = "demo"
_TARGET_LEN = 2048
_BASELINE = "yarn"
_PROMPT_FILE = "prompt.txt"


@dataclass(frozen=True)
class Stage:
    """One command of the flow and what it is for."""

    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["python", "-m", *self.arguments])


def stages(root: Path, with_baseline: bool) -> list[Stage]:
    """The flow, in order, for runs under ``root``."""
    run_folder = root / NAME
    run = (f"run.name={NAME}", *_place(root))
    model = ("model=tiny", f"target_len={_TARGET_LEN}")
    extend = ("launch.train", "experiment=tiny_extend")
    packing = f"--target {_TARGET_LEN} --corpus sample --model tiny --align 2".split()
    beside = (f"run.name={NAME}_{_BASELINE}", *_place(root), f"segments={run_folder}/1_segments")
    baseline = Stage(
        f"train the baseline {_BASELINE}: the same segments and steps",
        (*extend, *beside, f"rope={_BASELINE}"),
    )
    compared = "miniature_baseline" if with_baseline else "miniature"
    prompt = f"generate.prompt_file={run_folder / _PROMPT_FILE}"
    return [
        Stage(
            "pack the sample corpus into 2,048-token segments, tagged short or long",
            ("data_prep.pack", *packing, *run),
        ),
        Stage(
            "search the rescale factors and the critical dimension with needle-driven perplexity",
            ("launch.search", *model, "corpus=sample", "search=quick", *run),
        ),
        Stage(
            "train with mixed windows: two processes, ZeRO-3, sequence parallelism 2",
            (*extend, *run),
        ),
        *([baseline] if with_baseline else []),
        Stage(
            "evaluate the base model, the baselines and the result",
            ("launch.evaluate", *model, f"evaluation={compared}", *run),
        ),
        Stage(
            "export a Hugging Face folder and check it against plain transformers",
            ("launch.export", *model, *run),
        ),
        Stage(
            "generate across the window: the prompt is far longer than the base model's 128 tokens",
            ("launch.generate", *model, *run, prompt, "generate.max_new_tokens=8"),
        ),
        Stage("write the report", ("launch.report", str(run_folder))),
    ]


def _place(root: Path) -> tuple[str, ...]:
    """The override that puts runs under ``root``, where it is not the default."""
    return () if root == Path("runs") else (f"run.root={root}",)


def main() -> None:
    """Run the flow and end with where to look and what to try next."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="remove the demo's runs first")
    parser.add_argument("--baseline", action="store_true", help="train YaRN for as many steps too")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs")
    arguments = parser.parse_args()
    run_folder = arguments.root / NAME
    if arguments.fresh:
        for name in (NAME, f"{NAME}_{_BASELINE}"):
            shutil.rmtree(arguments.root / name, ignore_errors=True)
    console = Console(highlight=False)
    began = time.monotonic()
    planned = stages(arguments.root, arguments.baseline)
    for number, stage in enumerate(planned, 1):
        title = f"\n[bold]{number}/{len(planned)} {stage.title}[/bold]"
        console.print(f"{title}\n$ {stage.command}", soft_wrap=True)
        if "launch.generate" in stage.arguments:
            _write_prompt(run_folder)
        _run_stage(stage)
    minutes, report = (time.monotonic() - began) / 60, run_folder / "report.html"
    console.print(f"\nDone in {minutes:.1f} minutes. The report: [bold]{report}[/bold]")
    beside = "YaRN trained beside it (on this miniature it retrieves more, see LAB_NOTES.md)"
    console.print(f"Next: the same with {beside}:\nmake demo BASELINE=1", soft_wrap=True)


def _run_stage(stage: Stage) -> None:
    """Run one stage in a process of its own; UserError when it failed."""
    ended = subprocess.run([sys.executable, "-m", *stage.arguments], check=False)
    if ended.returncode != 0:
        fault = f"the demo stopped: {stage.command} ended with code {ended.returncode}"
        raise UserError(f"{fault}; its message is above")


def _write_prompt(run_folder: Path) -> None:
    """The evaluation's first needle sample at the target length, as text, without its answer."""
    from longrope2.config import find_shipped
    from longrope2.model.loading import load_tokenizer
    from longrope2.segments.needle_set import NeedleSet

    needles = run_folder / "4_evaluations" / "needles" / f"{_TARGET_LEN}.arrow"
    sample = NeedleSet.load(needles).samples[0]
    tokens = list(sample.tokens[1 : sample.value_start])
    text = load_tokenizer(find_shipped("models/tiny")).decode(tokens)
    (run_folder / _PROMPT_FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
