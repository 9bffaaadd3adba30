"""Every command that is shown (README, docs, job scripts, presets) composes as it stands."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.config import PackConfig
from data_prep.pack import FLAGS
from launch.doctor.rope import DoctorRoot
from launch.init.before import InitRoot
from launch.plan import PlanRoot
from launch.report import ReportRoot
from longrope2.config import compose
from longrope2.evaluation.config import EvaluateRoot
from longrope2.export.variants import ExportRoot
from longrope2.inference.config import GenerateRoot
from longrope2.search.config import SearchRoot
from longrope2.training.config import TrainRoot

ROOT = Path(__file__).parent.parent.parent
ROOTS = {
    "data_prep.pack": (PackConfig, "pack"),
    "launch.search": (SearchRoot, "search"),
    "launch.train": (TrainRoot, "train"),
    "launch.evaluate": (EvaluateRoot, "evaluate"),
    "launch.export": (ExportRoot, "export"),
    "launch.generate": (GenerateRoot, "generate"),
    "launch.plan": (PlanRoot, "plan"),
    "launch.doctor": (DoctorRoot, "doctor"),
    "launch.report": (ReportRoot, "report"),
    "launch.init": (InitRoot, "init"),
}
STAGES = ("pack", "search", "train", "evaluate", "export")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("slurm/*.sh")),
    *sorted(ROOT.glob("slurm/*.md")),
    ROOT / "slurm" / "site.example.env",
    *sorted(ROOT.glob("conf/**/*.yaml")),
]
# Up to the end of a code span, of a remark's bracket or clause, or up to two spaces.
COMMAND = re.compile(
    r"(?:^|[`#$:(]\s*|and )((?:python -m|sbatch|slurm/pipeline\.sh) [^`\n]*?)"
    r"(?=`|\)\s|[,:]?\s\s|[,:]\s|\s+\(| #|$)",
    re.MULTILINE,
)


def shown_commands() -> Iterator[tuple[str, str]]:
    """File and command; lines that end in a backslash are joined, patterns of commands left out."""
    for page in PAGES:
        text = re.sub(r" *\\\n[# ]*", " ", page.read_text(encoding="utf-8"))
        if page.suffix != ".md":
            text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        for found in COMMAND.finditer(text):
            if "[key=value" not in found[1] and "MODEL [[STAGE" not in found[1]:
                yield str(page.relative_to(ROOT)), found[1].strip()


SHOWN = list(dict.fromkeys(shown_commands()))


def words_of(command: str) -> list[str]:
    """Words of a command, the optional ones (``[dry_run=true]``, ``[suite=ruler ...]``) too."""
    return shlex.split(re.sub(r" \[([\w.]+=[^][ ]+)(?: \.\.\.)?\]", r" \1", command))


def last_wins(words: list[str]) -> list[str]:
    """As ``slurm/common.sh`` does."""
    return list({word.partition("=")[0]: word for word in words}.values())


def script_words(script: str) -> tuple[str, list[str]]:
    """The stage of a job script and its own words, its model's variables filled in by bash."""
    path = ROOT / script
    stage, _, model = path.stem.partition("_")
    line = next(x for x in path.read_text().splitlines() if x.endswith('"$@"'))
    shown = f". slurm/models/{model}.sh; set -- {line.removesuffix(chr(34) + '$@' + chr(34))}; "
    shown += 'shift; printf "%s\\n" "$@"'
    ended = subprocess.run(
        ["bash", "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return stage, ended.stdout.split()


def compose_command(module: str, words: list[str]) -> object:
    """The configuration that the module makes of these words."""
    root, name = ROOTS[module]
    settings = [word for word in words if "=" in word and not word.startswith("--")]
    if module == "data_prep.pack":
        given = zip(words, words[1:], strict=False)
        settings += [f"{FLAGS[f[2:]]}={value}" for f, value in given if f[2:] in FLAGS]
    if module == "launch.report" and not settings:
        return None
    return compose(root, name, settings)


def compose_shown(command: str) -> list[object]:
    """All configurations that a command stands for."""
    first, *words = words_of(command)
    if first == "python":
        module = words[1]
        if module not in ROOTS:
            assert importlib.util.find_spec(module) is not None, f"no module {module}"
            return []
        return [compose_command(module, words[2:])]
    if first == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        stage, own = script_words(script)
        given = [w for w in words if "=" in w and not w.startswith("--")]
        return [compose_command(module_of(stage), last_wins(own + given))]
    model, *given = words
    made = []
    for stage in STAGES:
        _, own = script_words(f"slurm/{stage}_{model}.sh")
        mine = [w.removeprefix(f"{stage}:") for w in given if w.split(":")[0] in (stage, w)]
        mine = [w for w in mine if not w.startswith("--")]
        made.append(compose_command(module_of(stage), last_wins(own + mine)))
    return made


def module_of(stage: str) -> str:
    return "data_prep.pack" if stage == "pack" else f"launch.{stage}"


@pytest.fixture(autouse=True)
def own_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``launch.init`` would have written before the commands of docs/your_own.md."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    text = "defaults: [{override /model: tiny}]\ntarget_len: 2048\nrun: {name: mine}\n"
    for name in ("mine", "mine_two", "mine_cluster", "NAME"):
        (folder / f"{name}.yaml").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text(text)
    model = "name: mine\npath: /models/mine\noriginal_len: 8192\n"
    (tmp_path / "elsewhere" / "my_model.yaml").write_text(model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_shown_command_composes(page: str, command: str) -> None:
    compose_shown(command)


def test_the_commands_are_found() -> None:
    """The pages with most to show, and the ones that had faults."""
    pages = [page for page, _ in SHOWN]
    assert pages.count("README.md") >= 20, [c for p, c in SHOWN if p == "README.md"]
    for page in ("slurm/pipeline.sh", "slurm/train_llama3_128k.sh", "slurm/pack_phi3_mini_128k.sh"):
        assert page in pages


def test_token_counts_are_read_in_scientific_notation() -> None:
    (made,) = compose_shown("sbatch slurm/train_llama3_128k.sh training.tokens=1e9")
    assert isinstance(made, TrainRoot) and type(made.training.tokens) is int
    assert made.training.tokens == 10**9
    train = next(c for p, c in SHOWN if p == "slurm/pipeline.sh" and "training.tokens" in c)
    assert [m.training.tokens for m in compose_shown(train) if isinstance(m, TrainRoot)] == [10**9]
