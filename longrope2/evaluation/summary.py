"""From raw measurements and answers to the numbers people read, and the gate on the base model.

Scores are worked out from the stored texts, so a scoring rule can change without asking a model
again. The gate: a harness that does not give a base model its published scores measures something
else, and no difference to it means anything; so extended models are reported only after it.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from longrope2 import statistics
from longrope2.corpora.run_corpus import HeldoutText
from longrope2.evaluation import schema
from longrope2.evaluation.answering import NotMeasured, sample_key
from longrope2.evaluation.config import LM_EVAL_SUITE, CalibrationConfig, EvaluateRoot
from longrope2.evaluation.results import Answer, AnswersLog, Measurement
from longrope2.evaluation.ruler.config import RULER_TASKS
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.schema import Average, Cell
from longrope2.evaluation.subjects import Subject
from longrope2.inference.generation import window_for_length
from longrope2.search.objective import perplexity

FIRST_VIEW = 100  # the paper's sample count per RULER task: the first so many are shown beside all
EFFECTIVE_THRESHOLD = 85.6  # RULER's: Llama-2-7B at 4k


def summarize(
    subjects: Sequence[Subject],
    measurements: Sequence[Measurement],
    reference: str,
    text: HeldoutText | None = None,
) -> schema.EvaluationSummary:
    """Content of ``evaluations.json``; all subjects are for the same L0 and L."""
    by_suite: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        by_suite[measurement.suite].append(measurement)
    original_len = subjects[0].factors.geometry.original_len
    texts = [_text_row(m) for m in by_suite["perplexity"]]
    kept = [_text_row(m) for m in by_suite["retention"]]
    base = next(row.perplexity for row in kept if row.subject == reference)
    windows = [window_for_length(row.length, original_len).value for row in texts]
    in_context = zip(texts, windows, strict=True)
    return schema.EvaluationSummary(
        original_len=original_len,
        target_len=subjects[0].factors.target_len,
        reference=reference,
        subjects=tuple(_measured_subject(subject) for subject in subjects),
        needle=tuple(_needle_row(m, original_len) for m in by_suite["needle"]),
        perplexity=tuple(schema.ContextRow(**vars(r), window=window) for r, window in in_context),
        retention=tuple(schema.RetentionRow(**vars(r), ratio=r.perplexity / base) for r in kept),
        text=text,
    )


def metric_values(measurement: Measurement) -> dict[str, float]:
    """A measurement by tracking name, ``eval/<suite>/<task>/<length>``; the task is the subject."""
    task = f"{measurement.subject}/{measurement.length}"
    if measurement.suite == "needle":
        found = _needle_numbers(measurement.values, range(len(measurement.values["exact"])))
        return {f"eval/needle_{key}/{task}": found[key] for key in ("accuracy", "perplexity")}
    return {f"eval/{measurement.suite}/{task}": _text_row(measurement).perplexity}


def _measured_subject(subject: Subject) -> schema.MeasuredSubject:
    factors = subject.factors
    return schema.MeasuredSubject(
        name=subject.name,
        trained=subject.trained,
        method=factors.method,
        critical_index=factors.critical_index,
        factors=factors.factors,
        long_attention_scale=factors.long_attention_scale,
        source=subject.source,
    )


def _needle_row(measurement: Measurement, original_len: int) -> schema.NeedleRow:
    values = measurement.values
    by_depth: dict[float, list[int]] = defaultdict(list)
    for index, depth in enumerate(values["depths"]):
        by_depth[depth].append(index)
    window = window_for_length(measurement.length, original_len).value
    place = measurement.subject, measurement.length, window
    overall = _needle_numbers(values, range(len(values["exact"])))
    at_depth = [(depth, _needle_numbers(values, by_depth[depth])) for depth in sorted(by_depth)]
    depths = tuple(schema.DepthRow(depth, **numbers) for depth, numbers in at_depth)
    return schema.NeedleRow(*place, **overall, depths=depths)


def _needle_numbers(values: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    # Lines hold whole haystacks; those of needles with a haystack each do not say how many share.
    shared = values.get("needles_per_haystack", [1])[0]
    scores = [values["exact"][index] for index in indices]
    num_correct = sum(scores)
    num_tokens = sum(values["num_tokens"][index] for index in indices)
    return {
        "num_samples": len(indices),
        "num_correct": num_correct,
        "accuracy": num_correct / len(indices),
        "accuracy_interval": statistics.grouped_interval(
            scores, [index // shared for index in indices]
        ),
        "perplexity": perplexity(sum(values["nll"][index] for index in indices), num_tokens),
    }


def _text_row(measurement: Measurement) -> schema.TextRow:
    nll, num_tokens = measurement.values["nll"], sum(measurement.values["num_tokens"])
    place = measurement.subject, measurement.length, len(nll), num_tokens
    return schema.TextRow(*place, perplexity=perplexity(sum(nll), num_tokens))


def comparison_lines(summary: schema.EvaluationSummary) -> tuple[list[int], list[list[str]]]:
    """The lengths of a comparison, ascending, and a line of its table per subject.

    A line: name, needles retrieved in percent by length, their interval at the longest, perplexity
    of needles and of text there, change of the perplexity inside the original window.
    """
    needle = {(row.subject, row.length): row for row in summary.needle}
    text = {(row.subject, row.length): row for row in summary.perplexity}
    kept = {row.subject: row for row in summary.retention}
    lengths = sorted({length for _, length in needle})
    lines = []
    for name in (subject.name for subject in summary.subjects):
        longest = needle[name, lengths[-1]]
        low, high = longest.accuracy_interval
        shares = [f"{100 * needle[name, length].accuracy:.0f}" for length in lengths]
        perplexities = f"{longest.perplexity:.4g}", f"{text[name, lengths[-1]].perplexity:.4g}"
        changed = f"{100 * (kept[name].ratio - 1):+.1f} %"
        lines.append([name, *shares, f"{100 * low:.0f}-{100 * high:.0f}", *perplexities, changed])
    return lengths, lines


def comparison_table(summary: schema.EvaluationSummary) -> Table:
    """The comparison as a terminal table of 80 columns."""
    lengths, lines = comparison_lines(summary)
    longest = lengths[-1]
    table = Table(
        title=f"Window {summary.original_len} -> {summary.target_len} tokens",
        caption=f"{', '.join(map(str, lengths))}: needles retrieved exactly at that many tokens, "
        f"in % of {summary.needle[0].num_samples}; the 95 % interval is that at {longest}. Needle "
        f"ppl, text ppl: perplexity of needle values and of held-out text at {longest} tokens. "
        f"Short: change of the perplexity inside {summary.original_len} tokens against "
        f"{summary.reference}." + (f" {summary.text}" if summary.text else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for title in (*map(str, lengths), "95 %", "needle ppl", "text ppl", "short"):
        table.add_column(title, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def score_cells(
    subjects: Sequence[Subject],
    tasks: Sequence[GenerationTask],
    log: AnswersLog,
    given_up: Sequence[NotMeasured],
    *,
    dtype: torch.dtype,
    stop_ids: Collection[int],
) -> list[Cell]:
    """One cell per subject and task: the score with its interval, or why there is none."""
    reasons = {lost.place: lost.reason for lost in given_up}
    cells = []
    for subject in subjects:
        for task in tasks:
            keys = [sample_key(subject, s, dtype=dtype, stop_ids=stop_ids) for s in task.samples]
            answers = [answer for key in keys if (answer := log.find(key)) is not None]
            num_missing = len(keys) - len(answers)
            place = (subject.name, task.suite, task.name, task.length, len(keys))
            if answers and not num_missing:
                cells.append(_scored(place, task, answers))
            else:
                reason = reasons.get(place[:-1], "not answered yet")
                cells.append(Cell(*place, score=None, num_missing=num_missing, reason=reason))
    return cells


def _scored(
    place: tuple[str, str, str, int, int], task: GenerationTask, answers: Sequence[Answer]
) -> Cell:
    """A finished cell; ``place`` are its first fields."""
    pairs = zip(task.samples, answers, strict=True)
    scores = [task.score(sample, answer.text) for sample, answer in pairs]
    first, facts = scores[:FIRST_VIEW], [sample.facts for sample in task.samples]
    survived = [known["needle_survived"] for known in facts if "needle_survived" in known]
    return Cell(
        *place,
        score=sum(scores) / len(scores),
        interval=statistics.score_interval(scores),
        first_100=sum(first) / len(first),
        sides=scores_by_side(scores, [answer.side for answer in answers]),
        scores=tuple(scores),
        samples=tuple(sample.sha256[:16] for sample in task.samples),
        facts=tuple(facts),
        needle_survived=sum(survived) / len(survived) if survived else None,
    )


def scores_by_side(scores: Sequence[float], sides: Sequence[str]) -> dict[str, schema.SideScore]:
    """Score of the answers made with each RoPE side."""
    found = {}
    for side in ("short", "both", "long"):
        own = [score for score, its_side in zip(scores, sides, strict=True) if its_side == side]
        if own:
            interval = statistics.score_interval(own)
            found[side] = schema.SideScore(len(own), sum(own) / len(own), interval)
    return found


def average_cells(cells: Sequence[Cell]) -> list[Average]:
    """Plain mean over RULER's tasks by subject and length, None where a task is missing."""
    groups: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.suite == "ruler":
            groups[cell.subject, cell.suite, cell.length].append(cell)
    averages = []
    for place, members in groups.items():
        count = len(members)
        scores = [member.score for member in members if member.score is not None]
        if len(scores) < count:
            averages.append(Average(*place, count, score=None))
            continue
        first = sum(member.first_100 or 0.0 for member in members) / count
        interval = statistics.macro_interval([member.scores for member in members])
        averages.append(
            Average(*place, count, sum(scores) / count, first_100=first, interval=interval)
        )
    return averages


def effective_length(averages: Sequence[Average], subject: str) -> schema.EffectiveLength:
    """Largest length up to which every RULER average lies above its threshold, by its interval.

    A length that was not measured ends the count. Nothing is said of fewer than all 13 tasks.
    """
    own = sorted((row for row in averages if row.subject == subject), key=lambda row: row.length)
    if any(row.num_tasks < len(RULER_TASKS) for row in own):
        reason = f"{own[0].num_tasks} of RULER's {len(RULER_TASKS)} tasks do not tell"
        return schema.EffectiveLength(subject, reason=reason)
    surely, perhaps = (_reached(own, end) for end in (0, 1))
    return schema.EffectiveLength(subject, surely, perhaps)


def _reached(averages: Sequence[Average], end: int) -> int | None:
    """The last length before one end of the interval falls to the threshold."""
    longest = None
    for row in averages:
        if row.interval is None or 100 * row.interval[end] <= EFFECTIVE_THRESHOLD:
            break
        longest = row.length
    return longest


def calibration_rows(
    config: CalibrationConfig,
    scored: Sequence[Cell | Average],
    reference: str,
    limited: Collection[str] = (),
) -> list[schema.CalibrationRow]:
    """What came of each rule on the scores of the base model, ``reference``.

    Scores of the suites ``limited`` are of a part of their samples: what is known of all of them
    says nothing of those, so their rules are not tried.
    """
    scores: dict[str, float | None] = {}
    for row in scored:
        if row.subject == reference:
            name = f"{row.suite}/{row.task}"
            scores[f"{name}/{row.length}" if row.length else name] = row.score
    rows = []
    for rule in config.rules:
        found = scores.get(rule.score)
        found = None if found is None else 100 * found
        if rule.score.partition("/")[0] in limited:
            state = "not tried"
        elif found is not None:
            state = "passed" if rule.low <= found <= rule.high else "broken"
        else:
            state = "not measured" if rule.score in scores else "not in this suite"
        rows.append(schema.CalibrationRow(**vars(rule), found=found, state=state))
    return rows


def passed(config: CalibrationConfig, rows: Sequence[schema.CalibrationRow]) -> bool:
    """Whether extended models may be reported."""
    harmless = ("passed", "not in this suite", "not tried")
    return not config.required or all(row.state in harmless for row in rows)


def paired_rows(cells: Sequence[Cell], reference: str | None = None) -> list[schema.PairedRow]:
    """Paired tests in every cell: of each subject and ``reference``, or of all where it is missing.

    Beyond its window the base model may not have been asked, and the extended ones are then
    compared with each other. Cells are paired only where both hold the same samples in the same
    order.
    """
    by_place: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.score is not None:
            by_place[cell.suite, cell.task, cell.length].append(cell)
    rows = []
    for place, members in by_place.items():
        all_pairs = reference not in [member.subject for member in members]
        for index, second in enumerate(members):
            for first in members[index + 1 :]:
                names = first.subject, second.subject
                if (all_pairs or reference in names) and first.samples == second.samples:
                    numbers = asdict(statistics.paired_test(first.scores, second.scores))
                    rows.append(schema.PairedRow(*place, *names, **numbers))
    return rows


def summarize_suite(
    config: EvaluateRoot,
    subjects: Sequence[Subject],
    cells: Sequence[Cell],
    text: HeldoutText | None = None,
    protocols: Sequence[schema.Protocol] = (),
) -> schema.SuiteSummary:
    """Content of ``suite.json``.

    When the base model breaks a calibration rule, the scores of all other subjects are withheld:
    their cells say so.
    """
    reference = config.evaluation.reference
    averages = average_cells(cells)
    scored = [*cells, *averages]
    rules = calibration_rows(config.calibration, scored, reference, config.suite.limited)
    may_report = passed(config.calibration, rules)
    if not may_report:
        cells = [cell if cell.subject == reference else _withheld(cell) for cell in cells]
        averages = average_cells(cells)
    return schema.SuiteSummary(
        model=config.model.name,
        original_len=config.model.original_len,
        target_len=config.target_len,
        reference=reference,
        subjects=tuple(
            schema.SuiteSubject(s.name, s.trained, s.factors.method, s.source) for s in subjects
        ),
        calibration=schema.Calibration(may_report, tuple(rules)),
        cells=tuple(cells),
        averages=tuple(averages),
        retention=tuple(_kept_rows(cells, reference, config.model.original_len)),
        paired=tuple(paired_rows(cells, reference)),
        effective_lengths=tuple(
            effective_length(averages, subject.name)
            for subject in subjects
            if any(row.subject == subject.name for row in averages)
        ),
        protocols=tuple(protocols),
        text=text,
    )


def suite_metrics(summary: schema.SuiteSummary) -> dict[str, float]:
    """Finished scores under their tracking names, in percent."""
    return {
        f"eval/{row.suite}/{row.task}/{row.subject}/{row.length}": 100 * row.score
        for row in (*summary.cells, *summary.averages)
        if row.score is not None
    }


def _withheld(cell: Cell) -> Cell:
    reason = "withheld: the base model breaks its calibration"
    place = cell.subject, cell.suite, cell.task, cell.length, cell.num_samples
    return Cell(*place, score=None, num_missing=0, reason=reason)


def _kept_rows(cells: Sequence[Cell], reference: str, original_len: int) -> list[schema.KeptRow]:
    """By subject and suite, on the tasks inside the original window that both models finished."""
    inside: dict[str, dict[tuple[str, str, int], float]] = defaultdict(dict)
    for cell in cells:
        is_inside = cell.suite == LM_EVAL_SUITE or 0 < cell.length <= original_len
        if cell.score is not None and is_inside:
            inside[cell.subject][cell.suite, cell.task, cell.length] = cell.score
    rows, base = [], inside.get(reference, {})
    for subject, scores in inside.items():
        for suite in sorted({place[0] for place in scores}):
            common = [place for place in scores if place[0] == suite and place in base]
            total = sum(base[place] for place in common)
            if common and total > 0:
                ratio = sum(scores[place] for place in common) / total
                rows.append(schema.KeptRow(subject, suite, len(common), ratio))
    return rows
