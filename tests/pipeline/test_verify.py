"""``launch.plan verify=true``: every experiment's layout, and those that the planner recommends.

Each is rehearsed once at two layers, and the planner's figures agree with what is counted within
5 %. Experiments of the same sizes are rehearsed once: about six minutes of one core in all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.plan import PlanRoot, plan_run, verify_run
from launch.plan import main as plan_main
from longrope2.command import run_command
from longrope2.config import CONF_FOLDER, compose
from longrope2.errors import ConfigError
from longrope2.planning.memory import Layout, Recompute
from longrope2.training.meter import Phase
from longrope2.training.verify import Figure, Verification

ROOT = Path(__file__).parents[2]
# Of two-layer models; their real ones are verified whole, see docs/measured.
LAYERS = 2
EXPERIMENTS = [path.stem for path in sorted((CONF_FOLDER / "experiment").glob("*.yaml"))]
HARDWARE = [path.stem for path in sorted((CONF_FOLDER / "hardware").glob("*.yaml"))]
# Whose recommended layouts are rehearsed too.
PAPERS = ("llama3_8b_128k", "phi3_mini_128k")
_verified: dict[tuple[Any, ...], str] = {}


def settings(layout: Layout) -> list[str]:
    """What asks for a layout on the command line; as many layers recomputed as there can be."""
    given = [
        f"parallel.processes={layout.num_processes}",
        f"parallel.sequence={layout.sequence}",
        f"parallel.context={layout.context}",
        f"training.recompute={layout.recompute.value}",
        f"training.same_kind_segments={layout.data}",
    ]
    if layout.recompute_layers is not None:
        given.append(f"training.recompute_layers={min(layout.recompute_layers, LAYERS - 1)}")
    return given


def layouts(experiment: str) -> dict[tuple[str, ...], PlanRoot]:
    """The layouts to rehearse: as configured, and the best one of every machine."""
    config = compose(PlanRoot, "plan", [f"experiment={experiment}"])
    found: dict[tuple[str, ...], PlanRoot] = {(): config}
    for hardware in HARDWARE if experiment in PAPERS else ():
        best = plan_run(
            compose(PlanRoot, "plan", [f"experiment={experiment}", f"hardware={hardware}"])
        ).choice.best
        if best is not None and not best.layout.offload:  # CPU memory is not told apart
            found[tuple(settings(best.layout))] = config
    return found


def counted(experiment: str, given: tuple[str, ...], tmp_path: Path) -> dict[str, Any]:
    """What the command writes."""
    output = tmp_path / "verified.json"
    is_large = not experiment.startswith("tiny")
    overrides = [f"+model.config.num_hidden_layers={LAYERS}"] if is_large else []
    ended = subprocess.run(
        [sys.executable, "-m", "launch.plan", f"experiment={experiment}", "verify=true"]
        + [*given, *overrides, f"verify_file={output}", f"run.root={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert "the planner beside it" in ended.stdout
    return json.loads(output.read_text())


def sizes(config: PlanRoot) -> tuple[Any, ...]:
    """All that a plan and a rehearsal depend on; baselines differ in their factors alone."""
    training, parallel = config.training, config.parallel
    grid = (parallel.processes, parallel.sequence, parallel.context, config.target_len)
    kept = (training.recompute, training.recompute_layers, training.precision, training.norm)
    tokens = (training.tokens, training.global_batch_tokens, training.mixed)
    return (config.model.name, *grid, *kept, *tokens)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_planner_agrees_with_a_rehearsal(experiment: str, tmp_path: Path) -> None:
    config = compose(PlanRoot, "plan", [f"experiment={experiment}"])
    if experiment.endswith("_pack") or config.parallel.zero_stage != 3:
        pytest.skip("packs only, or has a ZeRO stage that the planner does not model")
    if config.training.tokens is None:
        pytest.skip("a plan needs a token budget")
    if (same := _verified.setdefault(sizes(config), experiment)) != experiment:
        pytest.skip(f"has the sizes of {same}")
    for given in layouts(experiment):
        figures = counted(experiment, given, tmp_path)["figures"]
        assert len(figures) >= 14
        assert not [f for f in figures if abs(f["difference"]) > 0.05], given


@pytest.mark.slow
def test_a_second_copy_of_the_weights_in_every_node(tmp_path: Path) -> None:
    """hpZ: gathered from all ranks once a micro-step, inside the node otherwise."""
    figures = counted("llama3_8b_128k", ("zero.hpz_size=8",), tmp_path)["figures"]
    by_name = {figure["what"]: figure for figure in figures}
    assert by_name["step: weights gathered from all ranks"]["counted"] == pytest.approx(
        2.97, abs=0.01
    )
    assert not [f for f in figures if abs(f["difference"]) > 0.05]


def test_a_planner_that_is_wrong_fails_the_command(monkeypatch, capsys, tmp_path) -> None:
    figures = [
        Figure("memory, the peak", "GiB", planned=9.4, counted=10.0),
        Figure("memory at the loss", "GiB", planned=9.6, counted=10.0),
        Figure("long: products", "TFLOP", planned=10.6, counted=10.0),
    ]
    found = Verification(Layout(8, 8, Recompute.dense), [Phase("model and engine")], figures)
    monkeypatch.setattr("launch.plan.verify_run", lambda config: found)
    output = tmp_path / "figures.json"
    given = ["launch.plan", "experiment=tiny", "verify=true", f"verify_file={output}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        plan_main()
    expected = "the planner is wrong by more than 5 % in: memory, the peak, long: products"
    assert ended.value.code == expected  # printed, and exit code 1
    assert "-6.0 % *" in capsys.readouterr().out
    assert [f["difference"] for f in json.loads(output.read_text())["figures"]] == [
        -0.06, -0.04, 0.06,
    ]  # fmt: skip


def test_what_a_rehearsal_cannot_tell_is_refused(monkeypatch, capsys) -> None:
    overrides = ["experiment=llama3_8b_128k", "verify=true", "training.offload_activations=true"]
    config = compose(PlanRoot, "plan", [*overrides, "zero.offload_optimizer=true"])
    with pytest.raises(ConfigError) as raised:
        verify_run(config)
    rest = "verify=true cannot tell CPU memory from the GPU's; set it to false to verify"
    assert raised.value.faults == (
        f"training.offload_activations=true: {rest}",
        f"zero.offload_optimizer=true: {rest}",
    )
    monkeypatch.setattr(
        sys, "argv", ["launch.plan", "experiment=llama3_8b_128k", "verify_file=figures.json"]
    )
    with pytest.raises(SystemExit):
        run_command(plan_main)
    assert "verify_file=figures.json is written by verify=true only" in capsys.readouterr().err


def test_too_many_recomputed_layers_are_refused() -> None:
    overrides = ["experiment=llama3_8b_128k", "training.recompute_layers=33"]
    with pytest.raises(ConfigError) as raised:
        plan_run(compose(PlanRoot, "plan", overrides))
    allowed = "must be all, auto or a number from 1 to 32 (the model's layers)"
    assert raised.value.faults == (f"training.recompute_layers=33 {allowed}",)
