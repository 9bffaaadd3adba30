"""A log of JSON lines loses no record to a crash, and refuses damage that no crash explains."""

import json
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError
from longrope2.files.append_log import AppendLog, read_log

RECORDS = [{"step": 1, "text": "a\u2028b\n"}, {"step": 2, "losses": [1.5, None]}, {"step": 3}]
WHOLE = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def test_one_line_for_each_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with AppendLog(path, durable=True) as log:
        log.append(RECORDS[0])
        assert read_log(path) == RECORDS[:1], "a record is out before the next one"
        log.append()
    with AppendLog(path) as log:
        log.append(*RECORDS[1:])
    assert path.read_bytes() == WHOLE and read_log(path) == RECORDS
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("size", range(len(WHOLE)))
def test_a_kill_after_any_byte_costs_at_most_the_torn_record(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE[:size])
    num_whole = WHOLE[:size].count(b"\n")
    assert read_log(path) == RECORDS[:num_whole]
    assert path.read_bytes() == WHOLE[:size], "a reader changes nothing: a writer may be at work"
    with AppendLog(path) as log:
        log.append(*RECORDS[num_whole:])
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("torn", [b'{"step"\n', b"\0\0\0\0", b"\0\0\0}\n", b"\xff\n", b"\n"])
def test_a_last_line_that_is_no_json_is_torn_too(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + torn)
    assert read_log(path) == RECORDS
    AppendLog(path).close()
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("damage", [b"not json\n", b"\n", b'{"step": 2\n'])
def test_a_damaged_line_before_the_last_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + damage + b'{"torn": ')
    for use in (AppendLog, read_log):
        with pytest.raises(
            ArtifactError, match=r"log.jsonl is damaged at line 4; remove that line"
        ):
            use(path)
    assert path.read_bytes() == WHOLE + damage + b'{"torn": '


def test_a_second_writer_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AppendLog(path, in_use="is taken"):
        with pytest.raises(ArtifactError, match=r"log\.jsonl is taken$"):
            AppendLog(path, in_use="is taken")
    AppendLog(path, in_use="is taken").close()


def test_records_that_will_be_written_again_are_cut_off(tmp_path: Path) -> None:
    """From the first of them: a log in which steps were repeated before is in order again."""
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append(*({"step": step} for step in (1, 2, 3, 2, 3, 4)))
        assert log.cut_from(lambda record: record["step"] > 4) == 0
        assert log.cut_from(lambda record: record["step"] > 2) == 4
        log.append({"step": 3})
        assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
