"""Factors as CSV: the authors' forms, an exact round trip, and every error text."""

import json
import math
from pathlib import Path

import numpy
import pytest

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

GEOMETRY = RopeGeometry(8, 1e4, 32)
FIXTURE = Path(__file__).parent.parent / "fixtures" / "llama3_8b_128k_longrope2.json"
WANTED = (0.9978, 3.23, 3.23, 121.0)  # ties and a first factor below 1, as in published arrays


def read(text: str) -> RescaleFactors:
    return RescaleFactors.from_csv(text, GEOMETRY, 128, {})


@pytest.mark.parametrize(
    "text",
    [
        "0.9978\n3.23\n3.23\n121\n",
        "0.9978\n3.23\n3.23\n121",
        "lambda\n0.9978\n3.23\n3.23\n121\n",
        "# rescale factors, one per line\n\n0.9978\n\n3.23\n3.23\r\n 1.21e2 \n\n",
        "\ufeff0.9978\n3.23\n3.23\n121\n",
        "0.9978,3.23,3.23,121\n",
        "0.9978, 3.23, 3.23, 121\n",
        "0,1,2,3\n".replace("0,1,2,3", "dim0,dim1,dim2,dim3") + "0.9978,3.23,3.23,121\n",
        "0.9978 3.23 3.23 121\n" * 32,  # first generation: one row per layer
        "0.9978,3.23,3.23,121\n" * 2,
    ],
)
def test_reads_every_form(text: str) -> None:
    read_factors = read(text)
    assert read_factors == RescaleFactors(
        factors=WANTED, geometry=GEOMETRY, target_len=128, method="from_file"
    )


def test_keeps_where_the_file_comes_from() -> None:
    factors = RescaleFactors.from_csv("1\n2\n4\n5\n", GEOMETRY, 128, {"source": "x.csv"})
    assert factors.provenance == {"source": "x.csv"}


def test_round_trip_is_exact_and_numpy_reads_it(tmp_path: Path) -> None:
    ntk = closed_form_factors(RopeMethod.ntk, RopeGeometry(128, 5e5, 8192), 131072)
    read_factors = RescaleFactors.from_csv(ntk.to_csv(), ntk.geometry, ntk.target_len, {})
    assert read_factors.factors == ntk.factors
    (tmp_path / "factors.csv").write_text(ntk.to_csv())
    # How the authors read it.
    assert tuple(numpy.loadtxt(tmp_path / "factors.csv", delimiter=",")) == ntk.factors


def test_published_array_as_the_authors_ship_it() -> None:
    published = json.loads(FIXTURE.read_text())
    text = "\n".join(f"{value:.10g}" for value in published["factors"])
    read_factors = RescaleFactors.from_csv(text, RopeGeometry(128, 5e5, 8192), 131072, {})
    assert read_factors.factors == tuple(published["factors"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\nthree\n4\n", "line 3 of the factors CSV: 'three' is not a list of numbers"),
        ("a\nb\n1\n2\n", "line 2 of the factors CSV: 'b' is not a list of numbers"),
        ("factor 1\n1\n2\n", "line 1 of the factors CSV: 'factor 1' is not a list of numbers"),
        ("1,2,\n", "line 1 of the factors CSV: '1,2,' is not a list of numbers"),
        ("1;2;3;4\n", "the factors CSV holds no numbers"),
        ("", "the factors CSV holds no numbers; give one factor per line, or one row of factors"),
        ("lambda\n\n", "the factors CSV holds no numbers"),
        ("1,2,4,5\n\n1,2,4,6\n", "line 3 of the factors CSV differs from line 1: rows are layers"),
        ("1\n2\n4,5\n", "line 3 of the factors CSV has 2 values, the lines before it one"),
        ("1\n2\n4\n", "factors has 3 values; rotary_dim=8 needs 4"),
        ("1\n-2\n4\n5\n", r"factors\[1\]=-2.0: a rescale factor must be a finite number above 0"),
        ("1\nnan\n4\n5\n", r"factors\[1\]=nan"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(FactorsError, match=message):
        read(text)


def test_infinite_factors_are_refused() -> None:
    with pytest.raises(FactorsError, match=r"factors\[3\]=inf"):
        read(f"1\n2\n4\n{math.inf}\n")
