"""The job scripts of ``slurm/``: headers, doubled numbers, shell functions, shellcheck."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.cluster.attempts import UNKNOWN_LEAD_SECONDS
from longrope2.config import compose
from longrope2.training.config import TrainRoot

ROOT = Path(__file__).parent.parent.parent
MODELS = ("llama3_128k", "phi3_mini_128k")
STAGES = ("pack", "search", "train", "evaluate", "export")
SCRIPTS = [ROOT / "slurm" / f"{stage}_{model}.sh" for model in MODELS for stage in STAGES]
OWN = [ROOT / "slurm" / f"{stage}_own.sh" for stage in STAGES]

COMMON = (ROOT / "slurm" / "common.sh").read_text()
SIGNAL_LEAD = int(re.search(r"^SIGNAL_LEAD=(\d+)", COMMON, re.MULTILINE)[1])  # pyright: ignore


def header(script: Path) -> dict[str, str]:
    """The #SBATCH options of a script."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), flags=re.MULTILINE)
    assert len(dict(found)) == len(found), f"{script}: an option stands twice"
    return dict(found)


def bash(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", [*SCRIPTS, *OWN], ids=lambda script: script.stem)
def test_header(script: Path) -> None:
    """Every job can be requeued, appends to its log, and is told before its time limit."""
    options = header(script)
    assert options["job-name"] == script.stem
    assert options["output"] == "slurm/logs/%x-%j.log" and options["open-mode"] == "append"
    # Only training has a state to save.
    lead = SIGNAL_LEAD if script.stem.startswith("train_") else 300
    assert "requeue" in options and options["signal"] == f"B:USR1@{lead}"
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("model", MODELS)
def test_training_asks_for_the_paper_s_64_gpus(model: str) -> None:
    options = header(ROOT / "slurm" / f"train_{model}.sh")
    assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == (
        "8",
        "8",
        "1",
    )


@pytest.mark.parametrize("model", MODELS)
def test_models_agree_with_the_experiment(model: str) -> None:
    """What slurm/models says for all stages is what conf/experiment says for training."""
    words = bash(
        f'. slurm/models/{model}.sh; echo "$EXPERIMENT $SEQUENCE_RANKS ${{EXTENSION[*]}}"'
    ).stdout.split()
    experiment = compose(TrainRoot, "train", [f"experiment={words[0]}"])
    assert words[1:] == [
        str(experiment.parallel.sequence),
        f"model={experiment.model.name}",
        f"target_len={experiment.target_len}",
        f"run.name={experiment.run.name}",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    files = [
        *sorted((ROOT / "slurm").glob("*.sh")),
        *sorted((ROOT / "slurm" / "models").glob("*.sh")),
    ]
    checked = subprocess.run(
        ["shellcheck", "-x", *map(str, files), "slurm/site.example.env"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def function(name: str) -> str:
    """The text of a function of slurm/common.sh."""
    found = re.search(
        rf"^{name}\(\) \{{\n.*?^\}}$",
        (ROOT / "slurm" / "common.sh").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None
    return found[0]


def test_of_two_words_with_one_key_the_last_counts() -> None:
    words = "model=a --target x=1 model=b x=2 mixture={a: 1, b: 2}".split(" ", 5)
    quoted = " ".join(f"'{word}'" for word in words)
    ended = bash(f"{function('last_wins')}\nlast_wins {quoted}; printf '%s\\n' \"${{WORDS[@]}}\"")
    assert ended.stdout.splitlines() == ["--target", "model=b", "x=2", "mixture={a: 1, b: 2}"]


@pytest.mark.parametrize(
    "words",
    [
        ["x$(touch F)=1"],
        ["x$(touch F)=1", "x$(touch F)=2"],
        ["`touch F`=1", "a[$(touch F)]=1"],
        ["x=$(touch F)", "x;touch F=1", "]=1", "@=1", "*=1", "a b=1"],
    ],
)
def test_a_word_is_never_run(tmp_path: Path, words: list[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    text = f"{function('last_wins')}\nset -eu; last_wins {quoted}; printf '%s\\n' \"${{WORDS[@]}}\""
    ended = bash(f"cd '{tmp_path}'; {text}")
    last = list({word.partition("=")[0]: word for word in words}.values())
    assert ended.stdout.splitlines() == last, ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["runs/a", "my runs/a b", r"back\\nslash/a"])
@pytest.mark.parametrize("queued", [True, False])
def test_a_run_that_is_queued_is_known_by_its_whole_path(
    tmp_path: Path, run: str, queued: bool
) -> None:
    """Another run whose path begins alike is none; nothing is submitted in either case."""
    listed = f"7 {run}\n9 {run}\n" if queued else ""
    (tmp_path / "queue").write_text(f"5 {run}2\n{listed}6 {run.split(' ')[0]} other\n8 (null)\n")
    for name, text in (("squeue", f"cat '{tmp_path}/queue'"), ("sbatch", "exit 9")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    folder, _, name = run.rpartition("/")
    words = f"'run.root={folder}' 'run.name={name}'"
    copied = f"cp -r slurm '{tmp_path}/' && cd '{tmp_path}'"
    ended = bash(f"{copied} && PATH='{tmp_path}':$PATH bash slurm/pipeline.sh llama3_128k {words}")
    refused = f"error: {run} is in the queue already: jobs 7 9; wait, or scancel 7 9\n"
    assert (ended.returncode, ended.stderr) == ((2, refused) if queued else (9, ""))


COUNT = f"note_failure() {{ :; }}; fail() {{ echo error: $*; exit 2; }}\n{function('count_ranks')}"


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ("DEVICE=gpu SLURM_GPUS_ON_NODE=8", "8"),
        ("DEVICE=cpu", "1"),
        ("DEVICE=cpu SLURM_GPUS_ON_NODE=2", "2"),
        ("DEVICE=gpu RANKS_PER_NODE=4", "4"),
    ],
)
def test_ranks_of_a_node(settings: str, ranks: str) -> None:
    unset = "unset SLURM_GPUS_ON_NODE RANKS_PER_NODE"
    ended = bash(f"{unset}; {COUNT}\n{settings}; count_ranks; echo $RANKS_PER_NODE")
    assert ended.stdout.strip() == ranks, ended.stderr


def test_a_job_without_gpus_is_refused() -> None:
    unset = "unset SLURM_GPUS_ON_NODE RANKS_PER_NODE"
    ended = bash(f"{unset}; {COUNT}\nDEVICE=gpu; count_ranks; echo started")
    assert ended.returncode == 2 and "started" not in ended.stdout
    assert "SLURM_GPUS_ON_NODE is not set" in ended.stdout
    assert "--gpus-per-node=N, or set RANKS_PER_NODE=N in slurm/site.env" in ended.stdout
    for stage in ("train", "search"):
        assert "\n    count_ranks\n" in function(stage)


@pytest.mark.parametrize(
    ("lead", "left", "told"),
    [
        (SIGNAL_LEAD, 90_000, False),  # Slurm's own signal comes early enough
        (SIGNAL_LEAD + 1, 90_000, True),
        (SIGNAL_LEAD + 1, 1_500, False),  # it would be told before it has done anything
        (SIGNAL_LEAD + 1, -1, False),  # no time limit
    ],
)
def test_a_job_whose_stops_take_long_tells_itself(lead: int, left: int, told: bool) -> None:
    parts = [
        f"ON_STOP=save SIGNAL_LEAD={SIGNAL_LEAD}; say_what_sigterm_leaves() {{ :; }}",
        f"here() {{ echo {lead}; }}; say() {{ echo $*; }}; sleep() {{ echo slept $1; false; }}",
        f"end_of_job() {{ echo $(($(date +%s) + {left})); }}",
        function("stop_in_time"),
        "stop_in_time; wait",
    ]
    printed = bash("\n".join(parts)).stdout
    words = f"a stop may take {lead} s, as measured"
    assert (words in printed) is told, printed
    assert (f"slept {left - lead}" in printed or f"slept {left - lead - 1}" in printed) is told


def test_the_lead_that_scripts_ask_slurm_for() -> None:
    assert SIGNAL_LEAD == UNKNOWN_LEAD_SECONDS


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("experiment=mine", "runs/mine"),
        ("experiment=/data/my.yaml run.root=/r", "/r/my"),
        ("run.name=x experiment=mine", "x"),
        ("model=tiny run.name=y run.root=/r", "/r/y"),
    ],
)
def test_the_run_folder_of_some_words(words: str, folder: str) -> None:
    """Also the pipeline's, which looks there for what is complete."""
    ended = bash(f"{function('run_folder')}\nWORDS=({words}); run_folder")
    assert ended.stdout.strip() == (folder if "/" in folder else f"runs/{folder}")


def line_function(name: str) -> str:
    """The text of a function of slurm/common.sh that is one line."""
    found = re.search(
        rf"^{name}\(\) .*\}}$", (ROOT / "slurm" / "common.sh").read_text(), re.MULTILINE
    )
    assert found is not None
    return found[0]


HERE = "\n".join(
    [
        "SLURMD_NODENAME=n3 PYTHON=(echo python 'a b'); srun() { echo srun; }",
        *map(line_function, ("in_container", "here")),
        function("exec_here").replace("exec srun", "exec echo srun"),
    ]
)


def test_without_containers_python_runs_in_the_batch_shell() -> None:
    ended = bash(f"{HERE}\nSRUN_OPTIONS=(); here -m launch.doctor 'c d'; echo after")
    assert ended.stdout == "python a b -m launch.doctor c d\nafter\n", ended.stderr


def test_in_containers_python_runs_in_a_step_of_the_same_node() -> None:
    ended = bash(
        f"{HERE}\nSRUN_OPTIONS=(--container-image='x y'); here -m launch.doctor; echo after"
    )
    step = "srun --container-image=x y --overlap --nodes=1 --ntasks=1 --nodelist=n3"
    assert ended.stdout == f"{step} echo python a b -m launch.doctor\nafter\n", ended.stderr


def test_every_python_of_a_job_goes_where_the_site_file_says() -> None:
    """Beside ``exec_here`` and packing without containers, each stands behind srun's options."""
    text = (ROOT / "slurm" / "common.sh").read_text()
    for name in ("exec_here", "pack_from_here"):
        text = text.replace(function(name), "")
    calls = re.findall(r'.*\n?.*"\$\{PYTHON\[@\]\}"', text)
    assert len(calls) == 2 and all('srun "${SRUN_OPTIONS[@]}"' in call for call in calls)


@pytest.mark.parametrize(("wait", "said"), [("30 sec", True), ("90 sec", False)])
def test_a_short_grace_after_sigterm_is_said(wait: str, said: bool) -> None:
    parts = [
        "SLURM_JOB_ID=7; say() { echo $*; }",
        f"scontrol() {{ echo 'KillWait                = {wait}'; }}",
        function("say_what_sigterm_leaves"),
        "say_what_sigterm_leaves 90",
    ]
    printed = bash("\n".join(parts)).stdout
    words = "Slurm kills a job 30 s after SIGTERM (KillWait), and a stop may take 90 s here"
    assert (words in printed) is said
    assert ("scancel --batch --signal=USR1 7" in printed) is said
    assert '\n    say_what_sigterm_leaves "$lead"\n' in function("stop_in_time")


def test_scripts_refuse_to_run_outside_a_job() -> None:
    ended = bash("unset SLURM_JOB_ID; bash slurm/train_llama3_128k.sh")
    assert (
        ended.returncode == 2
        and "submit it: sbatch slurm/SCRIPT.sh [key=value ...]" in ended.stderr
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which model\\? .* one of llama3_128k own phi3_mini_128k"),
        ("llama4", "no slurm/models/llama4.sh; one of llama3_128k own phi3_mini_128k"),
        ("llama3_128k train:run.name=x", "train:run.name=x: all stages share one run folder"),
        ("llama3_128k --nodes", "--nodes: give sbatch's options as --option=value"),
        (
            "llama3_128k trian:a",
            "trian:a: neither .* STAGE one of pack search train evaluate export",
        ),
    ],
)
def test_pipeline_refuses(words: str, message: str) -> None:
    ended = bash(f"bash slurm/pipeline.sh {words}")
    assert ended.returncode == 2 and re.search(message, ended.stderr), ended.stderr
