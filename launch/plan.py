"""``python -m launch.plan experiment=llama3_8b_128k cluster=a100_64``: what a training takes,
before it is started.

Reads config.json only (the model's, or the copy in ``model.config_folder``): no weights, no
segments, no GPU. Prints parameters and FLOPs, the best layout of the processes by enumeration, its
memory by part and time by part, what does not fit and why, what other targets and machines cost,
and what search and evaluation cost. ``cluster=NAME`` is short for ``hardware=NAME``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longrope2.command import run_command
from longrope2.config import compose, find_shipped, target_faults
from longrope2.errors import ConfigError
from longrope2.evaluation.config import EvaluateRoot, EvaluationConfig, evaluated_lengths
from longrope2.model.folder import find_config_file
from longrope2.model.norms import NormKernel
from longrope2.model.shape import ModelShape, Workload
from longrope2.planning.choice import choose_layout, cost_table, find_refusal
from longrope2.planning.hardware import HardwareConfig, make_machine
from longrope2.planning.memory import Layout, RecomputePolicy
from longrope2.planning.timing import forward_hours
from longrope2.planning.view import PlannedRun, print_plan
from longrope2.search.config import SearchConfig
from longrope2.search.run import most_candidates
from longrope2.training.config import TrainRoot
from longrope2.training.forecast import zero_buffers

CLUSTER_FLAG, HARDWARE_KEY = "cluster=", "hardware="


@dataclass
class PlanConfig:
    """What is assumed of the segments, and how far the tables go."""

    long_share: float = 0.7
    """Share of long segments, 0 to 1; the rest is short."""
    short_document_tokens: float | None = None
    """Mean length of the documents in short segments, weighted by length; null is half of
    ``model.original_len``."""
    micro_batches: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Segments at once that are tried; the trainer runs 1."""
    lengths: list[int] = field(default_factory=lambda: [131_072, 262_144, 524_288, 1_048_576])
    """Targets of the cost table, tokens."""
    gpu_counts: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512])
    """Machines of the cost table."""
    shown_layouts: int = 8
    """Rows of the table of layouts."""


@dataclass
class PlanRoot(TrainRoot):
    """Configuration of the command: a training, the stages around it, and a cluster."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def main() -> None:
    """Compose, plan, print."""
    print_plan(plan_run(compose(PlanRoot, "plan", with_hardware(sys.argv[1:]))))


def with_hardware(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``cluster=NAME`` as ``hardware=NAME``; the group ``cluster`` says where units of packing run."""
    return [
        HARDWARE_KEY + argument.removeprefix(CLUSTER_FLAG)
        if argument.startswith(CLUSTER_FLAG)
        else argument
        for argument in arguments
    ]


def plan_run(config: PlanRoot) -> PlannedRun:
    """Everything the command prints.

    Raises:
        ConfigError: values that describe no run; all faults together.
        ArtifactError: the model's config.json cannot be found.
    """
    faults = _faults(config)
    if faults:
        raise ConfigError(faults)
    machine = make_machine(config.hardware)
    shape = ModelShape.from_folder(_config_folder(config))
    workload, zero = make_workload(config), zero_buffers(config.zero)
    fused_norms = config.training.norm is not NormKernel.model
    configured = None
    if config.parallel.processes > 1:
        policy = RecomputePolicy(config.training.recompute.value)
        offload, sequence = config.training.offload_activations, config.parallel.sequence
        configured = Layout(
            config.parallel.processes // sequence,
            sequence,
            policy,
            offload=offload,
            zero=zero,
            fused_norms=fused_norms,
        )
    num_forwards = most_candidates(config.search) * config.search.num_samples
    return PlannedRun(
        name=config.model.name,
        config=config.hardware,
        machine=machine,
        shape=shape,
        workload=workload,
        configured=configured,
        configured_refusal=None
        if configured is None
        else find_refusal(shape, workload, machine, configured),
        choice=choose_layout(
            shape, workload, machine, zero, config.plan.micro_batches, fused_norms=fused_norms
        ),
        table=cost_table(
            shape,
            workload,
            machine,
            zero,
            config.plan.lengths,
            config.plan.gpu_counts,
            fused_norms=fused_norms,
        ),
        shown_layouts=config.plan.shown_layouts,
        search_hours=forward_hours(shape, machine, [(config.target_len, num_forwards)]),
        search_forwards=num_forwards,
        evaluation_hours=forward_hours(shape, machine, evaluation_samples(config)),
        num_subjects=len(config.evaluation.subjects),
        norm=config.training.norm,
    )


def make_workload(config: PlanRoot) -> Workload:
    """The training's tokens and segments."""
    documents = config.plan.short_document_tokens or config.model.original_len / 2
    return Workload(
        target_len=config.target_len,
        step_tokens=config.training.global_batch_tokens,
        total_tokens=config.training.tokens or 0,
        long_share=config.plan.long_share if config.training.mixed else 1.0,
        short_document_tokens=documents,
    )


def evaluation_samples(config: PlanRoot) -> list[tuple[int, float]]:
    """Lengths and numbers of samples of needles and perplexity, over all subjects; tasks that generate are not counted."""
    evaluation, original = config.evaluation, config.model.original_len
    root = EvaluateRoot(
        run=config.run, model=config.model, target_len=config.target_len, evaluation=evaluation
    )
    at_each = (
        len(evaluation.needle.depths) * evaluation.needle.samples_per_depth
        + evaluation.perplexity.num_windows
    )
    subjects = len(evaluation.subjects)
    samples: list[tuple[int, float]] = [
        (length, at_each * subjects) for length in evaluated_lengths(root)
    ]
    return [*samples, (original, evaluation.retention.num_windows * subjects)]


def _config_folder(config: PlanRoot) -> Path:
    """The folder of the model's config.json: the model's own, else ``model.config_folder``, else the hub's."""
    model = config.model
    if model.config_folder and not find_shipped(model.path).is_dir():
        return find_shipped(model.config_folder)
    return find_config_file(model.path, "model.path").parent


def _faults(config: PlanRoot) -> list[str]:
    """Values that describe no run, beside those the hardware checks itself."""
    training, plan, parallel, faults = config.training, config.plan, config.parallel, []
    if training.tokens is None or training.tokens < training.global_batch_tokens:
        faults.append(
            f"training.tokens={training.tokens}: a plan needs a budget of at least one step of "
            f"training.global_batch_tokens={training.global_batch_tokens} tokens"
        )
    faults += target_faults(config.model, config.target_len)
    if training.global_batch_tokens < 1 or training.global_batch_tokens % max(1, config.target_len):
        faults.append(
            f"training.global_batch_tokens={training.global_batch_tokens} must be a multiple of "
            f"target_len={config.target_len}"
        )
    if parallel.processes < 1 or parallel.sequence < 1 or parallel.processes % parallel.sequence:
        faults.append(
            f"parallel.sequence={parallel.sequence} must divide parallel.processes={parallel.processes}, both above 0"
        )
    if parallel.zero_stage != 3:
        faults.append(
            f"parallel.zero_stage={parallel.zero_stage}: the planner knows stage 3 only; set it to 3 to plan"
        )
    if not 0 <= plan.long_share <= 1:
        faults.append(f"plan.long_share={plan.long_share} must be from 0 to 1")
    if (
        plan.short_document_tokens is not None
        and not 1 <= plan.short_document_tokens <= config.target_len
    ):
        faults.append(
            f"plan.short_document_tokens={plan.short_document_tokens} must be from 1 to target_len, or null"
        )
    for name in ("micro_batches", "lengths", "gpu_counts"):
        values = getattr(plan, name)
        if not values or min(values) < 1:
            faults.append(f"plan.{name}={values} must hold numbers of at least 1")
    return faults


if __name__ == "__main__":
    run_command(main)
