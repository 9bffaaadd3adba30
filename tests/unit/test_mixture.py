"""Mixtures: the paper's numbers, exact margins where supply allows, else the largest table."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.config import BUCKETS, BucketTokens, DomainMix, MixtureConfig, PackConfig
from data_prep.demand import Margins, fit_margins, fit_mixture, fit_table, length_buckets, share_out
from longrope2.config import compose

CONF = Path(__file__).parent.parent.parent / "conf" / "mixture"
ORIGINAL_LEN = 8192
INF = float("inf")


def preset(name):
    """A mixture of conf/mixture, with those it builds on."""
    composed = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    values = composed["mixture"]
    for base in composed.get("defaults", []):
        if base != "_self_":
            values = yaml.safe_load((CONF / f"{base}.yaml").read_text())["mixture"] | values
    buckets = values.pop("buckets", {})
    return MixtureConfig(**values, buckets=BucketTokens(**buckets))


def unlimited(mixture):
    return {source: {"all": dict.fromkeys(BUCKETS, INF)} for source in mixture.sources}


def rows(fitted):
    return {source: [cells[bucket] for bucket in BUCKETS] for source, cells in fitted.cells.items()}


@pytest.mark.parametrize("name", ["paper", "paper_text", "nnscaler", "fu"])
def test_presets_have_no_fault(name):
    mixture = preset(name)
    assert mixture.faults(list(mixture.sources), ORIGINAL_LEN) == []


def test_paper_is_the_independent_fit():
    fitted = fit_margins(
        Margins(preset("paper").sources, vars(preset("paper").buckets), preset("paper").only),
        {source: dict.fromkeys(BUCKETS, INF) for source in preset("paper").sources},
    )
    # Outside FineWeb-Edu's 1B of short documents, 9B with margins 2/3/4: the product of the
    # margins.
    expected = {
        s: [t * b / 9 for b in (2, 3, 4)]
        for s, t in {"redpajama_v1": 4.5e9, "redpajama_v2": 2.5e9, "starcoder": 2e9}.items()
    }
    assert rows(fitted) == {s: pytest.approx(r, rel=1e-12) for s, r in expected.items()} | {
        "fineweb_edu": pytest.approx([1e9, 0, 0], rel=1e-12)
    }
    assert [round(t / 1e9, 3) for t in rows(fitted)["redpajama_v2"]] == [0.556, 0.833, 1.111]
    assert [round(t / 1e9, 3) for t in rows(fitted)["starcoder"]] == [0.444, 0.667, 0.889]
    assert fitted.shortfalls == ()


def test_paper_text_and_nnscaler():
    text = preset("paper_text")
    assert text.buckets.short == 1e9 and text.buckets.mid + text.buckets.long == 9e9
    fitted = rows(
        fit_margins(
            Margins(text.sources, vars(text.buckets), text.only),
            {source: dict.fromkeys(BUCKETS, INF) for source in text.sources},
        )
    )
    assert fitted["fineweb_edu"] == pytest.approx([1e9, 0, 0])
    assert all(fitted[source][0] == 0 for source in ("redpajama_v1", "redpajama_v2", "starcoder"))
    example = preset("nnscaler")
    assert (
        example.buckets.short == 32_000 * 131_072
        and example.buckets.mid + example.buckets.long == 40_000 * 131_072
    )
    assert round(example.buckets.short / sum(example.sources.values()), 2) == 0.44


def test_margins_are_met_when_the_supply_allows():
    generator = np.random.default_rng(0)
    for _ in range(40):
        there = generator.gamma(
            0.6, 1e9, (generator.integers(2, 8), 3)
        )  # a table with these margins exists
        caps = there * generator.choice([1.0, 1.5, 10.0, INF], there.shape)
        table = fit_table(there.sum(1), there.sum(0), caps)
        total = there.sum()
        assert np.abs(table.sum(1) - there.sum(1)).max() < 1e-9 * total
        assert np.abs(table.sum(0) - there.sum(0)).max() < 1e-9 * total
        assert (table <= caps + 1e-9 * total).all() and (table >= 0).all()


def test_short_cell_is_capped_and_the_rest_redistributed():
    supply = {source: dict.fromkeys(BUCKETS, INF) for source in ("a", "b", "c")}
    supply["c"]["long"] = 0.2
    fitted = fit_margins(
        Margins({"a": 4.5, "b": 2.5, "c": 2.0}, {"short": 2.0, "mid": 3.0, "long": 4.0}), supply
    )
    table = rows(fitted)
    assert table["c"][2] == pytest.approx(0.2, abs=1e-12)
    assert [sum(row) for row in table.values()] == pytest.approx([4.5, 2.5, 2.0], abs=1e-9)
    assert [sum(column) for column in zip(*table.values(), strict=True)] == pytest.approx(
        [2.0, 3.0, 4.0], abs=1e-9
    )
    # Uncapped cells stay a_i * b_j: with the margins this has one solution only.
    assert table["a"][0] * table["b"][2] == pytest.approx(table["a"][2] * table["b"][0], rel=1e-9)
    assert table["a"][0] * table["c"][1] == pytest.approx(table["a"][1] * table["c"][0], rel=1e-9)
    assert [(s.kind, s.name) for s in fitted.shortfalls] == [("cell", "c/long")]
    assert fitted.shortfalls[0].wanted_tokens == pytest.approx(2.0 * 4.0 / 9.0)
    assert str(
        fit_margins(Margins({"a": 5e6}, {"long": 5e6}), {"a": {"long": 2e6}}).shortfalls[0]
    ) == ("source a: 2,000,000 of 5,000,000 tokens")


def largest_table(row_sums, column_sums, caps):
    """Sum of the largest table by the smallest cut, tried over all subsets."""
    num_rows, num_columns = caps.shape
    return min(
        sum(row_sums[i] for i in range(num_rows) if not kept[i])
        + sum(column_sums[j] for j in range(num_columns) if cut[j])
        + sum(
            caps[i, j]
            for i in range(num_rows)
            for j in range(num_columns)
            if kept[i] and not cut[j]
        )
        for kept in itertools.product((False, True), repeat=num_rows)
        for cut in itertools.product((False, True), repeat=num_columns)
    )


def test_scarce_supply_gives_the_largest_table_within_all_limits():
    generator = np.random.default_rng(1)
    num_scarce = 0
    for _ in range(60):
        shape = (generator.integers(1, 6), generator.integers(1, 4))
        row_sums, column_sums = (
            generator.gamma(1.0, 1.0, shape[0]),
            generator.gamma(1.0, 1.0, shape[1]),
        )
        caps = generator.gamma(0.5, 0.7, shape) * (generator.random(shape) < 0.8)
        table = fit_table(row_sums, column_sums, caps)
        largest = largest_table(row_sums, column_sums, caps)
        assert table.sum() == pytest.approx(largest, abs=1e-9)
        assert (table <= caps + 1e-9).all() and (table >= 0).all()
        assert (table.sum(1) <= row_sums + 1e-9).all() and (
            table.sum(0) <= column_sums + 1e-9
        ).all()
        num_scarce += largest < min(row_sums.sum(), column_sums.sum()) - 1e-6
    assert num_scarce > 20


def test_a_scarce_bucket_gets_all_there_is_and_more_supply_never_gives_less():
    margins = Margins({"a": 6.0, "b": 3.0}, {"short": 3.0, "long": 6.0})
    for long, reached in ((0.3, 0.6), (0.9, 1.8), (2.5, 5.0), (3.5, 6.0), (INF, 6.0)):
        fitted = fit_margins(margins, {name: {"short": INF, "long": long} for name in ("a", "b")})
        assert sum(cells["long"] for cells in fitted.cells.values()) == pytest.approx(reached)
        assert sum(cells["short"] for cells in fitted.cells.values()) == pytest.approx(3.0)
        missing = {
            s.name: s.wanted_tokens - s.fitted_tokens
            for s in fitted.shortfalls
            if s.kind == "bucket"
        }
        assert missing == ({} if reached == 6.0 else {"long": pytest.approx(6.0 - reached)})


def test_sharing_out():
    assert share_out(6.0, np.array([1.0, 1.0, 2.0]), np.array([1.0, 9.0, 9.0])) == pytest.approx(
        [1, 5 / 3, 10 / 3]
    )
    assert share_out(6.0, np.ones(2), np.array([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert share_out(0.0, np.ones(2), np.ones(2)).tolist() == [0.0, 0.0]
    assert fit_table(np.zeros(2), np.zeros(3), np.ones((2, 3))).tolist() == [[0.0] * 3] * 2


def test_mix_of_domains_is_kept_while_lengths_change():
    mixture = MixtureConfig(sources={"web": 100}, buckets=BucketTokens(short=20, mid=30, long=50))
    supply = {
        "web": {
            "x": {"short": 6e5, "mid": 1e5, "long": 5e4},
            "y": {"short": 1e5, "mid": 1e5, "long": 5e4},
        }
    }
    fitted = fit_mixture(mixture, supply)
    assert fitted.shortfalls == ()
    assert rows(fitted)["web"] == pytest.approx([20, 30, 50])
    assert sum(fitted.domains["web", "x"].values()) == pytest.approx(
        75
    )  # 750,000 of the 1,000,000 tokens there are
    assert sum(fitted.domains["web", "y"].values()) == pytest.approx(25)
    for bucket, tokens in zip(BUCKETS, (20, 30, 50), strict=True):
        assert sum(fitted.domains["web", domain][bucket] for domain in "xy") == pytest.approx(
            tokens
        )


def test_tokens_come_before_the_mix_of_domains():
    mixture = MixtureConfig(sources={"web": 100}, buckets=BucketTokens(short=20, mid=0, long=80))
    supply = {
        "web": {"x": {"short": 900.0}, "y": {"short": 50.0, "long": 50.0}, "z": {"long": 100.0}}
    }
    fitted = fit_mixture(mixture, supply)
    assert rows(fitted)["web"] == pytest.approx([20, 0, 80])
    assert sum(fitted.domains["web", d]["long"] for d in "yz") == pytest.approx(80)
    assert fitted.domains["web", "x"] == pytest.approx({"short": 20, "mid": 0, "long": 0})
    assert [(s.kind, s.name) for s in fitted.shortfalls] == [("domain", "web/x")]


def test_domains_can_be_ignored_and_mixtures_scaled():
    mixture = MixtureConfig(
        sources={"web": 100},
        buckets=BucketTokens(short=20, mid=30, long=50),
        total_tokens=1000,
        domain_mix=DomainMix.ignore,
    )
    fitted = fit_mixture(mixture, unlimited(mixture))
    assert rows(fitted)["web"] == pytest.approx([200, 300, 500]) and fitted.domains == {}


def test_rule_of_fu_et_al():
    shares = {"web": {"x": 3.0, "y": 1.0}}
    mixture = MixtureConfig(sources={"web": 400}, short_survival=0.1, domain_shares=shares)
    supply = {
        "web": {
            "x": {"short": 5000.0, "mid": 400.0, "long": 100.0},
            "y": {"short": 200.0, "mid": 30.0},
        }
    }
    fitted = fit_mixture(mixture, supply)
    # x has a budget of 300 for 500 + 400 + 100 surviving tokens; y keeps all of its 20 + 30, short
    # of its 100.
    assert fitted.domains["web", "x"] == pytest.approx({"short": 150, "mid": 120, "long": 30})
    assert fitted.domains["web", "y"] == pytest.approx({"short": 20, "mid": 30, "long": 0})
    assert rows(fitted)["web"] == pytest.approx([170, 150, 30])
    assert [
        (s.kind, s.name, s.wanted_tokens, round(s.fitted_tokens)) for s in fitted.shortfalls
    ] == [("source", "web", 400.0, 350), ("domain", "web/y", 100.0, 50)]
    fu = preset("fu")
    assert sum(fu.sources.values()) == 5_000_000_000 and fu.sources["pg19"] / 5e9 == pytest.approx(
        0.0415
    )


def test_buckets_by_length():
    more = ["corpus=paper", "target_len=131072", "model=llama3_8b"]
    lengths_of_paper = length_buckets(compose(PackConfig, "pack", more))
    lengths = {
        8192: "short",
        8193: "mid",
        100_000: "mid",
        100_001: "long",
        200_000: "long",
        200_001: None,
    }
    names = [*lengths_of_paper.names, None]
    codes = lengths_of_paper.codes(np.array([*lengths]))
    assert dict(zip(lengths, (names[code] for code in codes), strict=True)) == lengths


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": {"d": 5}}, "mixture.sources.d: the corpus has no such source; it has a, b"),
        (
            {"sources": {"a": 5}, "buckets": BucketTokens(short=4)},
            "mixture.sources sum to 5 tokens and mixture.buckets to 4; make them equal",
        ),
        ({"sources": {"a": -5, "b": 5}}, "mixture.sources.a=-5 must be tokens, 0 or more"),
        ({"buckets": BucketTokens(mid=-1)}, "mixture.buckets.mid=-1 must be tokens, 0 or more"),
        (
            {"sources": {"a": 0}},
            "mixture.sources asks for no tokens at all; give +mixture.sources.SOURCE=TOKENS",
        ),
        (
            {"mid_limit": 300_000},
            "mixture.mid_limit=300000 must be between 0 and mixture.long_limit=200000",
        ),
        ({"short_survival": 1.5}, "mixture.short_survival=1.5 is outside [0, 1]"),
        ({"total_tokens": 0}, "mixture.total_tokens=0 must be at least 1, or null"),
        ({"only": {"b": ["short"]}}, "mixture.only.b: mixture.sources has no such source"),
        (
            {"only": {"a": ["huge"]}},
            "mixture.only.a=['huge']: name at least one of short, mid, long",
        ),
        (
            {"domain_shares": {"a": {"x": 0.0}}},
            "mixture.domain_shares.a must be shares of 0 or more, not all 0",
        ),
    ],
)
def test_faults_of_a_mixture(changes, words):
    mixture = MixtureConfig(**({"sources": {"a": 5}} | changes))
    assert words in mixture.faults(["a", "b"], ORIGINAL_LEN)
