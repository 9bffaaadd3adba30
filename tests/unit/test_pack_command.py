"""The pack command on small folders: tokens come back as text, reruns, crashes, bad input."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_prep import pack as pack_module
from data_prep.config import BucketQuota, BucketTokens, MixtureConfig, PackConfig
from data_prep.pack import check
from data_prep.verification import audit_folder
from longrope2.config import compose
from longrope2.corpora.corpus import Split
from longrope2.corpora.folder import FolderCorpus
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.errors import ConfigError
from longrope2.files.artifacts import sha256_of_file
from longrope2.files.lease import only_writer
from longrope2.segments.format import SegmentStore

WORDS = "alpha beta gamma </s> <s> delta\tx  \n epsilon 42 é 日本 ".split(" ")


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory):
    """Files from a few to thousands of tokens."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for number in range(60):
        count = rng.choice([5, 20, 60, 200, 1200])
        (folder / f"{number:02d}.txt").write_text(
            " ".join(rng.choices(WORDS, k=count)), encoding="utf-8"
        )
    return folder


def run(*arguments):
    """Exit code of the command in this process; 0 when it returns."""
    try:
        pack_module.main([*arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


def folder_arguments(texts_folder, root, *more):
    return (
        "--target",
        "512",
        "--corpus",
        "folder",
        f"corpus.folder={texts_folder}",
        f"run.root={root}",
        "run.name=x",
        *more,
    )


def unpacked(store):
    """Document id -> token runs, in the order of the document where the order is known."""
    runs = defaultdict(list)
    for index in range(len(store)):
        segment = store.segment(index)
        starts = np.concatenate([[0], segment.doc_ends[:-1]])
        documents = zip(
            starts, segment.doc_ends, segment.doc_ids, segment.doc_is_padding, strict=True
        )
        for start, end, doc_id, is_padding in documents:
            if not is_padding:
                runs[doc_id].append(segment.tokens[start:end].tolist())
    return runs


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_every_document_comes_back_as_its_text(texts_folder, tmp_path, align, overlong):
    more = (f"align={align}", f"short_overlong={overlong}", "tokens_per_shard=2048")
    assert run(*folder_arguments(texts_folder, tmp_path, *more)) == 0
    folder = tmp_path / "x" / "1_segments"
    audit_folder(folder)
    store = SegmentStore(folder)
    encoder = load_document_tokenizer(Path("models/tiny"))
    runs, rest = unpacked(store), store.manifest.counts["left_over_tokens"]
    corpus = FolderCorpus(str(texts_folder), text_field="text")
    missing = 0
    for document in corpus.documents(Split.train):
        ids = encoder.encode_documents([document.text])[0].tolist()
        windows = [
            runs[key]
            for key in sorted(
                (k for k in runs if k.startswith(f"{document.doc_id}#")), key=number_of
            )
        ]
        if windows:
            assert overlong == "split" and all(len(w) == 1 and len(w[0]) <= 128 for w in windows)
            # Each window is a document of its own, so that one of them may be the rest.
            content = ids[1:-1]
            cut = [content[n : n + 126] for n in range(0, len(content), 126)]
            packed = [w[0][1:-1] for w in windows]
            assert packed == [window for window in cut if window in packed]
            missing += sum(len(window) + 2 for window in cut if window not in packed)
            whole = "".join(encoder.decode(window) for window in packed) == document.text
            assert whole or "é" in document.text or len(packed) < len(cut)
        else:
            missing += len(ids) - sum(map(len, runs[document.doc_id]))
            assert assembled(ids, runs[document.doc_id])
    assert missing == rest < 512
    packed = sum(
        t for buckets in store.manifest.counts["tokens"].values() for t in buckets.values()
    )
    assert packed + store.manifest.counts["padding_tokens"] == len(store) * 512
    assert not any(d.doc_id in key for d in corpus.documents(Split.heldout) for key in runs)


def number_of(window_id):
    return int(window_id.split("#")[1])


def assembled(ids, runs):
    """Whether the runs are disjoint parts of ``ids`` that cover it but for a tail."""
    by_start = sorted((ids_position(ids, run), run) for run in runs)
    place = 0
    for start, run in by_start:
        if start != place:
            return False
        place += len(run)
    return True


def ids_position(ids, run):
    """First place of ``run`` in ``ids``; the runs here are long enough or start the document."""
    return next(p for p in range(len(ids)) if ids[p : p + len(run)] == run)


def test_rerun_finds_the_work_done_and_another_configuration_is_refused(
    texts_folder, tmp_path, capsys
):
    arguments = folder_arguments(texts_folder, tmp_path)
    assert run(*arguments) == 0
    folder = tmp_path / "x" / "1_segments"
    before = {p.name: (sha256_of_file(p), p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert set(before) == {
        "config.yaml",
        "manifest.json",
        "report.html",
        "documents.parquet",
        "losses.parquet",
        "segments-00000-00000.arrow",
    }
    assert run(*arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert run(*arguments, "seed=3", "quotas.folder.long=100") == 2
    message = capsys.readouterr().err
    assert "seed was 0, now it is 3" in message
    assert "quotas.folder.long was None, now it is 100" in message
    assert f"use another run.name, or remove {folder} to make it again" in message
    assert {p.name: (sha256_of_file(p), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


def test_the_same_command_gives_the_same_bytes(texts_folder, tmp_path):
    hashes = []
    for name in ("a", "b"):
        assert run(*folder_arguments(texts_folder, tmp_path / name, "tokens_per_shard=2048")) == 0
        hashes.append(SegmentStore(tmp_path / name / "x" / "1_segments").manifest.files)
    assert hashes[0] == hashes[1] and len(hashes[0]) > 2


def test_killed_while_writing_then_run_again(texts_folder, tmp_path):
    arguments = folder_arguments(texts_folder, tmp_path / "killed", "tokens_per_shard=2048")
    script = (
        "import os, signal, sys\n"
        "import data_prep.shards as writing, data_prep.pack as pack\n"
        "original, calls = writing._record_batch, []\n"
        "def killing(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*a)\n"
        "writing._record_batch = killing\n"
        "pack.main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, timeout=120
    )
    assert killed.returncode == -9
    folder = tmp_path / "killed" / "x" / "1_segments"
    left = {p.name for p in folder.iterdir()}
    assert "manifest.json" not in left and any(name.endswith(".tmp") for name in left)
    assert run(*arguments) == 0
    assert run(*folder_arguments(texts_folder, tmp_path / "whole", "tokens_per_shard=2048")) == 0
    whole = tmp_path / "whole" / "x" / "1_segments"
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for path in whole.glob("*.arrow"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_manifest_names_what_it_was_made_from(texts_folder, tmp_path):
    assert run(*folder_arguments(texts_folder, tmp_path)) == 0
    manifest = json.loads((tmp_path / "x" / "1_segments" / "manifest.json").read_text())
    assert manifest["inputs"]["model"]["tokenizer_sha256"] == sha256_of_file(
        Path("models/tiny/tokenizer.json")
    )
    assert set(manifest["inputs"]["corpus"]["files"]) == {f"{n:02d}.txt" for n in range(60)}
    expected = {
        "target_len": 512,
        "original_len": 128,
        "alignment": 1,
        "vocab_size": 2048,
        "bos_id": 1,
        "eos_id": 2,
        "control_ids": [1, 2],
        "model_name": "tiny",
        "length_buckets": {"short": 128, "long": 200000},
    }
    assert {key: manifest["details"][key] for key in expected} == expected
    assert manifest["details"]["documents"]["file"] == "documents.parquet"
    assert manifest["counts"]["shortfalls"] == []


def test_dry_run_prints_what_is_wanted_and_writes_nothing(texts_folder, tmp_path, capsys):
    assert run(*folder_arguments(texts_folder, tmp_path / "root", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert (
        "segments of 512 tokens, short window 128" in printed
        and "dry run: nothing was written" in printed
    )
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "512", "--corpus", "nope"], ["corpus=nope", "folder", "sample"]),
        (["--target", "512", "--corpus", "sample", "nokey=1"], ["unknown key nokey"]),
        (["--target", "512", "--corpus", "books"], ["mixture=books does not exist", "folder"]),
        (
            ["--target", "512", "corpus.quotas.retrieval.long=0", "+corpus.plan.sources.a=5"],
            [
                "2 fault(s)",
                "unknown key corpus.quotas.retrieval.long; it is quotas.retrieval.long now",
                "unknown key corpus.plan.sources.a; it is mixture.sources.a now",
            ],
        ),
        (
            ["--target", "512", "corpus.short_overlong=split", "seed=1"],
            ["unknown key corpus.short_overlong; it is short_overlong now"],
        ),
        (
            [
                "--target",
                "500",
                "--corpus",
                "sample",
                "align=3",
                "retrieval.max_needles=0",
                "model.path=/no/such",
                "quotas.stdlib_topics.short=-1",
                "quotas.retrieval.long=null",
                "tokens_per_shard=1",
            ],
            [
                "7 fault(s)",
                "target_len=500 must be a multiple of model.original_len=128, and not below it; "
                "use for example 512",
                "align=3 does not divide target_len=500",
                "retrieval.max_needles=0 must be at least 1",
                "model.path=/no/such",
                "quotas.stdlib_topics.short=-1 must be tokens",
                "quotas.retrieval.long=null: these documents are generated",
                "tokens_per_shard=1 must be at least",
            ],
        ),
        (
            [
                "--target",
                "512",
                "--corpus",
                "sample",
                "tokens_per_unit=8",
                "documents.max_tokens=128",
                "documents.max_units=0",
                "workers=-1",
                "documents.exclude=[/no/such.txt]",
                "cluster.jobs=0",
            ],
            [
                "6 fault(s)",
                "tokens_per_unit=8 must be at least target_len=512",
                "documents.max_tokens=128 must be above model.original_len=128",
                "documents.max_units=0 must be at least 1",
                "workers=-1 must be 0 (one per core) or more",
                "exclude: /no/such.txt cannot be read",
                "cluster.jobs=0 must be above 0",
            ],
        ),
        (
            ["--target", "512", "--corpus", "sample", "align=8"],
            ["align=8 leaves chunks of 64 tokens", "use at most 4"],
        ),
        (
            ["--target", "64", "--corpus", "sample"],
            ["target_len=64 must be a multiple", "use for example 128"],
        ),
        (
            ["--target", "512", "--corpus", "sample", "model.original_len=4"],
            ["model.original_len=4 is not a window"],
        ),
        (["--target", "512", "--corpus", "folder"], ["corpus.folder is not set"]),
        (
            ["--target", "512", "--corpus", "folder", "corpus.folder=/no/such"],
            ["corpus.folder=/no/such is not a folder"],
        ),
        (
            ["--target", "512", "--corpus", "folder", "corpus.folder=conf/rope"],
            ["holds no file ending in .txt"],
        ),
        (
            [
                "--target",
                "512",
                "--corpus",
                "sample",
                "quotas={stdlib_topics:{short:0,long:0}}",
                "quotas.stdlib_modules.short=0",
                "quotas.stdlib_modules.long=0",
                "quotas.retrieval.short=0",
                "quotas.retrieval.long=0",
            ],
            ["quotas asks for no tokens at all"],
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path, capsys, arguments, words):
    assert run(*arguments, f"run.root={tmp_path / 'root'}") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "root").exists()


def test_a_quota_for_an_unknown_source():
    config = compose(PackConfig, "pack", ["target_len=512", "corpus=sample"])
    config.quotas["books"] = BucketQuota(short=0, long=5)
    with pytest.raises(
        ConfigError, match="quotas.books: the corpus has no such source; it has stdlib_modules"
    ):
        check(config)


def test_a_corpus_that_fills_no_segment(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one two three " * 60)
    arguments = folder_arguments(tmp_path / "texts", tmp_path / "root", "quotas.folder.short=0")
    assert run(*arguments) == 2
    assert "not enough for one segment of target_len=512" in capsys.readouterr().err
    assert not (tmp_path / "root" / "x" / "1_segments" / "manifest.json").exists()


def test_shortfalls_are_reported(texts_folder, tmp_path, capsys):
    assert run(*folder_arguments(texts_folder, tmp_path, "quotas.folder.long=9000000")) == 0
    assert "shortfall: folder/long:" in capsys.readouterr().out
    counts = SegmentStore(tmp_path / "x" / "1_segments").manifest.counts
    assert counts["shortfalls"][0].endswith("of 9,000,000 tokens")


def test_a_second_run_into_the_same_folder_is_refused(texts_folder, tmp_path, capsys):
    with only_writer(tmp_path / "x", "1_segments"):
        assert run(*folder_arguments(texts_folder, tmp_path)) == 2
    assert "1_segments is being written by" in capsys.readouterr().err
    assert run(*folder_arguments(texts_folder, tmp_path)) == 0


def test_any_number_of_workers_gives_the_same_bytes(texts_folder, tmp_path):
    """Several rounds of reading, several shuffle units, short windows cut from long documents."""
    more = (
        "tokens_per_shard=1024",
        "tokens_per_unit=4096",
        "short_overlong=split",
        "align=4",
        "quotas.folder.short=6000",
        "quotas.folder.long=9000",
        "quotas.retrieval.long=2000",
    )
    folders = []
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers) / "x" / "1_segments"
        assert (
            run(
                *folder_arguments(
                    texts_folder, tmp_path / str(workers), f"workers={workers}", *more
                )
            )
            == 0
        )
        folders.append(
            {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("config.yaml",)}
        )
    manifests = [json.loads(files.pop("manifest.json")) for files in folders]
    assert folders[0] == folders[1] == folders[2] and len(folders[0]) > 8
    assert manifests[0]["counts"] == manifests[1]["counts"] == manifests[2]["counts"]
    assert manifests[0]["counts"]["num_shuffle_units"] > 2
    audit_folder(tmp_path / "4" / "x" / "1_segments")


def test_datasets_opens_the_shards(texts_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert run(*folder_arguments(texts_folder, tmp_path, "tokens_per_shard=2048")) == 0
    folder = tmp_path / "x" / "1_segments"
    files = sorted(str(path) for path in folder.glob("*.arrow"))
    rows = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    encoder = load_document_tokenizer(Path("models/tiny"))
    corpus = FolderCorpus(str(texts_folder), text_field="text")
    texts = {document.doc_id: document.text for document in corpus.documents(Split.train)}
    decoded = 0
    for row in rows:
        assert (
            len(row["tokens"]) == 512
            and row["window"] in ("short", "long")
            and row["doc_ends"][-1] == 512
        )
        starts = [0, *row["doc_ends"][:-1]]
        for start, end, doc_id, padding in zip(
            starts, row["doc_ends"], row["doc_id"], row["is_padding"], strict=True
        ):
            ids = row["tokens"][start:end]
            if not padding and ids[0] == encoder.bos_id and ids[-1] == encoder.eos_id:
                assert encoder.decode(ids[1:-1]) == texts[doc_id]
                decoded += 1
    assert decoded > 20


def test_excluded_texts_are_not_packed(texts_folder, tmp_path):
    first, second = (texts_folder / name for name in ("00.txt", "01.txt"))
    lists = tmp_path / "lists"
    (lists / "books").mkdir(parents=True)
    (lists / "a.txt").write_text(
        f"# search texts\n{sha256_of_file(first)}\nfolder/02.txt  # by id\n"
    )
    (lists / "b.json").write_text(json.dumps([{"title": "03", "sha256": "0" * 64}]))
    (lists / "books" / "copy.txt").write_bytes(second.read_bytes())
    exclude = f"documents.exclude=[{lists}/a.txt,{lists}/b.json,{lists}/books]"
    assert run(*folder_arguments(texts_folder, tmp_path, exclude)) == 0
    store = SegmentStore(tmp_path / "x" / "1_segments")
    excluded = {f"folder/0{n}.txt" for n in range(4)}
    trained = {
        document.doc_id
        for document in FolderCorpus(str(texts_folder), text_field="text").documents(Split.train)
    }
    assert not excluded & set(unpacked(store)) and len(excluded & trained) == 4
    untokenized = store.manifest.counts["num_documents_untokenized"]["folder"]
    assert untokenized["on the exclusion list"] == 4
    assert untokenized["held out for search and evaluation"] == 60 - len(trained)


def test_a_mixture_fits_the_supply_and_reports_what_is_missing(texts_folder, tmp_path, capsys):
    more = (
        "tokens_per_shard=2048",
        "tokens_per_unit=8192",
        "target_len=512",
        "corpus=folder",
        "run.name=x",
    )
    config = compose(
        PackConfig, "pack", [f"corpus.folder={texts_folder}", f"run.root={tmp_path}", *more]
    )
    buckets = BucketTokens(short=5000, mid=10000, long=15000)
    config.mixture = MixtureConfig(
        sources={"folder": 30000}, buckets=buckets, mid_limit=400, long_limit=900
    )
    pack_module.pack(config)
    assert "tokens by length: short 5,000, mid 10,000, long 15,000" in capsys.readouterr().out
    folder = tmp_path / "x" / "1_segments"
    audit_folder(folder)
    counts = SegmentStore(folder).manifest.counts
    assert set(counts["chosen_tokens"]["folder"]) == {"short", "mid", "long"}
    assert any(shortfall.startswith("bucket mid") for shortfall in counts["shortfalls"])
    long = counts["chosen_tokens"]["folder"]["long"]
    assert 15000 <= long < 15000 + 900


def test_the_report_shows_the_account(texts_folder, tmp_path):
    assert run(*folder_arguments(texts_folder, tmp_path)) == 0
    folder = tmp_path / "x" / "1_segments"
    page, counts = (folder / "report.html").read_text(), SegmentStore(folder).manifest.counts
    assert f"<td>{counts['tokens']['folder']['long']:,}</td>" in page
    assert f"<td>{counts['padding_tokens']:,}</td>" in page
    assert "held out for search and evaluation" in page and "http" not in page
    histogram = SegmentStore(folder).manifest.details["length_histogram"]
    assert sum(histogram["num_documents"]["folder"]["chosen"]) == sum(
        counts["num_documents"]["folder"].values()
    )


def test_dry_run_estimates_supply_and_disk(texts_folder, tmp_path, capsys):
    assert (
        run(
            *folder_arguments(
                texts_folder, tmp_path / "root", "--dry-run", "quotas.folder.long=5000"
            )
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "/ 5,000" in printed and "of 60 units" in printed and "GiB of segments" in printed
    assert not (tmp_path / "root").exists()
