"""The audit finds what was changed in a finished folder, and compares with the source."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import pack, verify
from data_prep.verification import audit_folder
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import sha256_of_file
from longrope2.segments.format import SegmentStore, check_at_start


def run(main, *arguments):
    """Exit code of a command in this process."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A finished folder and the texts it was packed from."""
    root = tmp_path_factory.mktemp("packed")
    texts, rng = root / "texts", random.Random(0)
    texts.mkdir()
    for number in range(30):
        words = rng.choices(
            ["plain", "words", "</s>", "<s>", "42", "\n"], k=rng.choice([30, 300, 3000])
        )
        (texts / f"{number:02d}.txt").write_text(f"{number} " + " ".join(words), encoding="utf-8")
    arguments = (
        "--target",
        "512",
        "--corpus",
        "folder",
        f"corpus.folder={texts}",
        f"run.root={root}",
        "run.name=x",
        "documents.max_tokens=2000",
        "tokens_per_shard=8192",
        "tokens_per_unit=16384",
    )
    assert run(pack.main, *arguments, "quotas.folder.short=600") == 0
    return root / "x" / "1_segments", texts


@pytest.fixture
def copy(packed, tmp_path):
    """A copy to damage; its configuration still names the texts."""
    return Path(shutil.copytree(packed[0], tmp_path / "1_segments"))


def change_manifest(folder, change):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]  # of itself: those of earlier versions have none
    change(fields)
    path.write_text(json.dumps(fields))


def test_what_was_packed_holds(packed, capsys):
    folder, _ = packed
    assert run(verify.main, folder) == 0
    printed = capsys.readouterr().out
    assert "every token accounted for" in printed
    number = int(printed.split("\n")[1].split(" ")[0])
    assert number > 20 and f"the ids of {number} of them decode to passages of it" in printed
    check_at_start(SegmentStore(folder))
    counts = SegmentStore(folder).manifest.counts
    assert (
        counts["num_documents_split"] and counts["left_out_tokens"]["folder"]["short quota met"] > 0
    )


def test_without_source(packed, capsys):
    assert run(verify.main, packed[0], "--no-source") == 0
    assert "no document was compared" in capsys.readouterr().out


def test_a_changed_text_is_found(packed, copy, tmp_path, capsys):
    changed = tmp_path / "texts"
    shutil.copytree(packed[1], changed)
    (copy / "config.yaml").write_text(
        (copy / "config.yaml").read_text().replace(str(packed[1]), str(changed))
    )
    assert run(verify.main, copy) == 0
    for path in changed.glob("*.txt"):
        path.write_text(path.read_text().replace("plain", "plane", 1))
    assert run(verify.main, copy) == 2
    assert "is not the one that was packed; was the corpus changed?" in capsys.readouterr().err


def test_a_missing_file_is_found(packed, copy, tmp_path, capsys):
    changed = tmp_path / "texts"
    changed.mkdir()
    (changed / "other.txt").write_text("other")
    (copy / "config.yaml").write_text(
        (copy / "config.yaml").read_text().replace(str(packed[1]), str(changed))
    )
    assert run(verify.main, copy) == 2
    assert "is not in the corpus any more" in capsys.readouterr().err


def test_another_tokenizer_is_refused(copy, capsys):
    change_manifest(
        copy, lambda fields: fields["inputs"]["model"].update(tokenizer_sha256="0" * 64)
    )
    assert run(verify.main, copy) == 2
    assert "was packed with another tokenizer" in capsys.readouterr().err


def test_a_damaged_shard_is_found(copy):
    path = sorted(copy.glob("*.arrow"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        audit_folder(copy)


def test_a_truncated_shard_is_found_at_start(copy):
    change_manifest(
        copy, lambda fields: fields["details"]["file_bytes"].update({min(fields["files"]): 17})
    )
    with pytest.raises(ArtifactError, match="bytes, the manifest says 17; pack again"):
        check_at_start(SegmentStore(copy))


def test_wrong_totals_are_found_at_start(copy):
    change_manifest(copy, lambda fields: fields["counts"].update(padding_tokens=1))
    with pytest.raises(ArtifactError, match=r"do not make up \d+ segments of 512"):
        check_at_start(SegmentStore(copy))


def test_a_broken_rule_is_found_at_start(copy):
    change_manifest(copy, lambda fields: fields["details"].update(bos_id=77))
    with pytest.raises(ArtifactError, match="does not start with BOS; pack again"):
        check_at_start(SegmentStore(copy))


def replace_list(folder, change):
    """Rewrite documents.parquet and make the manifest agree with it."""
    table = pq.read_table(folder / "documents.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "documents.parquet")
    entry = {"sha256": sha256_of_file(folder / "documents.parquet"), "num_rows": len(rows)}
    change_manifest(folder, lambda fields: fields["details"]["documents"].update(entry))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), "is in the segments but not in documents.parquet"),
        (
            lambda rows: rows[0].update(num_tokens=rows[0]["num_tokens"] + 5),
            "counts.rest_tokens.folder is",
        ),
        (lambda rows: rows[0].update(num_tokens=2), "tokens, the segments hold more"),
        (lambda rows: rows.append(rows[0]), "an id stands there twice"),
    ],
)
def test_a_wrong_list_of_documents_is_found(copy, change, words):
    replace_list(copy, change)
    with pytest.raises(ArtifactError, match=words):
        audit_folder(copy)


def test_a_changed_list_of_documents_is_found(copy):
    (copy / "documents.parquet").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="missing, or its SHA-256 differs from the manifest"):
        audit_folder(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda counts: counts["tokenized_tokens"].update(
                folder=counts["tokenized_tokens"]["folder"] + 7
            ),
            "7 are unaccounted for",
        ),
        (lambda counts: counts["left_out_tokens"].pop("folder"), "are unaccounted for"),
        (
            lambda counts: counts.update(padding_tokens=counts["padding_tokens"] + 1),
            "counts.padding_tokens is",
        ),
        (lambda counts: counts["tokens"]["folder"].update(long=1), "counts.tokens.folder is"),
        (
            lambda counts: counts["wanted_tokens"].update(folder={"short": 10**7}),
            "no shortfall reported",
        ),
        (lambda counts: counts["wanted_tokens"].update(folder={"short": 10}), "10 were wanted"),
    ],
)
def test_a_wrong_account_is_found(copy, change, words):
    change_manifest(copy, lambda fields: change(fields["counts"]))
    with pytest.raises(ArtifactError, match=words):
        audit_folder(copy)
