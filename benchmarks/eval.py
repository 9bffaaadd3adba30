"""``python -m benchmarks.eval``: samples a second of RULER generation, beside a plain generator's.

Ours: fitted by sums over tokens counted once, stored, worker processes. Plain: the same prompts,
but every one is tokenized whole to be counted, after a binary search of the size by whole
tokenizations for each task and length, as RULER does it; one process, measured on ``--compare``
samples a cell. Both are given in CPU seconds too, because those do not depend on what else the
machine is doing. What was made is checked: no prompt over its length, and how full.

The haystacks are the standard library's documentation, the questions are made up in the layouts of
SQuAD and HotpotQA: nothing is downloaded.
"""

import argparse
import itertools
import json
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from longrope2.evaluation.prompts import PromptEncoder, text_of
from longrope2.evaluation.ruler.config import RULER_TASKS, RulerConfig
from longrope2.evaluation.ruler.tasks import FixedRuler, ruler_tasks
from longrope2.evaluation.samples import GenerationTask
from longrope2.model.folder import resolve_model_folder

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
SEARCH_STEPS = 12  # whole tokenizations of a binary search over the size
WORDS = (
    "time person year way day thing man world life hand part child eye place work week case point "
    "number"
).split()
COLUMNS = ("generator", "samples", "tokens", "wall s", "CPU s", "samples/s", "CPU us/token")


@dataclass
class Cost:
    """What a generator took."""

    num_samples: int
    num_tokens: int
    wall_seconds: float
    cpu_seconds: float

    def line(self, name: str) -> list[str]:
        """A row of the table, by ``COLUMNS``."""
        counts = [f"{self.num_samples:,}", f"{self.num_tokens:,}"]
        seconds = [f"{self.wall_seconds:.1f}", f"{self.cpu_seconds:.1f}"]
        rate, per_token = self.num_samples / self.wall_seconds, self.cpu_seconds / self.num_tokens
        return [name, *counts, *seconds, f"{rate:,.1f}", f"{1e6 * per_token:.3f}"]


def main() -> None:
    """Generate, check, compare, print."""
    arguments = _read_arguments()
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder(arguments.model))
    with tempfile.TemporaryDirectory() as temporary:
        squad, hotpotqa = _questions(Path(temporary))
        config = RulerConfig(
            tasks=arguments.tasks, num_samples=arguments.samples, squad=squad, hotpotqa=hotpotqa
        )
        texts, lengths = _haystack(), arguments.lengths
        folder = arguments.folder or Path(temporary) / "samples"
        start, cpu, workers = time.perf_counter(), _cpu_seconds(), arguments.workers
        tasks = ruler_tasks(config, tokenizer, texts, lengths, cache_folder=folder, workers=workers)
        ours = Cost(*_size(tasks), time.perf_counter() - start, _cpu_seconds() - cpu)
        _check(tasks)
        own_line = ours.line(f"ours, {workers} processes")
        print(dict(zip(COLUMNS, own_line, strict=True)), flush=True)
        plain = _plain(FixedRuler(config, PromptEncoder(tokenizer), texts), arguments)
    table = Table(*COLUMNS)
    table.add_row(*own_line)
    table.add_row(*plain.line("plain, 1 process"))
    console = Console()
    console.print(table)
    factor = (plain.cpu_seconds / plain.num_tokens) / (ours.cpu_seconds / ours.num_tokens)
    # Start-up is counted in every time: an upper bound.
    cores = max(workers, 1)
    minutes = ours.cpu_seconds * 500 / arguments.samples / cores / 60
    console.print(
        f"CPU time per token: {factor:.1f} times less. At this rate 500 samples a cell take "
        f"{minutes:.1f} minutes on {cores} free cores."
    )


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    folder_help = "keep the samples here; default: a temporary folder"
    model_help = "folder, hub id or gguf://PACKAGE/FILE with the tokenizer"
    samples_help = "samples of every task and length (RULER: 500)"
    parser.add_argument("--model", default="models/tiny", help=model_help)
    parser.add_argument("--samples", type=int, default=20, help=samples_help)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tasks", nargs="+", default=list(RULER_TASKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compare", type=int, default=1, help="samples a cell of the plain one")
    parser.add_argument("--folder", type=Path, help=folder_help)
    return parser.parse_args()


def _size(tasks: list[GenerationTask]) -> tuple[int, int]:
    """Samples and prompt tokens."""
    sizes = [len(sample.prompt_T) for task in tasks for sample in task.samples]
    return len(sizes), sum(sizes)


def _check(tasks: list[GenerationTask]) -> None:
    """No sample exceeds its length; print the smallest share of it that is filled, by task."""
    lengths = dict.fromkeys(task.length for task in tasks)
    table = Table("task", *[f"fill at {length}" for length in lengths])
    for name in dict.fromkeys(task.name for task in tasks):
        cells = []
        for task in (task for task in tasks if task.name == name):
            totals = [len(sample.prompt_T) + sample.max_new_tokens for sample in task.samples]
            assert max(totals) <= task.length, f"{name} at {task.length}: {max(totals)} tokens"
            cells.append(f"{min(totals) / task.length:.4f}")
        table.add_row(name, *cells)
    Console().print(table)


def _plain(ruler: FixedRuler, arguments: argparse.Namespace) -> Cost:
    """The same prompts, each counted by tokenizing it whole."""
    num_samples = num_tokens = 0
    wall = cpu = 0.0
    # The search for the size belongs to all samples of a cell alike.
    share = 1 + SEARCH_STEPS / 500
    for task, length in itertools.product(arguments.tasks, arguments.lengths):
        ruler.recipe(task, length)
        budget = length - ruler.max_new_tokens(task) - len(ruler.encoder.bos_ids)
        for index in range(arguments.compare):
            start, start_cpu = time.perf_counter(), time.process_time()
            text = text_of(ruler.draft(task, length, index, budget).pieces)
            num_tokens += len(ruler.encoder.encode_text(text))
            num_samples += 1
            wall += (time.perf_counter() - start) * share
            cpu += (time.process_time() - start_cpu) * share
    return Cost(num_samples, num_tokens, wall, cpu)


def _cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _haystack() -> list[str]:
    """The language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _questions(folder: Path) -> tuple[str, str]:
    """Made-up question sets in the official layouts, enough documents for 131,072 tokens."""
    rng = random.Random(0)

    def filler() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(15, 90))).capitalize() + "."

    articles = []
    for article in range(150):
        paragraphs = []
        for number in range(10):
            box, hue = f"box {article}-{number}", f"hue{article}x{number}"
            question = f"What is the colour of {box}?"
            asked = {"question": question, "is_impossible": False, "answers": [{"text": hue}]}
            text = f"{filler()} The colour of {box} is {hue}. {filler()}"
            paragraphs.append({"context": text, "qas": [asked]})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    entries = []
    for entry in range(250):
        context = [[f"Box {entry}-{n}", [filler(), f" It is box {n}."]] for n in range(10)]
        context[3][1].append(f" It belongs to box {entry}-7.")
        context[7][1].append(f" Its colour is hue{entry}.")
        entries.append(
            {
                "question": f"What is the colour of what box {entry}-3 belongs to?",
                "answer": f"hue{entry}",
                "context": context,
                "supporting_facts": [[context[3][0], 2], [context[7][0], 2]],
            }
        )
    squad, hotpotqa = folder / "squad.json", folder / "hotpotqa.json"
    squad.write_text(json.dumps({"data": articles}), encoding="utf-8")
    hotpotqa.write_text(json.dumps(entries), encoding="utf-8")
    return str(squad), str(hotpotqa)


if __name__ == "__main__":
    main()
