"""A log of JSON lines loses no record to a crash, and refuses damage that no crash explains."""

import json
import zlib
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


def test_a_sealed_line_ends_in_a_checksum_that_its_reader_takes_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"old": 1}\n')  # of a version without
    with AppendLog(path, sealed=True) as log:
        log.append(*RECORDS, {})
    assert read_log(path) == [{"old": 1}, *RECORDS, {}]
    found = json.loads(path.read_text().splitlines()[3])
    checksum = zlib.crc32(b'{"step": 3')
    assert found == {**RECORDS[2], "crc32": f"{checksum:08x}"}


def test_any_changed_byte_of_a_sealed_log_is_refused_or_costs_no_number(tmp_path: Path) -> None:
    """Only the name of the checksum may; the last line may be torn, and is measured again."""
    path = tmp_path / "log.jsonl"
    with AppendLog(path, sealed=True) as log:
        log.append(*RECORDS)
    whole = path.read_bytes()
    for place in range(whole.rindex(b"\n", 0, -1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        number = whole[:place].count(b"\n") + 1
        try:
            records = read_log(path)
        except ArtifactError as error:
            assert f"log.jsonl is damaged at line {number};" in str(error)
        else:
            written, found = RECORDS[number - 1], records[number - 1]
            assert {key: found.get(key) for key in written} == written


@pytest.mark.parametrize("line", [b"[" * 100_000, b"3", b'["a"]'])
def test_a_line_that_is_no_object_is_damage_too(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line + b"\n" + WHOLE)
    with pytest.raises(ArtifactError, match="log.jsonl is damaged at line 1"):
        read_log(path)
