"""Held-out text is never packed: by content, by group, by cluster; leaks are found and named."""

import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.duplicates import clusters_of, near_duplicates, signature_of
from data_prep.heldout import pack_heldout
from data_prep.pack import main as pack_main
from data_prep.shards import LIST_SCHEMA, _require_train
from data_prep.verification import audit_folder, compare_held_out
from data_prep.verify import main as verify_main
from longrope2.config import find_shipped
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Document, Split, content_hash, split_of
from longrope2.corpora.held_out import HeldOutTexts, find_overlap
from longrope2.corpora.losses import Losses
from longrope2.corpora.sample import SampleCorpus
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import read_manifest, sha256_of_file, write_manifest

WORDS = "sea wind stone river night morning horse letter candle garden winter road lamp".split()
SHARE = 0.4


def words(number: int, seed: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=number)


def variants(text: str) -> dict[str, str]:
    """The same text as dirt in a corpus has it: other line ends, indents, capitals."""
    return {
        "copy": text,
        "dos": text.replace("\n", "\r\n") + "\r\n",
        "wide": text.replace(" ", "   "),
        "capital": text.upper(),
    }


def write_leaky_corpus(folder: Path) -> dict[str, str]:
    """100 texts, each up to five times under other names and dresses; returns id -> text."""
    folder.mkdir()
    texts = {}
    for number in range(100):
        lines = [" ".join(words(8, 100 * number + line)) for line in range(4)]
        for name, text in variants("\n".join(lines)).items():
            texts[f"{name}/{number}"] = text
    rows = [json.dumps({"text": text}) for text in texts.values()]
    (folder / "a.jsonl").write_text("\n".join(rows[::2]))
    (folder / "b.jsonl").write_text("\n".join(rows[1::2]))
    return texts


def pack_folder(folder: Path, root: Path, *more: str) -> Path:
    pack_main(
        [
            *("--target", "256", "--corpus", "folder", "--model", "tiny"),
            *(f"corpus.folder={folder}", f"corpus.heldout_fraction={SHARE}"),
            *("short_overlong=split", "documents.exact_duplicates=false"),
            *(f"run.root={root}", "run.name=run", *more),
        ]
    )
    return root / "run" / "1_segments"


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus and its segments."""
    root = tmp_path_factory.mktemp("leaky")
    write_leaky_corpus(root / "texts")
    return root / "texts", pack_folder(root / "texts", root)


def folder_config(folder: Path, share: float = SHARE) -> CorpusConfig:
    kind = CorpusKind.folder
    return CorpusConfig("mine", kind=kind, folder=str(folder), heldout_fraction=share)


def plain(text: str) -> str:
    """A text without what makes no other text, in this test's own words."""
    return re.sub(r"[ \t\r\n]", "", text).lower()


def test_no_held_out_text_is_packed_whatever_its_name_and_dress(leaky) -> None:
    folder, segments = leaky
    held_out = {plain(document.text) for document in heldout_documents(folder_config(folder))}
    corpus = build_corpus(folder_config(folder))
    texts = {d.doc_id: d.text for unit in corpus.units() for d in corpus.read(unit, Losses())}
    packed = pq.read_table(segments / "documents.parquet").column("doc_id").to_pylist()
    packed_texts = {plain(texts[doc_id.split("#")[0]]) for doc_id in packed}
    assert len(held_out) > 25 and len(packed_texts) > 40
    assert not held_out & packed_texts and len(held_out | packed_texts) == 100


def test_split_of_a_text_ignores_its_name_but_not_its_group() -> None:
    def split(text: str, group: str | None = None, doc_id: str = "d") -> Split:
        return split_of(Document(doc_id, text, "s", "d", group), SHARE)

    texts = [" ".join(words(9, seed)) for seed in range(200)]
    assert [split(t) for t in texts] == [split(t, doc_id="other") for t in texts]
    assert len({split(t) for t in texts}) == 2
    found = {(split(t), split(t, group)) for t in texts for group in map(str, range(40))}
    # A group adds ``unused``; it never turns one split into the other.
    assert found == {
        (Split.train, Split.train),
        (Split.train, Split.unused),
        (Split.heldout, Split.heldout),
        (Split.heldout, Split.unused),
    }
    of_group = [{split(t, group) for t in texts} for group in map(str, range(40))]
    assert all(not {Split.train, Split.heldout} <= splits for splits in of_group)


def test_reserved_texts_are_held_out_of_every_source() -> None:
    reserved = Document("books/1", "Call me Ishmael.\n", "books", "d")
    held_out = HeldOutTexts(0.0, frozenset([content_hash(reserved.text)]))
    copy = Document("web/7", "call me   Ishmael.", "web", "d")
    assert held_out.split_of(copy, content_hash(copy.text)) is Split.heldout
    other = content_hash("Call me Queequeg.")
    assert held_out.split_of(copy, other) is Split.train and not held_out.holds(other)


def test_copies_of_held_out_sample_texts_are_not_trained_on(monkeypatch) -> None:
    corpus = SampleCorpus()
    held_out = next(corpus.documents(Split.heldout))
    train = {d.doc_id for d in corpus.documents(Split.train)}
    copied = min(train)

    def read(self, unit, skipped, own=SampleCorpus.read):
        for document in own(self, unit, skipped):
            is_copied = document.doc_id == copied
            text = held_out.text.upper() if is_copied else document.text
            yield Document(document.doc_id, text, document.source, document.domain)

    monkeypatch.setattr(SampleCorpus, "read", read)
    assert {d.doc_id for d in corpus.documents(Split.train)} == train - {copied}
    assert [d.doc_id for d in corpus.documents(Split.unused)] == [copied]


def test_the_packer_checks_what_it_has_chosen() -> None:
    columns = {f.name: pa.nulls(1, f.type) for f in LIST_SCHEMA}
    columns |= {"doc_id": pa.array(["a.txt"]), "source": pa.array(["folder"])}
    columns["content_hash"] = pa.array([content_hash("secret")], pa.binary(16))
    rows = pa.record_batch(list(columns.values()), schema=LIST_SCHEMA)
    _require_train(rows, HeldOutTexts(0.0, frozenset()))
    with pytest.raises(DataError, match="the text of a.txt is held out and was chosen all the sam"):
        _require_train(rows, HeldOutTexts(0.0, frozenset([content_hash("secret")])))


def test_verify_passes_and_counts_held_out_documents(leaky, capsys) -> None:
    folder, segments = leaky
    verify_main([str(segments), "--sample", "5"])
    number = len(heldout_documents(folder_config(folder)))
    assert f"none of {number} held-out documents is in a segment" in capsys.readouterr().out


def planted(segments: Path, copy: Path, column: str, value: object, *rows: int) -> Path:
    """A copy of segments in whose list one value of some documents is another."""
    copy.mkdir()
    for path in segments.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    table = pq.read_table(copy / "documents.parquet")
    values = table.column(column).to_pylist()
    for row in rows:
        values[row] = value
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    pq.write_table(
        table.set_column(index, field, pa.array(values, field.type)), copy / "documents.parquet"
    )
    manifest = read_manifest(copy, "segments")
    manifest.details["documents"]["sha256"] = sha256_of_file(copy / "documents.parquet")
    write_manifest(copy, manifest)
    return copy


def test_verify_finds_a_leak_in_the_list(leaky, tmp_path) -> None:
    folder, segments = leaky
    text = heldout_documents(folder_config(folder))[0].text
    copy = planted(segments, tmp_path / "planted", "content_hash", content_hash(text), 0)
    words = (
        r"the text of .* is held out \(corpus.heldout_fraction=0.4\) and was packed all the same"
    )
    with pytest.raises(ArtifactError, match=words):
        audit_folder(copy)


def test_verify_finds_a_leak_by_the_ids_alone(leaky, tmp_path) -> None:
    """The list may say what it wants: a held-out text's ids stand in a segment."""
    folder, segments = leaky
    corpus = build_corpus(folder_config(folder))
    packed = set(pq.read_table(segments / "documents.parquet").column("doc_id").to_pylist())
    texts = (d for unit in corpus.units() for d in corpus.read(unit, Losses()))
    audit = audit_folder(segments, sample=1)
    whole = set(audit.whole.values())
    victim = next(d for d in texts if d.doc_id in packed & whole)
    encoder = load_document_tokenizer(find_shipped("models/tiny"))
    disguised = Document("books/1", victim.text + "\x00", "books", "d")
    compare_held_out(segments, audit, [disguised], encoder)
    leak, words = (
        Document("books/2", victim.text, "books", "d"),
        "has the text of books/2, which is",
    )
    with pytest.raises(ArtifactError, match=words):  # by its content, in the list
        compare_held_out(segments, audit_folder(segments), [leak], encoder)
    contents = pq.read_table(segments / "documents.parquet").to_pylist()
    content = content_hash(victim.text)
    copies = [n for n, row in enumerate(contents) if row["content_hash"] == content]
    forged = planted(segments, tmp_path / "forged", "content_hash", b"\xff" * 16, *copies)
    audit = audit_folder(forged, sample=1)
    with pytest.raises(ArtifactError, match=words):
        compare_held_out(forged, audit, [leak], encoder)
    audit.whole.clear()
    compare_held_out(forged, audit, [leak], encoder)


def test_verify_refuses_a_list_of_an_earlier_version(leaky, tmp_path) -> None:
    _, segments = leaky
    copy = planted(segments, tmp_path / "earlier", "doc_id", "x", 0)
    table = pq.read_table(copy / "documents.parquet").drop_columns(["content_hash"])
    pq.write_table(table, copy / "documents.parquet")
    manifest = read_manifest(copy, "segments")
    manifest.details["documents"]["sha256"] = sha256_of_file(copy / "documents.parquet")
    write_manifest(copy, manifest)
    with pytest.raises(ArtifactError, match="no column content_hash: packed by an earlier version"):
        audit_folder(copy)


def test_overlap_with_segments_is_named(leaky, tmp_path) -> None:
    folder, segments = leaky
    assert find_overlap(heldout_documents(folder_config(folder)), segments) is None
    everything = heldout_documents(folder_config(folder, 1.0))
    overlap = find_overlap(everything, segments)
    assert overlap is not None and overlap.num_texts == 400
    own = {d.doc_id for d in heldout_documents(folder_config(folder))}
    assert set(overlap.doc_ids) == {d.doc_id for d in everything} - own
    first = ", ".join(sorted(overlap.doc_ids)[:5])
    assert str(overlap) == (
        f"{len(overlap.doc_ids)} of the 400 held-out texts are also in the segments {segments}, so "
        f"a model trained on them has seen them: {first} and {len(overlap.doc_ids) - 5} more"
    )
    # Lists of an earlier version are compared by the exact text.
    table = pq.read_table(segments / "documents.parquet").drop_columns(["content_hash"])
    pq.write_table(table, tmp_path / "documents.parquet")
    earlier = find_overlap(everything, tmp_path)
    assert earlier is not None and set(earlier.doc_ids) == set(overlap.doc_ids)
    assert find_overlap(everything, tmp_path / "none") is None and find_overlap([], None) is None


def test_held_out_segments_leave_out_what_was_packed(leaky, tmp_path) -> None:
    """Segments of an earlier version, whose corpus now splits otherwise."""
    _, segments = leaky
    copy = planted(segments, tmp_path / "earlier", "doc_id", "x", 0)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        config.replace(f"heldout_fraction: {SHARE}", "heldout_fraction: 0.6")
    )
    encoder = load_document_tokenizer(find_shipped("models/tiny"))
    line = pack_heldout(tmp_path / "heldout", copy, encoder, 2)
    found = re.search(r"left out: (\d+) of the (\d+) held-out texts are also in the segm", line)
    assert found is not None and 0 < int(found[1]) < int(found[2])


def similar(text: list[str], seed: int) -> list[str]:
    """A copy with one word in a hundred changed."""
    changed, generator = list(text), random.Random(seed)
    for place in generator.sample(range(len(text)), len(text) // 100):
        changed[place] = f"x{generator.getrandbits(32)}"
    return changed


def shingles(text: str) -> set[str]:
    found = re.findall(r"\w+", text.casefold())
    return {" ".join(found[n : n + 5]) for n in range(max(1, len(found) - 4))}


def jaccard(first: str, second: str) -> float:
    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def test_a_cluster_of_similar_texts_lies_in_one_split(tmp_path) -> None:
    """Chains of similar texts: a held-out text drops its whole chain, far ends too."""
    pytest.importorskip("datasketch")
    (tmp_path / "texts").mkdir()
    texts: dict[str, str] = {}
    for number in range(12):
        text = [f"{word}{number}x{n}" for n, word in enumerate(words(500, number))]
        for step in range(4):
            texts[f"folder/{number}_{step}.txt"] = " ".join(text)
            text = similar(text, 10 * number + step)
    for doc_id, text in texts.items():
        (tmp_path / doc_id.replace("folder", "texts")).write_text(text)
    share = "corpus.heldout_fraction=0.15"
    segments = pack_folder(tmp_path / "texts", tmp_path, "documents.near_duplicates=true", share)
    listed = pq.read_table(segments / "documents.parquet").column("doc_id").to_pylist()
    packed = {doc_id.split("#")[0] for doc_id in listed}
    held_out = {d.doc_id for d in heldout_documents(folder_config(tmp_path / "texts", 0.15))}
    chain = {doc_id: doc_id.split("_")[0] for doc_id in texts}
    chains = {chain[doc_id] for doc_id in held_out}
    assert 2 <= len(chains) <= 10
    assert {chain[doc_id] for doc_id in packed} == set(chain.values()) - chains
    # By brute force, without signatures.
    ends = [jaccard(texts[p], texts[h]) for p in packed for h in held_out]
    assert max(ends) < 0.5
    counts = read_manifest(segments, "segments").counts["num_documents_left_out"]["folder"]
    assert counts["near duplicate of held-out text"] == sum(
        chain[doc_id] in chains and doc_id not in held_out for doc_id in texts
    )


def test_clusters_reach_through_chains() -> None:
    pytest.importorskip("datasketch")
    text = [f"w{n}" for n in range(400)]
    chain = [text]
    for step in range(4):
        chain.append(similar(chain[-1], step))
    far = " ".join(chain[-1])
    assert jaccard(" ".join(text), far) < 0.75  # the ends are no near duplicates themselves
    signatures = [signature_of(" ".join(link)) for link in chain]
    other = signature_of(" ".join(f"v{n}" for n in range(400)))
    assert clusters_of(signatures[:1], [*signatures[1:], other]).tolist() == [True] * 4 + [False]
    assert not clusters_of([], signatures).any()
    assert near_duplicates([signatures[0], signatures[0], other]).tolist() == [False, True, False]


def test_a_repository_is_in_one_split_whatever_is_read_together(tmp_path) -> None:
    """40 repositories over 4 files of a language, read one, two or four files at a time."""
    (tmp_path / "python").mkdir()
    for file in range(4):
        rows = [
            {
                "max_stars_repo_name": f"owner/repo{number}",
                "max_stars_repo_path": f"part{file}.py",
                "content": f"# vendored, the same everywhere {number % 3}"
                if file == 3
                else f"x = {number * 10 + file}",
            }
            for number in range(40)
        ]
        path = tmp_path / "python" / f"train-0000{file}-of-00004.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    splits: dict[str, set[Split]] = {}
    texts: dict[Split, set[str]] = {split: set() for split in Split}
    for together in (1, 2, 4):
        config = CorpusConfig("code", kind=CorpusKind.starcoder, heldout_fraction=SHARE)
        config.starcoder.root, config.starcoder.files_per_unit = str(tmp_path), together
        corpus = build_corpus(config)
        for split in (Split.train, Split.heldout):
            for document in corpus.documents(split):
                repository = document.doc_id.partition("owner/")[2]
                splits.setdefault(repository, set()).add(split)
                texts[split].add(document.text)
    assert {frozenset(found) for found in splits.values()} == {
        frozenset([Split.train]),
        frozenset([Split.heldout]),
    }
    assert not texts[Split.train] & texts[Split.heldout]
