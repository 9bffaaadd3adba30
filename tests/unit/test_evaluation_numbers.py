"""Statistics, text windows, the results file and the summary, against independent computations."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from longrope2.errors import ArtifactError, DataError
from longrope2.evaluation.results import Measurement, ResultsLog
from longrope2.evaluation.scoring import context_windows, joined, short_windows
from longrope2.evaluation.subjects import Subject
from longrope2.evaluation.summary import metric_values, summarize
from longrope2.rope.factors import Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.statistics import grouped_interval, ratio_interval, wilson_interval


@pytest.mark.parametrize(
    ("num_correct", "num_samples"), [(0, 10), (1, 10), (7, 40), (39, 40), (40, 40), (250, 500)]
)
def test_wilson_interval_inverts_the_score_test(num_correct, num_samples):
    """The interval holds exactly the probabilities that a two-sided 5 % score test keeps."""
    share = num_correct / num_samples
    accepted = [
        p / 100_000
        for p in range(100_001)
        if abs(share - p / 100_000)
        <= 1.959964 * math.sqrt(p / 100_000 * (1 - p / 100_000) / num_samples) + 1e-12
    ]
    assert wilson_interval(num_correct, num_samples) == pytest.approx(
        (accepted[0], accepted[-1]), abs=2e-5
    )


def test_scores_of_a_group_each_have_wilsons_interval():
    assert grouped_interval([1, 0, 1, 1], [3, 5, 4, 9]) == wilson_interval(3, 4)


def test_groups_that_score_alike_count_once_each():
    """Resampling them would find no spread; one haystack of eight needles is one sample."""
    groups = [number // 8 for number in range(40)]
    assert grouped_interval([0] * 40, groups) == wilson_interval(0, 5)
    assert grouped_interval([1] * 40, groups) == wilson_interval(5, 5)
    low, high = grouped_interval([1, 0, 1, 1], [0, 0, 0, 0])
    assert (low, high) == wilson_interval(0.75, 1) and high - low > 0.7


def test_groups_are_resampled_whole():
    """All 27 equally likely resamples of three groups, by hand."""
    scores, groups = [1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 2, 2]
    sums, counts = [3, 0, 1], [3, 3, 2]
    every = sorted(
        sum(sums[g] for g in drawn) / sum(counts[g] for g in drawn)
        for drawn in itertools.product(range(3), repeat=3)
    )
    assert grouped_interval(scores, groups) == (every[0], every[-1]) == (0.0, 1.0)
    assert ratio_interval(sums, counts) == (0.0, 1.0)


def test_the_interval_of_a_ratio_has_the_linearized_width():
    sums, counts = np.array([10, 12, 9, 11, 30, 8] * 5), np.array([10, 10, 10, 10, 20, 10] * 5)
    ratio, num = sums.sum() / counts.sum(), len(sums)
    variance = num / (num - 1) * ((sums - ratio * counts) ** 2).sum() / counts.sum() ** 2
    low, high = ratio_interval(sums.tolist(), counts.tolist())
    assert low < ratio < high and high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_wilson_interval_reaches_but_never_leaves_the_unit_interval():
    assert wilson_interval(0, 8)[0] == 0.0
    assert wilson_interval(8, 8)[1] == 1.0


BOS, EOS = 1, 2


def documents_of(*num_tokens):
    """Documents with BOS and EOS whose inner tokens all differ: a token tells where it is from."""
    documents, first = [], 10
    for count in num_tokens:
        documents.append(np.array([BOS, *range(first, first + count - 2), EOS], dtype=np.uint16))
        first += count
    return documents


def test_windows_of_all_lengths_score_the_same_distinct_tokens():
    documents = documents_of(90, 300, 64, 40)
    windows = context_windows(documents, [16, 64], num_windows=12, num_scored=8, seed=0)
    assert {length: [len(w) for w in found] for length, found in windows.items()} == {
        16: [15] * 12,
        64: [63] * 12,
    }
    scored = [tuple(w[-8:]) for w in windows[64]]
    assert scored == [tuple(w[-8:]) for w in windows[16]]
    assert len({token for place in scored for token in place}) == 12 * 8
    text = {tuple(d[i : i + 62]) for d in documents for i in range(1, len(d) - 61)}
    for short, long in zip(windows[16], windows[64], strict=True):
        assert short[0] == long[0] == BOS
        assert tuple(short[1:]) == tuple(long[-14:])
        assert tuple(long[1:]) in text


def test_windows_are_spread_over_all_documents_that_are_long_enough():
    documents = documents_of(63, 63, 63, 62, 400)
    windows = context_windows(documents, [64], num_windows=4, num_scored=8, seed=3)[64]
    owners = sorted(next(i for i, d in enumerate(documents) if w[20] in d) for w in windows)
    assert owners == [0, 1, 2, 4]


def test_too_little_long_text_is_an_error_that_says_how_much_there_is():
    expected = r"num_windows=5: .* at least 63 tokens have room for 3 .* longest has 79 tokens"
    with pytest.raises(DataError, match=expected):
        context_windows(documents_of(79, 62), [16, 64], num_windows=5, num_scored=8, seed=0)


def test_short_windows_cut_documents_without_losing_a_token():
    documents = documents_of(40, 16, 17, 5)
    pieces = short_windows(documents, 16, num_windows=8, seed=0)
    assert all(len(piece) <= 15 and piece[0] == BOS for piece in pieces)
    found = sorted(token for piece in pieces for token in piece[1:])
    assert found == sorted(token for document in documents for token in document[1:])
    with pytest.raises(
        DataError,
        match=r"evaluation\.retention\.num_windows=9: the held-out text has 8 windows of 16",
    ):
        short_windows(documents, 16, num_windows=9, seed=0)


def test_short_windows_depend_on_the_seed_only():
    documents = documents_of(*[20] * 30)
    first, again, other = (
        short_windows(documents, 16, num_windows=10, seed=seed) for seed in (1, 1, 2)
    )
    assert [p.tolist() for p in first] == [p.tolist() for p in again] != [p.tolist() for p in other]


def measurement(subject="base", fingerprint="a1", suite="needle", length=128, **values):
    return Measurement(subject, suite, length, fingerprint, values)


def test_a_measurement_is_found_again_after_a_torn_write(tmp_path):
    path = tmp_path / "results.jsonl"
    log = ResultsLog(path)
    log.append(measurement(exact=[1, 0]))
    log.append(measurement(fingerprint="b2", exact=[0]))
    whole = path.read_bytes()
    for cut in (1, 10, 60):
        torn = tmp_path / f"torn_{cut}.jsonl"
        torn.write_bytes(whole[:-cut])
        found = ResultsLog(torn)
        assert found.find("a1") == {"exact": [1, 0]}
        assert found.find("b2") is None
        found.append(measurement(fingerprint="b2", exact=[0]))
        assert torn.read_bytes() == whole


def test_a_line_is_written_once_and_per_subject(tmp_path):
    path = tmp_path / "results.jsonl"
    log = ResultsLog(path)
    for subject in ("base", "base", "pi"):
        log.append(measurement(subject=subject))
    log = ResultsLog(path)
    log.append(measurement(subject="pi"))
    assert [json.loads(line)["subject"] for line in path.read_text().splitlines()] == ["base", "pi"]


def test_a_damaged_results_file_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsLog(path).append(measurement())
    whole = path.read_text()
    for number, (damage, fault) in enumerate(
        (
            ('{"subject": "base"}\n', ", line 2 is not a measurement"),
            (f"not json\n{whole}", " is damaged at line 2"),
        )
    ):
        path = tmp_path / f"damaged_{number}.jsonl"
        path.write_text(whole + damage)
        with pytest.raises(ArtifactError, match=rf"damaged_\d\.jsonl{fault}"):
            ResultsLog(path)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(16, 10_000.0, 16), 64)
    folder = tmp_path_factory.mktemp("model")
    return [
        Subject(name, folder, factors, "w", trained=False, source={}) for name in ("base", "pi")
    ]


def random_measurements(seed):
    """Needles at two lengths and depths, text, retention; with unequal numbers of tokens."""
    rng = random.Random(seed)
    found = []
    for subject in ("base", "pi"):
        for length in (16, 64):
            found.append(
                measurement(
                    subject,
                    f"{subject}{length}",
                    "needle",
                    length,
                    depths=[0.0, 0.5] * 4,
                    exact=[rng.randrange(2) for _ in range(8)],
                    nll=[rng.uniform(0, 9) for _ in range(8)],
                    num_tokens=[rng.randrange(3, 9) for _ in range(8)],
                )
            )
            found.append(
                measurement(subject, "p", "perplexity", length, nll=[3.0, 5.0], num_tokens=[4, 4])
            )
        nll = [rng.uniform(20, 40) for _ in range(3)]
        found.append(measurement(subject, "r", "retention", 16, nll=nll, num_tokens=[15, 15, 7]))
    return found


def test_summary_equals_sums_over_samples(subjects):
    measurements = random_measurements(0)
    summary = summarize(subjects, measurements, "base")
    assert (summary.original_len, summary.target_len) == (16, 64)
    assert [row.name for row in summary.subjects] == ["base", "pi"]
    rows = {(row.subject, row.length): row for row in summary.needle}
    for m in (m for m in measurements if m.suite == "needle"):
        row, v = rows[m.subject, m.length], m.values
        assert row.window == (Window.SHORT if m.length == 16 else Window.LONG)
        assert row.num_correct == sum(v["exact"]) and row.accuracy == sum(v["exact"]) / 8
        mean = np.sum(v["nll"]) / np.sum(v["num_tokens"])
        assert row.perplexity == pytest.approx(math.exp(mean))
        for offset, depth_row in enumerate(row.depths):
            part = slice(offset, None, 2)
            assert (depth_row.depth, depth_row.num_samples) == (offset / 2, 4)
            assert depth_row.num_correct == sum(v["exact"][part])
            mean = np.sum(v["nll"][part]) / np.sum(v["num_tokens"][part])
            assert depth_row.perplexity == pytest.approx(math.exp(mean))
    assert [row.perplexity for row in summary.perplexity] == [pytest.approx(math.e)] * 4
    retention = {
        m.subject: math.exp(sum(m.values["nll"]) / 37)
        for m in measurements
        if m.suite == "retention"
    }
    for row in summary.retention:
        assert row.perplexity == pytest.approx(retention[row.subject])
        assert row.ratio == pytest.approx(retention[row.subject] / retention["base"])


def test_needles_of_a_haystack_are_resampled_together(subjects):
    """Two haystacks of two needles at two depths; at one depth a haystack has one needle."""
    measurements = [m for m in random_measurements(0) if m.suite != "needle"]
    values = {"depths": [0.0, 0.5] * 2, "exact": [1, 1, 0, 0], "nll": [1.0] * 4}
    shared = {**values, "num_tokens": [2] * 4, "needles_per_haystack": [2] * 4}
    found = [measurement(s, s, "needle", 64, **shared) for s in ("base", "pi")]
    row = summarize(subjects, [*found, *measurements], "base").needle[0]
    assert row.accuracy_interval == (0.0, 1.0) and wilson_interval(2, 4)[0] > 0.1
    assert [d.accuracy_interval for d in row.depths] == [wilson_interval(1, 2)] * 2


def test_parts_of_a_measurement_are_joined():
    parts = [
        measurement(suite="needle", exact=[1, 0], nll=[1.0, 2.0]),
        measurement(suite="needle", fingerprint="b", exact=[0, 1], nll=[3.0, 4.0]),
        measurement(suite="perplexity", nll=[5.0]),
        measurement(subject="pi", suite="perplexity", nll=[6.0]),
    ]
    whole = list(joined(parts))
    assert [(m.subject, m.suite, m.values) for m in whole] == [
        ("base", "needle", {"exact": [1, 0, 0, 1], "nll": [1.0, 2.0, 3.0, 4.0]}),
        ("base", "perplexity", {"nll": [5.0]}),
        ("pi", "perplexity", {"nll": [6.0]}),
    ]


def test_metrics_have_the_designed_names():
    found = {name for m in random_measurements(1) for name in metric_values(m)}
    assert found == {
        *(
            f"eval/{suite}/{subject}/{length}"
            for suite in ("needle_accuracy", "needle_perplexity", "perplexity")
            for subject in ("base", "pi")
            for length in (16, 64)
        ),
        "eval/retention/base/16",
        "eval/retention/pi/16",
    }
