"""``python -m launch.demo`` (``make demo``): the whole flow on the miniature, as a user types it.

Every stage is the real command in a process of its own; finished stages are reused. ``--baseline``
also trains YaRN, Llama 3's bands, NTK and LongRoPE2 in the paper's own search space, each on the
same segments for the same steps. ``--seed`` draws other segments, samples and an order of its own.
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
from rich.markup import escape

from longrope2.command import run_command
from longrope2.errors import UserError

NAME = "demo"
_TARGET_LEN = 2048
# Trained beside the result on request: run name -> the command line's rope.
_BASELINES = {"yarn": "yarn", "llama3": "llama3", "ntk": "ntk", "longrope2": "searched"}
_PROMPT_FILE = "prompt.txt"
_TWO = "parallel.processes=2"
_HELDOUT = ("training.heldout_every=36", "training.heldout_segments=4")


@dataclass(frozen=True)
class Stage:
    """One command of the flow and what it is for."""

    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["python", "-m", *self.arguments])


def run_name(seed: int) -> str:
    """Name of the demo's run with a seed."""
    return NAME if seed == 0 else f"{NAME}_{seed}"


def stages(root: Path, with_baselines: bool, seed: int = 0) -> list[Stage]:
    """The flow, in order, for runs under ``root``."""
    name = run_name(seed)
    run_folder = root / name
    every = (*_place(root), *((f"seed={seed}",) if seed else ()))
    run = (f"run.name={name}", *every)
    model = ("model=tiny", f"target_len={_TARGET_LEN}")
    packing = f"--target {_TARGET_LEN} --corpus sample --model tiny --align 2".split()
    compared = "miniature_baselines" if with_baselines else "miniature"
    prompt = f"generate.prompt_file={run_folder / _PROMPT_FILE}"
    return [
        Stage(
            "pack the sample corpus into 2,048-token segments, tagged short or long",
            ("data_prep.pack", *packing, *run),
        ),
        Stage(
            "search factors and attention scale by halving, and compare them on fresh samples",
            ("launch.search", *model, "corpus=sample", "search=miniature", _TWO, *run),
        ),
        Stage(
            "train with mixed windows: two processes, ZeRO-3, sequence parallelism 2",
            ("launch.train", "experiment=tiny_extend", *_HELDOUT, *run),
        ),
        *(_baseline_stages(name, every, run_folder) if with_baselines else []),
        Stage(
            "evaluate the base model, the baselines and the result",
            ("launch.evaluate", *model, f"evaluation={compared}", *run),
        ),
        Stage(
            "export Hugging Face folders and check them against plain transformers",
            ("launch.export", *model, "export.variants=[long_only,short_only]", *run),
        ),
        Stage(
            "generate across the window: the prompt is far longer than the base model's 128 tokens",
            ("launch.generate", *model, *run, prompt, "generate.max_new_tokens=8"),
        ),
        Stage("write the report", ("launch.report", str(run_folder))),
    ]


def _baseline_stages(name: str, every: tuple[str, ...], run_folder: Path) -> list[Stage]:
    """The paper's search, and every baseline trained on the same segments for the same steps."""
    model = ("model=tiny", f"target_len={_TARGET_LEN}", "corpus=sample", "search=quick")
    # 16-fold this search only has candidates that are worse than guessing, and would refuse.
    asked = ("search.min_needle_loss_gain_at_target=null", "search.fresh_samples=8", _TWO)
    search = Stage(
        "search LongRoPE2's factors and critical dimension in the paper's own space",
        ("launch.search", *model, *asked, f"run.name={name}_longrope2", *every),
    )
    segments = f"segments={run_folder}/1_segments"
    trained = [
        Stage(
            f"train the baseline {baseline}: the same segments and steps",
            ("launch.train", "experiment=tiny_extend", f"run.name={name}_{baseline}", *every,
             segments, f"rope={rope}"),
        )
        for baseline, rope in _BASELINES.items()
    ]  # fmt: skip
    return [search, *trained]


def _place(root: Path) -> tuple[str, ...]:
    """The override that puts runs under ``root``, where it is not the default."""
    return () if root == Path("runs") else (f"run.root={root}",)


def main() -> None:
    """Run the flow and end with where to look and what to try next."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="remove the demo's runs first")
    parser.add_argument("--baseline", action="store_true", help="train the baselines too")
    parser.add_argument("--seed", type=int, default=0, help="of segments, samples and training")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs")
    arguments = parser.parse_args()
    name = run_name(arguments.seed)
    run_folder = arguments.root / name
    if arguments.fresh:
        for run in (name, *(f"{name}_{baseline}" for baseline in _BASELINES)):
            shutil.rmtree(arguments.root / run, ignore_errors=True)
    console = Console(highlight=False)
    began = time.monotonic()
    planned = stages(arguments.root, arguments.baseline, arguments.seed)
    for number, stage in enumerate(planned, 1):
        title = f"\n[bold]{number}/{len(planned)} {stage.title}[/bold]"
        console.print(f"{title}\n$ {escape(stage.command)}", soft_wrap=True)
        if "launch.generate" in stage.arguments:
            _write_prompt(run_folder)
        _run_stage(stage)
    minutes, report = (time.monotonic() - began) / 60, run_folder / "report.html"
    console.print(f"\nDone in {minutes:.1f} minutes. The report: [bold]{report}[/bold]")
    beside = "YaRN, Llama 3's bands, NTK and the paper's own search trained beside it"
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
