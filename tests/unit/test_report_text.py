"""Sentences about shared text are counted from manifests, not assumed."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longrope2.corpora.corpus import Document, text_hash, text_hashes
from longrope2.errors import DamagedError
from longrope2.files.artifacts import (
    Manifest,
    product_folder,
    read_manifest,
    sha256_of_file,
    write_manifest,
)
from longrope2.report.data import load_run
from longrope2.report.text import text_statements

TEXTS = [Document(f"d{n}", f"text {n}", "s", "d") for n in range(6)]
OWN = {"corpus": "mine (/d)", "own": "mine (/d)", "is_other": False}
APART = "Keys, values and places are drawn separately (seeds 11 and 7001)."


def write(run: Path, product: str, **manifest: Any) -> None:
    write_manifest(product_folder(run, product), Manifest(product, **manifest))


def evaluated(run: Path, texts: list[Document], text: dict[str, Any] = OWN) -> None:
    details = {"text": text, "text_hashes": text_hashes(texts)}
    seeds = {"needle": 7001}
    write(run, "evaluations", inputs={"corpus": {}}, seeds=seeds, details=details)


def searched(run: Path, texts: list[Document], objective: str = "needle") -> None:
    details = {"text": OWN, "text_hashes": text_hashes(texts)}
    config = {"search": {"objective": objective}}
    write(run, "factors", seeds={"seed": 11}, config=config, details=details)


def packed(run: Path, texts: list[Document]) -> None:
    hashes = pa.array([text_hash(document.text) for document in texts], pa.binary(16))
    path = product_folder(run, "segments") / "documents.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text_hash": hashes}), path)
    listed = {"file": path.name, "sha256": sha256_of_file(path)}
    write(run, "segments", details={"documents": listed})


def statements(run: Path) -> list[str]:
    return text_statements(load_run(run))


@pytest.mark.parametrize(
    ("search", "objective", "expected"),
    [
        (
            TEXTS[2:4],
            "needle",
            "The factors were searched on needles hidden in documents of corpus mine (/d); 1 of "
            f"the 3 that evaluation reads are among them. {APART}",
        ),
        (
            TEXTS[3:],
            "needle",
            "The factors were searched on needles hidden in documents of corpus mine (/d), none of "
            f"which evaluation reads. {APART}",
        ),
        (
            [],
            "needle",
            f"The factors were searched on needles in noise, which is no document. {APART}",
        ),
        (
            TEXTS,
            "perplexity",
            "The factors were searched on the perplexity of documents of corpus mine (/d); 3 of "
            "the 3 that evaluation reads are among them.",
        ),
    ],
)
def test_what_search_and_evaluation_share(
    tmp_path: Path, search: list[Document], objective: str, expected: str
) -> None:
    evaluated(tmp_path, TEXTS[:3])
    searched(tmp_path, search, objective)
    assert statements(tmp_path)[1:] == [expected]


def test_what_training_and_evaluation_share(tmp_path: Path) -> None:
    evaluated(tmp_path, TEXTS[:3])
    own = "Text: held out of corpus mine (/d), the run's own."
    assert statements(tmp_path) == [own]
    packed(tmp_path, TEXTS[3:])
    none = "None of the 3 documents that evaluation reads is in the training segments."
    assert statements(tmp_path) == [own, none]
    packed(tmp_path, TEXTS[1:])
    assert statements(tmp_path)[1] == (
        "2 of the 3 documents that evaluation reads are in the training segments: a trained model "
        "has seen them."
    )
    manifest = read_manifest(product_folder(tmp_path, "evaluations"), "evaluations")
    manifest.details["packed_ids"] = ["d1", "d2"]
    write_manifest(product_folder(tmp_path, "evaluations"), manifest)
    assert statements(tmp_path)[1] == (
        "2 of the 3 documents that evaluation reads are in the training segments (d1, d2): a "
        "trained model has seen them."
    )
    (product_folder(tmp_path, "segments") / "documents.parquet").unlink()
    with pytest.raises(DamagedError, match="documents.parquet is missing: bring it back, or pack"):
        statements(tmp_path)
    write(tmp_path, "segments")  # as of earlier versions
    assert statements(tmp_path)[1] == (
        "Whether the training segments hold evaluated text is unknown: "
        f"{tmp_path}/1_segments does not list its documents."
    )


def test_another_corpus_is_named(tmp_path: Path) -> None:
    evaluated(tmp_path, TEXTS, {"corpus": "pg19", "own": "mine (/d)", "is_other": True})
    other = "Text: held out of corpus pg19, not of the run's own corpus, mine (/d)."
    assert statements(tmp_path) == [other]


def test_nothing_is_claimed_of_earlier_versions(tmp_path: Path) -> None:
    earlier = "by an earlier version, which did not note the documents it read."
    write(tmp_path, "factors", seeds={"seed": 11})
    assert statements(tmp_path) == []
    write(tmp_path, "evaluations")  # short tasks alone: no text
    assert statements(tmp_path) == []
    write(tmp_path, "evaluations", inputs={"corpus": {}})
    unknown = f"Whether training, search and evaluation share text is unknown: evaluated {earlier}"
    assert statements(tmp_path) == [unknown]
    evaluated(tmp_path, TEXTS)
    unknown = f"Whether search and evaluation share text is unknown: searched {earlier}"
    assert statements(tmp_path)[1] == unknown
