"""Public corpora on miniature mirrors: every record read as it is, or left out and counted."""

import gzip
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from public_corpora import (
    SPECIAL,
    page,
    write,
    write_code,
    write_fineweb_edu,
    write_pg19,
    write_redpajama_v1,
    write_redpajama_v2,
    write_starcoder,
)

from data_prep.config import PackConfig
from longrope2.config import compose
from longrope2.corpora.build import build_corpus, heldout_texts
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.corpus import Split, split_documents, stable_fraction
from longrope2.corpora.losses import Losses
from longrope2.errors import ConfigError

CONF = Path(__file__).parent.parent.parent / "conf" / "corpus"
WRITERS = {
    "redpajama_v1": write_redpajama_v1, "redpajama_v2": write_redpajama_v2,
    "starcoder": write_starcoder, "fineweb_edu": write_fineweb_edu, "pg19": write_pg19,
}  # fmt: skip


def configured(kind, root=None, **settings):
    """Configuration of one public corpus, with keys of its adapter."""
    config = CorpusConfig(name=kind, kind=CorpusKind(kind))
    part = getattr(config, kind)
    part.root = None if root is None else str(root)
    for key, value in settings.items():
        setattr(part, key, value)
    return config


def everything(corpus):
    """All documents by id, and what was left out."""
    skipped = Losses()
    documents = [document for unit in corpus.units() for document in corpus.read(unit, skipped)]
    texts = {document.doc_id: document.text for document in documents}
    assert len(texts) == len(documents) and {d.source for d in documents} <= set(corpus.sources)
    return texts, dict(skipped)


@pytest.mark.parametrize("kind", ["redpajama_v1", "starcoder", "fineweb_edu", "pg19"])
def test_real_schemas_and_their_faults(tmp_path, kind):
    texts, counts = WRITERS[kind](tmp_path)
    corpus = build_corpus(configured(kind, tmp_path))
    assert everything(corpus) == (texts, counts)
    assert all(unit.size_bytes for unit in corpus.units())
    assert len({unit.name for unit in corpus.units()}) == len(corpus.units())
    assert json.loads(json.dumps(corpus.describe())) == corpus.describe()
    # In another process, in another order, the documents and their ids are the same.
    again = pickle.loads(pickle.dumps(corpus))
    backwards = {
        d.doc_id: d.text for unit in reversed(again.units()) for d in again.read(unit, Losses())
    }
    assert backwards == texts


def test_redpajama_v2(tmp_path):
    texts, counts = write_redpajama_v2(tmp_path)
    corpus = build_corpus(configured("redpajama_v2", tmp_path))
    found, skipped = everything(corpus)
    middle = {i: t for i, t in found.items() if "en_middle" in i}
    assert {i: t for i, t in found.items() if i not in middle} == texts and skipped == counts
    # The truncated file gives its first pages, each as it was written.
    assert 0 < len(middle) < 400
    assert middle == {
        f"redpajama_v2/2023-06/0000/en_middle.json.gz/{n}": f"page {n} {n * 7919}"
        for n in range(len(middle))
    }
    assert {d.domain for d in corpus.read(corpus.units()[0], Losses())} == {"en_head"}


def test_redpajama_v2_parts_and_thinning(tmp_path):
    write_redpajama_v2(tmp_path)
    tail = build_corpus(configured("redpajama_v2", tmp_path, partitions=["tail"]))
    assert everything(tail) == ({"redpajama_v2/2023-06/0000/en_tail.json.gz/0": "tail"}, {})
    german = build_corpus(
        configured("redpajama_v2", tmp_path, languages=["de"], drop_duplicates=False)
    )
    assert everything(german) == ({"redpajama_v2/2023-06/0000/de_head.json.gz/0": "deutsch"}, {})
    pages = [page("s" * (n % 40 + 1)) for n in range(400)]
    write(
        tmp_path / "documents/2023-06/0001/fr_head.json.gz",
        gzip.compress("\n".join(pages).encode()),
    )
    settings = {
        "languages": ["fr"],
        "drop_duplicates": False,
        "short_characters": 31,
        "short_survival": 0.3,
    }
    thinned, skipped = everything(build_corpus(configured("redpajama_v2", tmp_path, **settings)))
    name = "redpajama_v2/2023-06/0001/fr_head.json.gz"
    kept = [n for n in range(400) if n % 40 >= 30 or stable_fraction("thin", f"{name}/{n}") < 0.3]
    assert list(thinned) == [f"{name}/{n}" for n in kept] and skipped == {
        "thinned short page": 400 - len(kept)
    }
    assert 60 < len(kept) - 100 < 120  # 300 short pages, three in ten


def test_starcoder_languages_and_single_files(tmp_path):
    write_starcoder(tmp_path)
    files, _ = everything(
        build_corpus(
            configured("starcoder", tmp_path, languages=["python"], join_repositories=False)
        )
    )
    name = "starcoder/python/train-0000"
    assert files == {
        f"{name}0-of-00002.parquet:0": "second file\n",
        f"{name}0-of-00002.parquet:1": "print(1)\n",
        f"{name}0-of-00002.parquet:3": "no repository",
        f"{name}1-of-00002.parquet:0": "first file\n",
        f"{name}1-of-00002.parquet:1": SPECIAL,
    }
    alone = build_corpus(configured("starcoder", tmp_path, languages=["python"], files_per_unit=1))
    assert [unit.name for unit in alone.units()] == [f"{name}{n}-of-00002" for n in (0, 1)]
    other = build_corpus(
        configured("starcoder", tmp_path, languages=["jupyter-scripts-dedup-filtered"])
    )
    assert list(everything(other)[0].values()) == ["a notebook"]
    raw = build_corpus(
        configured("starcoder", tmp_path, strip_control_text=False, join_repositories=False)
    )
    assert "<filename>a.py<gh_stars>3\nfirst file\n" in everything(raw)[0].values()


def test_large_repositories_are_cut_between_files(tmp_path):
    rows = [(f"{n:03d}.py", "x/big", f"{n:03d}" * 100) for n in range(50)] + [
        ("a.py", f"x/{n}", str(n)) for n in range(200)
    ]
    rows = sorted(
        rows, key=lambda row: stable_fraction(*row)
    )  # files of a repository come in any order
    write_code(
        tmp_path / "c/train-00000-of-00001.parquet", rows, pa.array([1] * len(rows), pa.int64())
    )
    found, _ = everything(
        build_corpus(configured("starcoder", tmp_path, repository_characters=3050))
    )
    name = "starcoder/c/train-00000-of-00001/x"
    assert {i: t for i, t in found.items() if "big" not in i} == {
        f"{name}/{n}": str(n) for n in range(200)
    }
    for piece in range(5):  # ten files of 300 characters and the separators between them
        expected = "\n\n".join(f"{n:03d}" * 100 for n in range(10 * piece, 10 * piece + 10))
        assert found[f"{name}/big" + (f" ({piece + 1})" if piece else "")] == expected


def test_missing_columns_are_counted(tmp_path):
    (tmp_path / "sample/10BT").mkdir(parents=True)
    pq.write_table(pa.table({"id": ["1", "2"]}), tmp_path / "sample/10BT/0.parquet")
    write(tmp_path / "sample/10BT/1.parquet", b"PAR1 truncated")
    assert everything(build_corpus(configured("fineweb_edu", tmp_path))) == (
        {},
        {"no column text": 2, "damaged file": 1},
    )


def test_pg19_keeps_its_own_splits(tmp_path):
    write_pg19(tmp_path)
    config = configured("pg19", tmp_path)
    corpus = build_corpus(config)
    assert [d.doc_id for d in corpus.documents(Split.heldout)] == [
        "pg19/validation/12 The validation book"
    ]
    assert [d.doc_id for d in corpus.documents(Split.train)] == ["pg19/train/11 The train book"]
    assert [d.doc_id for d in split_documents(corpus, Split.train)] == [
        "pg19/train/11 The train book"
    ]
    assert [d.text for d in corpus.reserved()] == ["Once upon a validation."]
    assert heldout_texts(config) == ["Once upon a validation."]


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_corpus_fits_the_schema_and_its_mixture_names_sources_it_has(file):
    with initialize_config_dir(config_dir=str(CONF.parent), version_base="1.3"):
        composed = hydra_compose(config_name=f"corpus/{file.stem}").corpus
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), composed))
    assert isinstance(config, CorpusConfig)
    members = [kind.value for kind in config.members]
    assert (config.kind is CorpusKind.mix) == bool(members)
    if file.stem in ("books", "pg19"):  # never packed
        assert not (CONF.parent / "mixture" / file.name).exists()
        return
    packed = compose(PackConfig, "pack", [f"corpus={file.stem}", "target_len=131072"])
    assert packed.corpus == config
    if members:
        assert packed.mixture.faults(members, 8192) == []
        assert sorted(packed.mixture.sources) == sorted(members) and not packed.quotas
    else:
        assert not packed.mixture.is_given and "retrieval" in packed.quotas


def paper_mirrors(tmp_path):
    """Configuration of corpus=paper with a mirror of every source."""
    composed = OmegaConf.load(CONF / "paper.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), composed))
    assert isinstance(config, CorpusConfig)
    config.redpajama_v2.short_characters = 0
    for kind in ("redpajama_v1", "redpajama_v2", "starcoder", "fineweb_edu"):
        (tmp_path / kind).mkdir()
        WRITERS[kind](tmp_path / kind)
        getattr(config, kind).root = str(tmp_path / kind)
    return config


def test_paper_corpus_from_mirrors(tmp_path):
    config = paper_mirrors(tmp_path)
    corpus = build_corpus(config)
    assert corpus.sources == ("redpajama_v1", "redpajama_v2", "starcoder", "fineweb_edu")
    found, _ = everything(corpus)
    alone = [
        everything(build_corpus(configured(kind, tmp_path / kind)))[0] for kind in corpus.sources
    ]
    assert found == {doc_id: text for texts in alone for doc_id, text in texts.items()}
    splits = [{d.doc_id for d in corpus.documents(split)} for split in (Split.train, Split.heldout)]
    assert splits[0] | splits[1] == set(found) and not splits[0] & splits[1]
    assert set(corpus.describe()) == set(corpus.sources)
    # Held-out text comes from all sources in turn, and no more of it is read than asked for.
    config.heldout_fraction = 1.0
    config.heldout_characters = 1
    assert len(heldout_texts(config)) == 1
    config.heldout_characters = 100
    first = [
        d.source
        for d, _ in zip(build_corpus(config).documents(Split.heldout), range(4), strict=False)
    ]
    assert first == list(corpus.sources)


def test_unreachable_sources_are_told_together(monkeypatch):
    """Nothing of this reaches a network: names that cannot exist, a hub that is switched off."""
    from longrope2.corpora import remote

    def refused(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refused)
    monkeypatch.setattr(remote, "first_byte", refused)
    config = CorpusConfig(
        name="paper",
        kind=CorpusKind.mix,
        members=[
            CorpusKind.redpajama_v1,
            CorpusKind.redpajama_v2,
            CorpusKind.starcoder,
            CorpusKind.fineweb_edu,
        ],
    )
    with pytest.raises(ConfigError) as error:
        build_corpus(config)
    faults = error.value.faults
    assert len(faults) == 4
    for fault, kind in zip(faults, config.members, strict=True):
        assert fault.startswith(f"corpus.{kind.value} (") and "cannot be reached: tried " in fault
        assert (
            "(ConnectionError: Name or service not known)" in fault and "`hf auth login`" in fault
        )
        assert (
            f"set corpus.{kind.value}.root=FOLDER (FOLDER/" in fault
            and "`--corpus sample` works offline" in fault
        )
    assert "urls/arxiv.txt of hub dataset togethercomputer/RedPajama-Data-1T" in faults[0]
    assert (
        "https://data.together.xyz/redpajama-data-v2/v1.0.0/listings/en-2023-06-head_middle.txt"
        in faults[1]
    )
    assert "accept the terms at https://huggingface.co/datasets/bigcode/starcoderdata" in faults[2]
    assert "accept the terms" not in faults[3]


def test_hub_files_are_pinned_and_gated_ones_explained(monkeypatch):
    from huggingface_hub.hf_api import RepoFile

    from longrope2.corpora import remote

    entries = [
        RepoFile(path=p, size=5, oid="x", type="file")
        for p in ("go/train-00000-of-00001.parquet", "README.md")
    ]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_, **__: type("Info", (), {"sha": "abc123"})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: entries)
    tried = []
    monkeypatch.setattr(remote, "first_byte", tried.append)
    corpus = build_corpus(configured("starcoder"))
    assert tried == ["hf://datasets/bigcode/starcoderdata@abc123/go/train-00000-of-00001.parquet"]
    assert [(unit.name, unit.size_bytes) for unit in corpus.units()] == [
        ("starcoder/go/train-00000-of-00001", 5)
    ]
    assert corpus.describe()["base"] == "hf://datasets/bigcode/starcoderdata@abc123"

    def gated(_):
        raise PermissionError("401: access to dataset bigcode/starcoderdata is restricted")

    monkeypatch.setattr(remote, "first_byte", gated)
    with pytest.raises(
        ConfigError,
        match=r"PermissionError: 401: access .* is restricted\)\. .*accept the terms at",
    ):
        build_corpus(configured("starcoder"))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            "redpajama_v1",
            {"domains": []},
            "corpus.redpajama_v1.domains is empty; name at least one",
        ),
        (
            "redpajama_v1",
            {"domains": ["book"]},
            r"corpus.redpajama_v1.root=.*/book cannot be read \(FileNotFoundError: no file "
            r"ending in .jsonl, .* expected FOLDER/arxiv/arxiv_023827cd.jsonl",
        ),
        (
            "redpajama_v2",
            {"languages": ["en", "xx"]},
            r"corpus.redpajama_v2.languages=\['en', 'xx'\]: choose at least one of en",
        ),
        (
            "redpajama_v2",
            {"partitions": []},
            r"corpus.redpajama_v2.partitions=\[\]: choose at least one of head_middle, tail",
        ),
        (
            "redpajama_v2",
            {"snapshots": []},
            r"corpus.redpajama_v2.snapshots=\[\]: choose at least one of names such as 2023-06",
        ),
        (
            "redpajama_v2",
            {"short_survival": 2.0},
            r"corpus.redpajama_v2.short_survival=2.0 is outside \[0, 1\]",
        ),
        (
            "redpajama_v2",
            {"short_characters": -1},
            "corpus.redpajama_v2.short_characters=-1 must be 0 or more",
        ),
        (
            "starcoder",
            {"languages": ["go", "klingon"]},
            r"corpus.starcoder.languages=\['klingon'\]: no such folder; there are",
        ),
        (
            "starcoder",
            {"files_per_unit": 0},
            "corpus.starcoder.files_per_unit=0 must be at least 1",
        ),
        (
            "starcoder",
            {"repository_characters": 0},
            "corpus.starcoder.repository_characters=0 must be at least 1",
        ),
        (
            "fineweb_edu",
            {"subset": "sample/100BT"},
            r"corpus.fineweb_edu.root=.*: no file ending in .parquet below .*100BT\)",
        ),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, kind, settings, words):
    WRITERS[kind](tmp_path)
    with pytest.raises(ConfigError, match=words):
        build_corpus(configured(kind, tmp_path, **settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"members": []},
            r"corpus.members=\[\]: name different ones of sample, folder, redpajama_v1",
        ),
        ({"members": [CorpusKind.mix]}, r"corpus.members=\['mix'\]: name different ones of"),
        (
            {"members": [CorpusKind.sample] * 2},
            r"corpus.members=\['sample', 'sample'\]: name different ones of",
        ),
        (
            {"members": [CorpusKind.folder]},
            "corpus.folder is not set; corpus=folder needs corpus.folder=PATH",
        ),
        ({"heldout_characters": 0}, "corpus.heldout_characters=0 must be at least 1, or null"),
    ],
)
def test_mixes_that_cannot_be_used(changes, words):
    config = CorpusConfig(
        **({"name": "m", "kind": CorpusKind.mix, "members": [CorpusKind.sample]} | changes)
    )
    with pytest.raises(ConfigError, match=words):
        build_corpus(config)
