"""A finished miniature run, ways to damage a file of it, and the command that reads the file next.

Every case is a copy of the run in a process of its own: a damaged file may end an interpreter.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.pack import main as pack_main
from longrope2.config import load
from longrope2.parallel.processes import join_processes
from longrope2.segments.format import SegmentStore
from longrope2.training import checkpoint
from longrope2.training.config import TrainRoot
from longrope2.training.plan import resolve_run

NAME = "demo"
COMMON = ("model=tiny", "target_len=256", f"run.name={NAME}", "tracking.wandb=disabled")
TRAIN = (
    "experiment=tiny_extend", "parallel=single", "target_len=256", f"run.name={NAME}",
    "training.global_batch_tokens=512", "training.tokens=2048", "training.checkpoint_steps=2",
    "training.keep_checkpoints=2", "training.selftest=false", "training.heldout_every=2",
    "training.heldout_segments=2", "tracking.wandb=disabled",
)  # fmt: skip
SEARCH = (
    *COMMON, "corpus=sample", "search=halving", "search.population=10", "search.mutations=6",
    "search.parents=2", "search.iterations=2", "search.num_samples=4", "search.lengths=[0.5,1.0]",
    "search.fresh_samples=8", "search.min_needle_loss_gain_at_target=null",
)  # fmt: skip
EVALUATE = (
    *COMMON, "evaluation.lengths=[256]", "evaluation.needle.depths=[0,1]",
    "evaluation.needle.samples_per_depth=2", "evaluation.perplexity.num_windows=2",
    "evaluation.retention.num_windows=3", "suite=needle_map", "suite.measures=true",
    "suite.lengths=[256]", "suite.needle_map.haystack=noise", "suite.needle_map.depths=[0.5]",
    "suite.needle_map.repeats=1",
)  # fmt: skip
EXPORT = ("model=tiny", "target_len=256", f"run.name={NAME}", "export.cost_windows=2")
_IN_EVERY_PRODUCT = ("manifest.json", "config.yaml")
_TEXT = (".json", ".jsonl", ".yaml")
_COPIED = (*_TEXT, ".md", ".txt")
"""Files that a command may change in place; all others are linked."""


def launch(verb: str, *arguments: str) -> None:
    """``python -m launch.<verb>`` in this process; raises SystemExit where it fails."""
    sys.argv = [verb, *arguments]
    runpy.run_module(f"launch.{verb}", run_name="__main__")


def at(root: Path) -> str:
    """The setting that puts runs there."""
    return f"run.root={root}"


def subjects(root: Path) -> str:
    """The base model, the searched factors and the trained model."""
    final = root / NAME / "3_checkpoints" / "final"
    return (
        "evaluation.subjects=[{name: base, rope: {method: none}},{name: found, rope: {method: "
        f"searched}}}},{{name: trained, checkpoint: {final}}}]"
    )


def make_run(root: Path) -> Path:
    """All five products and the report, in seconds; the run folder."""
    quotas = ("quotas.stdlib_modules={short: 3000, long: 3000}",)
    quotas += ("quotas.stdlib_topics={short: 0, long: 0}", "quotas.retrieval={short: 0, long: 0}")
    pack_main([*"--target 256 --corpus sample --model tiny".split(), f"run.name={NAME}",
               at(root), *quotas])  # fmt: skip
    (root / "prompt.txt").write_text("Words of a text. " * 20)
    for verb, *words in (
        ("search", *SEARCH),
        ("train", *TRAIN),
        ("evaluate", *EVALUATE, f"evaluation.sample_cache={root}/cache", subjects(root)),
        ("export", *EXPORT),
    ):
        ended = in_child(partial(launch, verb, *words, at(root)))
        assert ended["ended"] == "done", ended["text"]
    launch("report", str(root / NAME))
    return root / NAME


def in_child(work: Callable[[], object]) -> dict[str, str]:
    """What ``work`` returned, raised and printed, in a forked process.

    Raises:
        AssertionError: never; a child that dies is an ``ended`` of its own.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        answer = _answer(work)
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(said) if said else {"ended": f"died ({status})", "text": "", "value": ""}


def _answer(work: Callable[[], object]) -> dict[str, str]:
    text, ended, value = io.StringIO(), "done", ""
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            value = str(work() or "")
        except SystemExit as error:
            ended = {None: "done", 0: "done", 2: "refused"}.get(error.code, f"code {error.code}")
        except BaseException as error:
            ended = "refused" if isinstance(error, _user_error()) else "traceback"
            text.write(traceback.format_exc() if ended == "traceback" else f"error: {error}")
    return {"ended": ended, "value": value, "text": text.getvalue()}


def _user_error() -> type[Exception]:
    from longrope2.errors import UserError

    return UserError


# --- readers: the next command, and a value that tells whether it used what was written


def train_prepare(root: Path) -> str:
    """All that a training reads before its ranks start: factors and tokens."""
    note = root / "note"
    launch("train", "--prepare", str(note), *TRAIN, "training.tokens=4096", "run.name=again",
           f"run.from_run={NAME}", at(root))  # fmt: skip
    config = load(TrainRoot, Path(note.read_text().strip()))
    run = resolve_run(config, 1)
    store = SegmentStore(run.segments_folder)
    parts = [store.segment(n).tokens.tobytes() for n in range(len(store))]
    return digest(run.factors.to_json(), *parts)


def train_again(root: Path) -> str:
    launch("train", *TRAIN, at(root))
    return tree(root / NAME / "3_checkpoints" / "final", ".safetensors", "factors.json")


def search_again(root: Path) -> str:
    launch("search", *SEARCH, at(root))
    return tree(root / NAME / "2_factors", "factors.json", ".arrow")


def search_resumed(root: Path) -> str:
    (root / NAME / "2_factors" / "manifest.json").unlink()
    return search_again(root)


def resume(root: Path) -> str:
    """The checkpoint that a resumed training takes."""
    config = load(TrainRoot, root / NAME / "3_checkpoints" / "config.yaml")
    config.run.root = str(root)
    join_processes(config.parallel)
    identity = resolve_run(config, 1).identity()
    found = checkpoint.find_newest(root / NAME / "3_checkpoints", identity)
    return "" if found is None else found.folder.name


def generate(root: Path, *words: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        launch("generate", "model=tiny", "target_len=256", f"run.name={NAME}", at(root), *words,
               f"generate.prompt_file={root}/prompt.txt", "generate.max_new_tokens=4")  # fmt: skip
    return text.getvalue()


def generate_from_export(root: Path) -> str:
    folder = root / NAME / "5_exports" / "hugging_face"
    return generate(root, f"generate.checkpoint={folder}")


def export(root: Path) -> str:
    launch("export", *EXPORT, at(root))
    return tree(root / NAME / "5_exports", ".safetensors", "config.json", "factors.json")


def export_anew(root: Path) -> str:
    shutil.rmtree(root / NAME / "5_exports")
    return export(root)


def evaluate(root: Path) -> str:
    launch("evaluate", *EVALUATE, f"evaluation.sample_cache={root}/cache", subjects(root), at(root))
    texts = [(root / NAME / "4_evaluations" / name).read_text() for name in
             ("evaluations.json", "suite.json")]  # fmt: skip
    return digest(*(text.replace(str(root), "") for text in texts))


def report(root: Path) -> str:
    launch("report", str(root / NAME))
    page = (root / NAME / "report.html").read_text()
    return digest(re.sub(r"<clipPath.*?>|id='?\"?[\w-]+", "", page))


def digest(*parts: str | bytes) -> str:
    joined = b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)
    return hashlib.sha256(joined).hexdigest()[:16]


def tree(folder: Path, *endings: str) -> str:
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(endings)]
    return digest(*(part for path in paths for part in (path.name, path.read_bytes())))


# --- damage


def damage(path: Path, how: str) -> None:
    """Change one file: ``flip10`` (percent of its size), ``half``, ``zero``, ``delete``, ``digit``.

    A digit is one of a number in its middle third, or any sign where there is no number.
    """
    data = bytearray(path.read_bytes())
    path.unlink()  # it may be a link to the original
    if how == "delete":
        return
    if how.startswith("flip"):
        place = min(len(data) - 1, len(data) * int(how[4:]) // 100)
        data[place] ^= 1
    elif how == "digit":
        numbers = re.finditer(rb"(?<![0-9a-f\"_])\d", data)
        found = [m.start() for m in numbers] or [m.start() for m in re.finditer(rb"\w", data)]
        place = random.Random(0).choice(found[len(found) // 3 : 2 * len(found) // 3 + 1])
        data[place] = ord("1") + (data[place] - ord("0")) % 9
    path.write_bytes(data[: {"half": len(data) // 2, "zero": 0}.get(how, len(data))])


@dataclass(frozen=True)
class Case:
    """One product file and what reads it next."""

    file: str
    """Below the run folder."""
    reader: Callable[[Path], str]
    why_not_named: str = ""
    """Why some damage may do no harm, or be shown otherwise than by a message."""

    @property
    def hows(self) -> Sequence[str]:
        """Ways to damage it."""
        digits = ("digit",) if self.file.endswith(_TEXT) else ()
        return ("flip10", "flip50", "flip90", "half", "zero", "delete", *digits)


STEP, FINAL, DUAL = "3_checkpoints/step_00000004", "3_checkpoints/final", "5_exports/hugging_face"
AGAIN = "what is lost is computed again, and the last line may be torn"
CASES = (
    Case("1_segments/segments-00000-00000.arrow", train_prepare),
    Case("1_segments/manifest.json", train_prepare),
    Case("1_segments/config.yaml", train_prepare, "training reads its corpus alone"),
    Case("1_segments/documents.parquet", report),
    Case("2_factors/factors.json", train_prepare),
    Case("2_factors/factors.json", search_again),
    Case("2_factors/manifest.json", search_again, "without it the search ends once more"),
    Case("2_factors/history.json", report),
    Case("2_factors/needles.arrow", search_again),
    Case("2_factors/needles.arrow", search_resumed, "missing ones are drawn again, the same"),
    Case("2_factors/needles.json", search_resumed, "it is written anew at every start"),
    Case("2_factors/journal.jsonl", search_resumed, AGAIN),
    Case("2_factors/fresh.jsonl", search_resumed, AGAIN),
    Case(f"{STEP}/zero_pp_rank_0_mp_rank_00_optim_states.pt", resume),
    Case(f"{STEP}/zero_pp_rank_0_mp_rank_00_model_states.pt", resume),
    Case(f"{STEP}/manifest.json", resume),
    Case("3_checkpoints/config.yaml", train_again, "it is written anew by every start"),
    Case("3_checkpoints/manifest.json", train_again, "without it the training ends once more"),
    Case("3_checkpoints/metrics.jsonl", report, "figures of the page, which says what is lost"),
    Case(f"{FINAL}/model.safetensors", train_again),
    Case(f"{FINAL}/model.safetensors", export_anew),
    Case(f"{FINAL}/model.safetensors", generate),
    Case(f"{FINAL}/model.safetensors", evaluate),
    Case(f"{FINAL}/factors.json", generate),
    Case(f"{FINAL}/config.json", generate),
    Case(f"{FINAL}/tokenizer.json", generate),
    Case(f"{FINAL}/tokenizer_config.json", generate),
    Case(f"{FINAL}/manifest.json", generate),
    Case("4_evaluations/results.jsonl", evaluate, AGAIN),
    Case("4_evaluations/answers/answers.jsonl", evaluate, AGAIN),
    Case("4_evaluations/manifest.json", report, "without it the page says unfinished"),
    Case("4_evaluations/evaluations.json", report),
    Case("4_evaluations/suite.json", report),
    Case(f"{DUAL}/model.safetensors", export),
    Case(f"{DUAL}/config.json", export),
    Case("5_exports/manifest.json", export, "without it all is exported again"),
    Case(f"{DUAL}/model.safetensors", generate_from_export),
    Case(f"{DUAL}/config.json", generate_from_export),
    Case(f"{DUAL}/factors.json", generate_from_export),
    Case("5_exports/manifest.json", generate_from_export),
)


def copy_run(run: Path, root: Path) -> Path:
    """The run once more below ``root``; large files are links."""

    def copy(source: str, target: str) -> None:
        if source.endswith(_COPIED):
            shutil.copy2(source, target)
        else:
            os.link(source, target)

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    shutil.copy2(run.parent / "prompt.txt", root)
    return Path(shutil.copytree(run, root / NAME, copy_function=copy, symlinks=True))


def verdict(case: Case, how: str, ended: dict[str, str], expected: str) -> str:
    """What became of a damaged file, in a word; those in capitals are faults."""
    path = Path(case.file)
    named = path.name in ended["text"]
    if path.name in _IN_EVERY_PRODUCT:
        named = named and path.parent.name in ended["text"]
    if ended["ended"] == "refused":
        return "refused" if named else "REFUSED WITHOUT ITS NAME"
    if ended["ended"] != "done":
        return ended["ended"].upper()
    if ended["value"] == expected:
        return "mended" if named else "harmless"
    return "passed over" if named else "USED"
