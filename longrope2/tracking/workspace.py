"""The W&B workspace a user watches, built by code: one section per question, over the runs of one
extension.

Needs the package wandb-workspaces (extra ``dashboards``) and, to be saved, a W&B login. Panels read
the metric names that the stages log; mix and heat maps are logged by ``launch.report workspace``
under ``MIX_KEY`` and ``NEEDLE_MAPS_KEY``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longrope2.errors import ConfigError
from longrope2.tracking.metrics import TrackingConfig

NEEDLE_MAPS_KEY = "report/needle_maps"
MIX_KEY = "report/mix_tokens"
TOKENS = "train/tokens"
# Title, metrics, logarithmic axis.
TRAINING_PANELS = (
    ("Loss by window", ("train/loss_short", "train/loss_long"), False),
    ("Loss of all tokens", ("train/loss",), False),
    ("Learning rate", ("train/learning_rate",), False),
    ("Gradient norm, before clipping", ("train/grad_norm",), True),
    ("Skipped steps", ("train/skipped_steps",), False),
)
SPEED_PANELS = (
    ("Tokens per second and GPU", ("perf/tokens_per_second_per_gpu",), False),
    ("Model FLOPs utilisation, causal FLOPs", ("perf/mfu",), False),
    ("Peak memory of a process, GiB", ("perf/memory_peak_gib",), False),
    ("Seconds of a step", ("perf/step_seconds",), False),
    (
        "Seconds of a micro-step by window",
        ("perf/micro_step_seconds_short", "perf/micro_step_seconds_long"),
        False,
    ),
)
SEARCH_PANELS = (
    ("Best perplexity so far", ("search/best_needle_ppl", "search/best_ppl"), True),
    ("Critical dimension of the best", ("search/critical_index",), False),
)


def build_workspace(
    tracking: TrackingConfig,
    run_name: str,
    mix_sources: Sequence[str],
    evaluated: Mapping[str, Mapping[str, Sequence[int]]],
) -> Any:
    """The workspace of one run, not saved yet (``.save()`` needs a login).

    Args:
        tracking: Project and team.
        run_name: The run's name, also the group of its stages in W&B.
        mix_sources: Names of the sources of the training mix.
        evaluated: Suite (``needle_accuracy``) -> model -> lengths in tokens that have been
            evaluated.

    Raises:
        ConfigError: the package is not installed, or ``tracking.entity`` is not known.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(
            ["wandb-workspaces is not installed; pip install '.[dashboards]'"]
        ) from None
    if tracking.entity is None:
        raise ConfigError(
            ["tracking.entity is null; give the W&B user or team that the workspace belongs to"]
        )
    sections = [
        _lines_section("Training", TRAINING_PANELS, TOKENS),
        _lines_section("Speed and memory", SPEED_PANELS, TOKENS),
        _mix_section(mix_sources),
        _lines_section("Search", SEARCH_PANELS, "search/evaluations"),
        *(_suite_section(suite, models) for suite, models in evaluated.items()),
        _maps_section(),
    ]
    return ws.Workspace(
        entity=tracking.entity,
        project=tracking.project,
        name=f"LongRoPE2 {run_name}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=TOKENS, max_runs=20),
        runset_settings=ws.RunsetSettings(query=run_name),
    )


def _lines_section(name: str, panels: Sequence[tuple[str, Sequence[str], bool]], x: str) -> Any:
    """Line plots over one axis."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    plots: list[Any] = [
        wr.LinePlot(title=title, x=x, y=list(metrics), log_y=log_y, title_x=x)
        for title, metrics, log_y in panels
    ]
    return ws.Section(name=name, panels=plots, is_open=True, layout_settings=_layout(len(plots)))


def _mix_section(sources: Sequence[str]) -> Any:
    """Tokens of the mix by source and window."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    metrics: list[Any] = [
        f"{MIX_KEY}/{source}/{window}" for source in sources for window in ("short", "long")
    ]
    plots: list[Any] = [
        wr.BarPlot(title="Tokens by source and window", metrics=metrics, orientation="h")
    ]
    return ws.Section(name="Mix", panels=plots, is_open=True, layout_settings=_layout(1))


def _suite_section(suite: str, models: Mapping[str, Sequence[int]]) -> Any:
    """One bar chart per model: a suite's result at every length."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    plots: list[Any] = [
        wr.BarPlot(
            title=f"{model}: {suite.replace('_', ' ')} by length",
            metrics=[f"eval/{suite}/{model}/{length}" for length in lengths],
            orientation="v",
        )
        for model, lengths in models.items()
    ]
    return ws.Section(
        name=f"Evaluation: {suite}", panels=plots, is_open=True, layout_settings=_layout(len(plots))
    )


def _maps_section() -> Any:
    """Needle heat maps, one image per model."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    plots: list[Any] = [
        wr.MediaBrowser(
            title="Needles by depth and length", media_keys=[NEEDLE_MAPS_KEY], num_columns=2
        )
    ]
    return ws.Section(
        name="Needle heat maps", panels=plots, is_open=True, layout_settings=_layout(1)
    )


def _layout(num_panels: int) -> Any:
    """Up to three panels side by side, in as many rows as they need."""
    import wandb_workspaces.workspaces as ws

    columns = min(3, max(1, num_panels))
    return ws.SectionLayoutSettings(columns=columns, rows=-(-max(1, num_panels) // columns))
