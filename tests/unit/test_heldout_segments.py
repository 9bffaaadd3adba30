"""Held-out segments for a training: which text they hold, how many, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.heldout import pack_heldout
from data_prep.pack import main as pack_main
from longrope2.config import find_shipped
from longrope2.corpora.corpus import content_hash, place_of_content
from longrope2.corpora.tokenizer import DocumentTokenizer, load_document_tokenizer
from longrope2.errors import ConfigError
from longrope2.segments.format import SegmentStore, check_segment

LENGTH, WINDOW = 256, 128
WORDS = "sea wind stone river night morning horse letter candle garden winter road".split()


@pytest.fixture(scope="module")
def encoder() -> DocumentTokenizer:
    return load_document_tokenizer(find_shipped("models/tiny"))


def words(number: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, number))


def pack_texts(root: Path, numbers_of_words: list[int], *more: str) -> Path:
    """Segments of a folder of texts of so many words; returns ``1_segments``."""
    texts = root / "texts"
    texts.mkdir()
    for number, length in enumerate(numbers_of_words):
        (texts / f"{number}.txt").write_text(words(length, number))
    pack_main(
        [
            *("--target", str(LENGTH), "--corpus", "folder", "--model", "tiny", "--align", "2"),
            *(f"corpus.folder={texts}", "corpus.heldout_fraction=0.5"),
            *(f"run.root={root}", "run.name=run", *more),
        ]
    )
    return root / "run" / "1_segments"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short and long documents: 120 of about 40 tokens and 40 of several hundred."""
    return pack_texts(tmp_path_factory.mktemp("mixed"), [25] * 120 + [400] * 40)


def test_only_held_out_text_of_the_segments_corpus(mixed, encoder, tmp_path) -> None:
    line = pack_heldout(tmp_path / "heldout", mixed, encoder, 4)
    assert line == "held out   4 short and 4 long segments of 256 tokens of the segments' corpus"
    store, trained = SegmentStore(tmp_path / "heldout"), SegmentStore(mixed)
    assert (len(store.short_ids), len(store.long_ids)) == (4, 4)
    trained_ids = {i.split("#")[0] for n in range(len(trained)) for i in trained.segment(n).doc_ids}
    for segment in map(store.segment, range(len(store))):
        check_segment(segment, trained.rules)
        for doc_id in filter(None, segment.doc_ids):
            text = (mixed.parents[1] / "texts" / doc_id.removeprefix("folder/")).read_text()
            assert place_of_content(content_hash(text)) < 0.5 and doc_id not in trained_ids
    # Short segments are whole documents, to the word.
    segment = store.segment(store.short_ids[0])
    starts = [0, *segment.doc_ends[:-1]]
    for start, end, doc_id in zip(starts, segment.doc_ends, segment.doc_ids, strict=True):
        if doc_id:
            text = encoder.decode(segment.tokens[start + 1 : end - 1]).strip()
            number = int(Path(doc_id).name.split(".")[0])
            assert text == words(25, number)


def test_written_once_and_again_for_another_number(mixed, encoder, tmp_path) -> None:
    folder = tmp_path / "heldout"
    first = pack_heldout(folder, mixed, encoder, 2)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pack_heldout(folder, mixed, encoder, 2) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    pack_heldout(folder, mixed, encoder, 3)
    assert len(SegmentStore(folder).long_ids) == 3


def test_windows_of_long_documents_where_no_short_ones_are(encoder, tmp_path) -> None:
    segments = pack_texts(tmp_path, [400] * 40)
    pack_heldout(tmp_path / "heldout", segments, encoder, 3)
    store = SegmentStore(tmp_path / "heldout")
    assert len(store.short_ids) == 3
    lengths = {
        int(n)
        for index in store.short_ids
        for n in np.diff(store.segment(index).doc_ends, prepend=0)
    }
    assert max(lengths) == WINDOW


def test_less_text_than_asked_for_is_said(mixed, encoder, tmp_path) -> None:
    line = pack_heldout(tmp_path / "heldout", mixed, encoder, 1000)
    assert line.endswith("; its held-out text fills no more (training.heldout_segments=1000)")


def test_a_corpus_that_is_gone_is_named(mixed, encoder, tmp_path) -> None:
    copy = tmp_path / "segments"
    shutil.copytree(mixed, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("/texts", "/moved"))
    with pytest.raises(
        ConfigError,
        match=r"(?s)held-out text is read from the corpus of .*segments: .*moved.*"
        r"train with training\.heldout_every=null",
    ):
        pack_heldout(tmp_path / "heldout", copy, encoder, 2)
