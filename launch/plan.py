"""``python -m launch.plan experiment=llama3_8b_128k hardware=a100_64``: what a training takes.

Before it is started, and from config.json only (the model's, or the copy in
``model.config_folder``): no weights, no segments, no GPU. Prints parameters and FLOPs, the best
layout of the processes by enumeration, its memory by part and time by part, what does not fit and
why, what other targets and machines cost, and what search and evaluation cost.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.command import run_command
from longrope2.config import compose, find_shipped, target_faults
from longrope2.errors import ConfigError
from longrope2.evaluation.config import EvaluateRoot, EvaluationConfig, evaluated_lengths
from longrope2.files.artifacts import MANIFEST_NAME, library_versions, read_manifest, write_text
from longrope2.model.folder import given_config_file, look_before, merged_config_file
from longrope2.model.shape import ASSUMED_LONG_SHARE, CONFIG_FILE, ModelShape, Workload
from longrope2.parallel.dims import grid_faults
from longrope2.planning.hardware import HardwareConfig, make_machine
from longrope2.planning.memory import Layout
from longrope2.planning.plan import Plan, PlanConfig, print_plan
from longrope2.search.config import Algorithm, SearchConfig, most_candidates
from longrope2.training.config import Precision, TrainRoot, recompute_faults, with_room_for_largest

if TYPE_CHECKING:
    from longrope2.training.verify import Verification


@dataclass
class PlanRoot(TrainRoot):
    """Configuration of the command: a training, the stages around it, and a machine."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    verify: bool = False
    """Execute one rank of the configured run without memory or time, and set what it counts beside
    the planner's figures (minutes); fails where one differs by more than 5 %."""
    verify_file: str | None = None
    """JSON file that ``verify=true`` writes its figures to, whole; null prints them only."""


def main() -> None:
    """Compose, plan, print."""
    config = compose(PlanRoot, "plan", sys.argv[1:])
    if not config.verify:
        print_plan(plan_run(config))
        return
    found = verify_run(config)
    from longrope2.training.verify import print_verification

    print_verification(found)
    if config.verify_file is not None:
        content = {"command": shlex.join(["python", "-m", "launch.plan", *sys.argv[1:]])}
        content |= {"versions": library_versions(), **found.to_json()}
        write_text(Path(config.verify_file), json.dumps(content, indent=1) + "\n")
    if found.wrong:
        wrong = ", ".join(figure.what for figure in found.wrong)
        sys.exit(f"the planner is wrong by more than 5 % in: {wrong}")


def verify_run(config: PlanRoot) -> "Verification":
    """The planner's figures of the configured layout beside those of its rehearsal.

    Call it once a process (``rehearse``).

    Raises:
        ConfigError, ArtifactError: as ``plan_run`` and a dry run of the training; or the run keeps
            something in CPU memory.
    """
    plan = plan_run(config)
    if faults := _verify_faults(config):
        raise ConfigError(faults)
    # Only now: torch and DeepSpeed load for seconds.
    from longrope2.training.plan import resolve_run
    from longrope2.training.rehearsal import rehearse
    from longrope2.training.verify import verify

    num_processes = config.parallel.processes
    run = resolve_run(replace(config, dry_run=True), num_processes)
    layout = _configured_layout(config, plan.shape)
    layout = replace(layout, bf16=config.training.precision is not Precision.fp32)
    rehearsal = rehearse(
        replace(run, recompute_layers=layout.recompute_layers),
        short_document_tokens=round(plan.workload.short_document_tokens),
    )
    workload = replace(plan.workload, short_document_tokens=rehearsal.short_document_tokens)
    mixed = config.training.mixed
    return verify(plan.shape, workload, layout, rehearsal.phases, mixed=mixed)


def plan_run(config: PlanRoot) -> Plan:
    """Everything the command prints.

    Raises:
        ConfigError: values that describe no run; all faults together.
        ArtifactError: the model's config.json cannot be found or read.
    """
    look = look_before(config.model, takes_file=True, takes_copy=True)
    if faults := [*look.faults, *_faults(look.with_its_window(config))]:
        raise ConfigError(faults)
    look.print_notes()
    training, parallel, model = config.training, config.parallel, config.model
    elsewhere = None if find_shipped(model.path).is_dir() else model.config_folder
    if elsewhere is None:
        file = given_config_file(model, config.target_len)
    else:
        copied = find_shipped(elsewhere) / CONFIG_FILE
        file = merged_config_file(copied, model, config.target_len)
    shape = ModelShape.from_file(file)
    share, mix_origin = _long_share(config)
    workload = Workload(
        target_len=config.target_len,
        step_tokens=training.global_batch_tokens,
        total_tokens=training.tokens or 0,
        long_share=share if training.mixed else 1.0,
        short_document_tokens=config.plan.short_document_tokens or model.original_len / 2,
    )
    configured = _configured_layout(config, shape)
    return Plan(
        name=model.name,
        original_len=model.original_len,
        options=config.plan,
        mix_origin=mix_origin if training.mixed else "",
        hardware=config.hardware,
        shape=shape,
        workload=workload,
        norm=training.norm,
        zero=configured.zero,
        configured=configured if parallel.processes > 1 else None,
        search_forwards=_search_forwards(config),
        evaluation_samples=_evaluation_samples(config),
        num_subjects=len(config.evaluation.subjects),
    )


def _long_share(config: PlanRoot) -> tuple[float, str]:
    """Share of long segments, and where it comes from: given, the run's segments, or assumed."""
    if (given := config.plan.long_share) is not None:
        return given, " (plan.long_share)"
    folder = Path(config.segments or config.run.segments_folder)
    if not (folder / MANIFEST_NAME).is_file():
        return ASSUMED_LONG_SHARE, f" (assumed: {folder} holds no segments yet)"
    counts = read_manifest(folder, "segments").counts
    num_long, num_short = counts["num_long_segments"], counts["num_short_segments"]
    return num_long / (num_long + num_short), f" (as in {folder})"


def _configured_layout(config: PlanRoot, shape: ModelShape) -> Layout:
    """The layout that the configuration asks for, on its hardware."""
    from longrope2.training.machine import configured_layout, recomputed_layers  # loads for seconds

    processes, norm = config.parallel.processes, config.training.norm
    if faults := recompute_faults(config.training, shape.num_layers):
        raise ConfigError(faults)
    config = replace(config, zero=with_room_for_largest(config.zero, shape))
    layout = configured_layout(config, processes, bf16=True, norm=norm)
    usable = make_machine(config.hardware).usable_bytes
    layers = recomputed_layers(config, shape, layout, usable_bytes=usable)
    return replace(layout, recompute_layers=layers)


def _search_forwards(config: PlanRoot) -> int:
    """Forward passes of a search, as so many of the target length."""
    from longrope2.search.halving import most_halving_forwards

    search, target_len = config.search, config.target_len
    lengths = [round(share * target_len) for share in search.lengths]
    forwards = dict.fromkeys(lengths, most_candidates(search) * search.num_samples)
    if search.algorithm is Algorithm.halving:
        forwards = most_halving_forwards(search, lengths)
    tokens = sum(length * count for length, count in forwards.items())
    return -(-tokens // target_len)


def _evaluation_samples(config: PlanRoot) -> list[tuple[int, float]]:
    """Lengths and numbers of samples of needles and perplexity; tasks that generate are not in."""
    evaluation, subjects = config.evaluation, len(config.evaluation.subjects)
    root = EvaluateRoot(
        run=config.run, model=config.model, target_len=config.target_len, evaluation=evaluation
    )
    needle = evaluation.needle
    at_each = len(needle.depths) * needle.samples_per_depth + evaluation.perplexity.num_windows
    samples = [(length, float(at_each * subjects)) for length in evaluated_lengths(root)]
    return [*samples, (config.model.original_len, evaluation.retention.num_windows * subjects)]


def _verify_faults(config: PlanRoot) -> list[str]:
    """What a rehearsal on fake tensors of one device cannot tell apart."""
    in_cpu_memory = {
        "training.offload_activations": config.training.offload_activations,
        "zero.offload_optimizer": config.zero.offload_optimizer,
    }
    return [
        f"{key}=true: verify=true cannot tell CPU memory from the GPU's; set it to false to verify"
        for key, is_set in in_cpu_memory.items()
        if is_set
    ]


def _faults(config: PlanRoot) -> list[str]:
    """Values that describe no run, beside those the hardware checks itself."""
    training, parallel, plan = config.training, config.parallel, config.plan
    tokens, batch, target = training.tokens, training.global_batch_tokens, config.target_len
    faults = target_faults(config.model, target)
    if config.verify_file is not None and not config.verify:
        faults.append(f"verify_file={config.verify_file} is written by verify=true only")
    if tokens is None or tokens < batch:
        step = f"one step of training.global_batch_tokens={batch} tokens"
        faults.append(f"training.tokens={tokens}: a plan needs a budget of at least {step}")
    if batch < 1 or batch % max(1, target):
        given = f"training.global_batch_tokens={batch}"
        faults.append(f"{given} must be a multiple of target_len={target}")
    if parallel.processes < 1:
        faults.append(f"parallel.processes={parallel.processes} must be above 0")
    else:
        faults += grid_faults(parallel.processes, parallel.sequence, parallel.context)
    if parallel.zero_stage != 3:
        given = f"parallel.zero_stage={parallel.zero_stage}"
        faults.append(f"{given}: the planner knows stage 3 only; set it to 3 to plan")
    if plan.long_share is not None and not 0 <= plan.long_share <= 1:
        faults.append(f"plan.long_share={plan.long_share} must be from 0 to 1")
    if (documents := plan.short_document_tokens) is not None and not 1 <= documents <= target:
        given = f"plan.short_document_tokens={documents}"
        faults.append(f"{given} must be from 1 to target_len, or null")
    for name in ("micro_batches", "lengths", "gpu_counts"):
        values = getattr(plan, name)
        if not values or min(values) < 1:
            faults.append(f"plan.{name}={values} must hold numbers of at least 1")
    return faults


if __name__ == "__main__":
    run_command(main)
