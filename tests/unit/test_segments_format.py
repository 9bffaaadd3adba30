"""The segment store: what is written comes back; a damaged folder is refused with the reason."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from pack_documents import TokenizedDocument

from data_prep.packing import pack_long, pack_short
from data_prep.shards import write_shards
from data_prep.verification import audit_folder
from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import Manifest, sha256_of_file, write_manifest
from longrope2.rope.factors import Window
from longrope2.segments.format import SegmentRules, SegmentStore, segment_schema

RULES = SegmentRules(
    target_len=32, original_len=8, alignment=2, vocab_size=70_000, bos_id=1, eos_id=2
)
DETAILS = {
    "target_len": 32,
    "original_len": 8,
    "alignment": 2,
    "vocab_size": 70_000,
    "bos_id": 1,
    "eos_id": 2,
    "model_name": "none",
}


def documents(lengths, name):
    return [
        TokenizedDocument(
            f"{name}{n}",
            name,
            np.asarray([1, *range(60_000, 60_000 + length - 2), 2], dtype=np.uint32),
        )
        for n, length in enumerate(lengths)
    ]


@pytest.fixture
def drafts():
    short = pack_short(
        documents([8, 7, 6, 5, 8, 8, 3] * 3, "short"), target_len=32, alignment=2, seed=0
    ).segments
    return [
        *short,
        *pack_long(documents([20, 30, 200, 32], "long"), target_len=32, seed=0).segments,
    ]


@pytest.fixture
def folder(tmp_path, drafts):
    files = write_shards(tmp_path, drafts, RULES, tokens_per_shard=32 * 4)
    num_short = sum(draft.window is Window.SHORT for draft in drafts)
    counts = {"num_short_segments": num_short, "num_long_segments": len(drafts) - num_short}
    write_manifest(tmp_path, Manifest(kind="segments", files=files, counts=counts, details=DETAILS))
    return tmp_path


def change_manifest(folder, change):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]  # of itself: those of earlier versions have none
    change(fields)
    path.write_text(json.dumps(fields))


def test_segments_come_back_as_drafted(folder, drafts):
    store = SegmentStore(folder)
    assert len(store) == len(drafts) and len(store.manifest.files) > 1
    assert store.short_ids + store.long_ids == list(range(len(drafts)))
    for index, draft in enumerate(drafts):
        segment = store.segment(index)
        real = [p for p in draft.pieces if p.document is not None]
        expected = np.concatenate([p.document.tokens[p.start : p.stop] for p in real])  # type: ignore[union-attr]
        mask = np.repeat(~np.asarray(segment.doc_is_padding), np.diff(segment.doc_ends, prepend=0))
        assert np.array_equal(segment.tokens[mask], expected) and segment.tokens.dtype == np.uint32
        assert segment.window is draft.window and segment.index == index
        assert segment.doc_ends.tolist() == np.cumsum([len(p) for p in draft.pieces]).tolist()
        assert segment.doc_ids == tuple(
            p.document.doc_id if p.document else "" for p in draft.pieces
        )
        assert segment.sources == tuple(
            p.document.source if p.document else "" for p in draft.pieces
        )
        assert segment.starts_mid_document == (draft.pieces[0].start > 0)
        assert segment.num_padding == (~mask).sum()
    assert any(store.segment(index).starts_mid_document for index in store.long_ids)
    assert audit_folder(folder).num_segments == len(drafts)


def test_slices_are_views_into_the_mapped_file(folder):
    store = SegmentStore(folder)
    whole = store.segment(5).tokens
    part = store.segment_slice(5, 8, 24)
    assert np.array_equal(part, whole[8:24]) and np.shares_memory(part, whole)
    assert not part.flags.writeable
    with pytest.raises(IndexError):
        store.segment_slice(5, 8, 33)
    with pytest.raises(IndexError):
        store.segment(len(store))


def test_datasets_opens_the_shards(folder, tmp_path):
    import datasets

    files = sorted(str(folder / name) for name in SegmentStore(folder).manifest.files)
    rows = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    store = SegmentStore(folder)
    assert len(rows) == len(store)
    for index, row in enumerate(rows):
        segment = store.segment(index)
        assert row["tokens"] == segment.tokens.tolist() and row["window"] == segment.window.value
        assert (
            row["doc_ends"] == segment.doc_ends.tolist() and tuple(row["doc_id"]) == segment.doc_ids
        )
    mapped = datasets.Dataset.from_file(files[0])
    assert mapped[0]["tokens"] == store.segment(0).tokens.tolist()


def test_ids_of_a_small_vocabulary_take_two_bytes():
    assert segment_schema(8, 2**16).field("tokens").type == pa.list_(pa.uint16(), 8)
    assert segment_schema(8, 2**16 + 1).field("tokens").type == pa.list_(pa.uint32(), 8)


def test_a_bad_draft_is_not_written(tmp_path, drafts):
    with pytest.raises(DataError, match="longer than original_len=4"):
        write_shards(
            tmp_path, drafts, dataclasses.replace(RULES, original_len=4), tokens_per_shard=128
        )
    assert list(tmp_path.iterdir()) == []


def test_unfinished_folder(tmp_path):
    with pytest.raises(ArtifactError, match="holds no finished segments"):
        SegmentStore(tmp_path)


def test_another_kind(folder):
    change_manifest(folder, lambda fields: fields.update(kind="factors"))
    with pytest.raises(ArtifactError, match="kind is 'factors', expected 'segments'"):
        SegmentStore(folder)


def test_missing_detail(folder):
    change_manifest(folder, lambda fields: fields["details"].pop("bos_id"))
    with pytest.raises(ArtifactError, match="details lack bos_id"):
        SegmentStore(folder)


def test_missing_shard(folder):
    (folder / "segments-00000-00001.arrow").unlink(missing_ok=True)
    name = sorted(p.name for p in folder.glob("*.arrow"))[0]
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        SegmentStore(folder)


def test_damaged_shard(folder):
    path = sorted(folder.glob("*.arrow"))[0]
    path.write_bytes(b"nonsense" * 8)
    with pytest.raises(ArtifactError, match="cannot be read"):
        SegmentStore(folder)


def test_other_columns(folder):
    change_manifest(folder, lambda fields: fields["details"].update(target_len=16))
    with pytest.raises(ArtifactError, match="column tokens does not fit the manifest"):
        SegmentStore(folder)


def test_other_counts(folder):
    change_manifest(folder, lambda fields: fields["counts"].update(num_long_segments=1))
    with pytest.raises(ArtifactError, match="num_long_segments is 1, the shards hold"):
        SegmentStore(folder)


def test_changed_tokens_are_found(folder):
    path = sorted(folder.glob("*.arrow"))[0]
    data = bytearray(path.read_bytes())
    place = data.rfind((60_001).to_bytes(4, "little"))
    data[place] ^= 1
    path.write_bytes(data)
    store = SegmentStore(folder)
    with pytest.raises(ArtifactError, match=f"{path.name}: SHA-256 differs"):
        store.verify()


def test_a_broken_rule_in_a_finished_folder_is_found(folder):
    change_manifest(folder, lambda fields: fields["details"].update(original_len=4))
    with pytest.raises(ArtifactError, match="longer than original_len=4"):
        audit_folder(folder)


def test_the_same_drafts_give_the_same_bytes(folder, tmp_path, drafts):
    again = write_shards(tmp_path / "again", drafts, RULES, tokens_per_shard=32 * 4)
    assert again == SegmentStore(folder).manifest.files
    assert all(
        sha256_of_file(tmp_path / "again" / name) == digest for name, digest in again.items()
    )
