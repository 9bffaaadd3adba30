"""The W&B workspace of a run, built by code: one section per question.

Needs the package wandb-workspaces (extra ``dashboards``) and, to be saved, a W&B login. Panels read
the metric names that the stages log; mix and heat maps are logged by ``launch.report workspace``
under ``MIX_KEY`` and ``NEEDLE_MAPS_KEY``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longrope2.errors import ConfigError
from longrope2.rope.factors import Window
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
_MICRO_STEPS = ("perf/micro_step_seconds_short", "perf/micro_step_seconds_long")
SPEED_PANELS = (
    ("Tokens per second and GPU", ("perf/tokens_per_second_per_gpu",), False),
    ("Model FLOPs utilisation, causal FLOPs", ("perf/mfu",), False),
    ("Peak memory of a process, GiB", ("perf/memory_peak_gib",), False),
    ("Seconds of a step", ("perf/step_seconds",), False),
    ("Seconds of a micro-step by window", _MICRO_STEPS, False),
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

    ``run_name`` is also the group of its stages in W&B; ``evaluated`` is suite
    (``needle_accuracy``) -> model -> lengths in tokens.

    Raises:
        ConfigError: the package is not installed, or ``tracking.entity`` is not known.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        fault = "wandb-workspaces is not installed; pip install '.[dashboards]'"
        raise ConfigError([fault]) from None
    if tracking.entity is None:
        fault = "tracking.entity is null; give the W&B user or team that the workspace belongs to"
        raise ConfigError([fault])
    mix: list[Any] = [f"{MIX_KEY}/{source}/{window}" for source in mix_sources for window in Window]
    mix_plot = wr.BarPlot(title="Tokens by source and window", metrics=mix, orientation="h")
    title = "Needles by depth and length"
    maps = wr.MediaBrowser(title=title, media_keys=[NEEDLE_MAPS_KEY], num_columns=2)
    suites = {}
    for suite, models in evaluated.items():
        plots = [_suite_plot(suite, model, lengths) for model, lengths in models.items()]
        suites[f"Evaluation: {suite}"] = plots
    sections = {
        "Training": [_line_plot(TOKENS, *panel) for panel in TRAINING_PANELS],
        "Speed and memory": [_line_plot(TOKENS, *panel) for panel in SPEED_PANELS],
        "Mix": [mix_plot],
        "Search": [_line_plot("search/evaluations", *panel) for panel in SEARCH_PANELS],
        **suites,
        "Needle heat maps": [maps],
    }
    return ws.Workspace(
        entity=tracking.entity,
        project=tracking.project,
        name=f"LongRoPE2 {run_name}",
        sections=[_section(name, panels) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=TOKENS, max_runs=20),
        runset_settings=ws.RunsetSettings(query=run_name),
    )


def _line_plot(x: str, title: str, metrics: Sequence[str], log_y: bool) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=x, y=list(metrics), log_y=log_y, title_x=x)


def _suite_plot(suite: str, model: str, lengths: Sequence[int]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    metrics: list[Any] = [f"eval/{suite}/{model}/{length}" for length in lengths]
    title = f"{model}: {suite.replace('_', ' ')} by length"
    return wr.BarPlot(title=title, metrics=metrics, orientation="v")


def _section(name: str, panels: list[Any]) -> Any:
    """Up to three panels side by side, in as many rows as they need."""
    import wandb_workspaces.workspaces as ws

    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    layout = ws.SectionLayoutSettings(columns=columns, rows=rows)
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)
