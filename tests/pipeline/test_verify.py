"""``launch.plan verify=true``: every experiment's layout, and those that the planner recommends.

Each is rehearsed once at two layers; the planner's figures agree with what is counted within 5 %,
or differ for a reason that is written beside them.
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
from longrope2.planning.memory import Layout

ROOT = Path(__file__).parents[2]
# Of two-layer models; their real ones are verified whole, see docs/measured.
LAYERS = 2
EXPERIMENTS = [path.stem for path in sorted((CONF_FOLDER / "experiment").glob("*.yaml"))]
HARDWARE = [path.stem for path in sorted((CONF_FOLDER / "hardware").glob("*.yaml"))]
_found: dict[tuple[Any, ...], dict[str, Any]] = {}


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
    for hardware in HARDWARE if config.parallel.processes > 4 else ():
        best = plan_run(
            compose(PlanRoot, "plan", [f"experiment={experiment}", f"hardware={hardware}"])
        ).choice.best
        if best is not None and not best.layout.offload:  # CPU memory is not told apart
            found[tuple(settings(best.layout))] = config
    return found


def counted(experiment: str, given: tuple[str, ...], tmp_path: Path) -> dict[str, Any]:
    """What the command writes."""
    output = tmp_path / "verified.json"
    overrides = [f"+model.config.num_hidden_layers={LAYERS}"] if "128k" in experiment else []
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


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_planner_agrees_with_a_rehearsal(experiment: str, tmp_path: Path) -> None:
    config = compose(PlanRoot, "plan", [f"experiment={experiment}"])
    if experiment.endswith("_pack") or config.parallel.zero_stage != 3:
        pytest.skip("packs only, or has a ZeRO stage that the planner does not model")
    if config.training.tokens is None:
        pytest.skip("a plan needs a token budget")
    for given in layouts(experiment):
        # Baselines differ in their factors, which change no size.
        grid = (config.parallel.processes, config.parallel.sequence, config.target_len)
        key = (config.model.name, config.training.mixed, *grid, given)
        if key not in _found:
            _found[key] = counted(experiment, given, tmp_path)
        figures = _found[key]["figures"]
        assert len(figures) >= 14
        wrong = [f for f in figures if abs(f["difference"]) > 0.05 and not f["reason"]]
        assert not wrong, (given, wrong)


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
