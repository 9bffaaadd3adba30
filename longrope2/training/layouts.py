"""Settings that work together, for a command that is refused: computed, not guessed.

The rules of ``config.check`` cross: the heads and the segment limit ``parallel.sequence``, which
with the processes decides the data-parallel size, whose multiple ``same_kind_segments`` must be,
whose tokens a step must be a multiple of. Mending one key at a time would be refused again.
"""

import math
from collections.abc import Iterator

from longrope2.config import nearest_target, target_faults
from longrope2.model.shape import ModelShape
from longrope2.parallel.dims import head_faults, token_multiple
from longrope2.training.config import TrainRoot

SHOWN = 2
Settings = dict[str, int]
"""Key -> value."""


def working_settings(
    config: TrainRoot, world_size: int, shape: ModelShape | None, counts: tuple[int, int] | None
) -> list[Settings]:
    """What to change so that processes, heads, batch and segments fit; fewest changes first.

    Empty when nothing need be changed, or when no change of these keys alone would help.

    Args:
        config: What was given.
        world_size: Processes; other numbers are tried where these allow no sequence parallelism.
        shape: Of the model, where its config.json is there.
        counts: Short and long segments, where they are packed.
    """
    wanted = config.parallel.sequence
    options = list(_options(config, world_size, shape, counts))
    if wanted > 1 and all(layout["parallel.sequence"] == 1 for layout in options):
        heads = shape.num_heads if shape else wanted
        for other in sorted(range(2, heads + 1), key=lambda n: abs(n - wanted)):
            options += [
                layout
                for layout in _options(config, other, shape, counts)
                if layout["parallel.sequence"] == other
            ]
    given = _given(config, world_size)
    changes = [
        {key: value for key, value in layout.items() if value != given[key]} for layout in options
    ]
    if not all(changes):
        return []
    order = sorted(
        range(len(options)),
        key=lambda i: (
            "parallel.processes" in changes[i],
            len(changes[i]),
            abs(math.log(options[i]["parallel.sequence"] / max(1, wanted))),
        ),
    )
    # The sequence is said even where it stays: the others hold for it alone.
    return [{"parallel.sequence": options[i]["parallel.sequence"], **changes[i]} for i in order]


def in_words(options: list[Settings]) -> str:
    """The first of them as a user would type them."""
    shown = [" ".join(f"{k}={v}" for k, v in layout.items()) for layout in options[:SHOWN]]
    return f"these go together: {', or '.join(shown)}"


def _given(config: TrainRoot, world_size: int) -> dict[str, int | None]:
    training = config.training
    return {
        "parallel.processes": world_size,
        "parallel.sequence": config.parallel.sequence,
        "parallel.context": config.parallel.context,
        "target_len": config.target_len,
        "training.same_kind_segments": training.same_kind_segments,
        "training.global_batch_tokens": training.global_batch_tokens,
        "training.tokens": training.tokens,
    }


def _options(
    config: TrainRoot, processes: int, shape: ModelShape | None, counts: tuple[int, int] | None
) -> Iterator[Settings]:
    """The settings nearest to those given, for each way to share these processes."""
    hpz, context = config.zero.hpz_size, config.parallel.context
    if context < 1 or processes % context:
        context = 1
    if hpz > 1 and processes % hpz:
        return
    target = config.target_len
    if target_faults(config.model, target):
        target = nearest_target(config.model, target)
    for sequence in range(1, processes + 1):
        if processes % (sequence * context) or target % token_multiple(sequence, context):
            continue
        if shape and head_faults(sequence, shape.num_heads, shape.num_kv_heads):
            continue
        layout = _fill(config, target, processes // (sequence * context), counts)
        if layout is not None:
            grid = {"parallel.sequence": sequence, "parallel.context": context}
            yield {"parallel.processes": processes, **grid, **layout}


def _fill(
    config: TrainRoot, target: int, data: int, counts: tuple[int, int] | None
) -> Settings | None:
    """Target, group, step and budget for a data-parallel size; None if the segments are too few."""
    training = config.training
    alike = _nearest(training.same_kind_segments, data)
    if counts is not None and not _in_groups(counts, alike):
        alike = data
    unit, tokens = target * alike, training.tokens
    in_a_pass = None if counts is None else _in_groups(counts, alike) * target
    if in_a_pass is not None and in_a_pass < unit:
        return None
    most = in_a_pass if tokens is None else max(tokens, unit)
    step = _nearest(training.global_batch_tokens, unit, most)
    layout = {
        "target_len": target,
        "training.same_kind_segments": alike,
        "training.global_batch_tokens": step,
    }
    return layout if tokens is None else layout | {"training.tokens": max(tokens, step)}


def _in_groups(counts: tuple[int, int], alike: int) -> int:
    """Segments of whole groups of one kind."""
    return sum(count // alike * alike for count in counts)


def _nearest(wanted: int, unit: int, most: int | None = None) -> int:
    """The multiple of ``unit`` nearest to ``wanted``, at least one, within ``most``."""
    units = max(1, round(wanted / unit))
    return unit * (units if most is None else max(1, min(units, most // unit)))
