"""Filters: published rules by hand-made signals, an account of what each dropped, faults by key."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from public_corpora import write_redpajama_v2

from data_prep import pack as pack_module
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.config import (
    CorpusConfig,
    CorpusKind,
    FilterConfig,
    FilterRule,
    FinewebEduConfig,
    RedpajamaV2Config,
)
from longrope2.corpora.corpus import Document
from longrope2.corpora.filters import PUBLISHED, reason_against, recorded_names, score_of
from longrope2.corpora.losses import Losses
from longrope2.errors import ConfigError

# A page that every published rule keeps, each signal at a bound that is included.
GOOD = {
    "rps_doc_word_count": 50.0,
    "rps_doc_mean_word_length": 10.0,
    "rps_doc_symbol_to_word_ratio": 0.1,
    "rps_lines_start_with_bulletpoint": 0.9,
    "rps_doc_frac_lines_end_with_ellipsis": 0.3,
    "rps_doc_frac_no_alph_words": 0.2,
    "rps_doc_frac_chars_top_2gram": 0.2,
    "rps_doc_frac_chars_top_3gram": 0.18,
    "rps_doc_frac_chars_top_4gram": 0.16,
    **{f"rps_doc_frac_chars_dupe_{n}grams": round(0.2 - n / 100, 2) for n in range(5, 11)},
    "rps_doc_lorem_ipsum": 0.0,
    "rps_doc_curly_bracket": 0.0,
    "rps_doc_ldnoobw_words": 0.0,
    "rps_doc_num_sentences": 3.0,
}
# Just beyond a bound -> the rule that drops it and why.
BAD = [
    ("gopher", {"rps_doc_word_count": 49.0}, "rps_doc_word_count below 50"),
    ("gopher", {"rps_doc_word_count": 100_001.0}, "rps_doc_word_count above 100000"),
    ("gopher", {"rps_doc_mean_word_length": 2.9}, "rps_doc_mean_word_length below 3"),
    ("gopher", {"rps_doc_mean_word_length": 10.1}, "rps_doc_mean_word_length above 10"),
    ("gopher", {"rps_doc_symbol_to_word_ratio": 0.11}, "rps_doc_symbol_to_word_ratio above 0.1"),
    (
        "gopher",
        {"rps_lines_start_with_bulletpoint": 0.91},
        "rps_lines_start_with_bulletpoint above 0.9",
    ),
    ("gopher", {"rps_doc_frac_no_alph_words": 0.21}, "rps_doc_frac_no_alph_words above 0.2"),
    (
        "gopher_repetition",
        {"rps_doc_frac_chars_dupe_7grams": 0.131},
        "rps_doc_frac_chars_dupe_7grams above 0.13",
    ),
    (
        "gopher_repetition",
        {"rps_doc_frac_chars_top_2gram": 0.21},
        "rps_doc_frac_chars_top_2gram above 0.2",
    ),
    ("c4", {"rps_doc_num_sentences": 2.0}, "rps_doc_num_sentences below 3"),
    ("c4", {"rps_doc_curly_bracket": 0.001}, "rps_doc_curly_bracket above 0"),
]


def with_signals(signals, text="text"):
    return Document("d", text, "redpajama_v2", "en_head", recorded=signals)


def rule(name, **settings):
    return FilterConfig(FilterRule(name), **settings)


@pytest.mark.parametrize(("name", "change", "reason"), BAD)
def test_published_rules_drop_what_is_beyond_a_bound(name, change, reason):
    assert reason_against(rule(name), with_signals(GOOD)) is None
    assert reason_against(rule(name), with_signals(GOOD | change)) == f"filter {name}: {reason}"
    others = [other for other in PUBLISHED if other.value != name]
    for other in others:
        assert reason_against(FilterConfig(other), with_signals(GOOD | change)) is None


def test_own_bounds_languages_and_lengths():
    long = rule("signal", signal="rps_doc_word_count", least=2000)
    assert reason_against(long, with_signals({"rps_doc_word_count": 2000})) is None
    assert reason_against(long, with_signals({"rps_doc_word_count": 1999})) == (
        "filter signal: rps_doc_word_count below 2000"
    )
    assert reason_against(long, with_signals({})) == "filter signal: no rps_doc_word_count recorded"
    sure = rule("language", languages=["en", "de"], score=0.65)
    for told, reason in (
        ({"language": "de", "language_score": 0.65}, None),
        ({"language": "fr", "language_score": 0.9}, "filter language: not en, de"),
        ({"language": "en", "language_score": 0.6}, "filter language: score below 0.65"),
        ({"language": "en"}, "filter language: score below 0.65"),
        ({}, "filter language: no language recorded"),
    ):
        assert reason_against(sure, with_signals(told)) == reason
    short = rule("minimum_length", characters=5)
    assert reason_against(short, with_signals({}, "12345")) is None
    assert reason_against(short, with_signals({}, "1234")) == (
        "filter minimum_length: fewer than 5 characters"
    )
    elsewhere = rule("minimum_length", characters=5, sources=["pg19"])
    assert reason_against(elsewhere, with_signals({}, "1234")) is None


def test_a_signal_is_its_score_or_the_mean_over_lines():
    signals = {"rps_doc_word_count": [[0, 90, 17.0]], "lines": [[0, 5, 1.0], [6, 9, 0.0]]}
    assert score_of(signals, "rps_doc_word_count") == 17.0 and score_of(signals, "lines") == 0.5
    for broken in ([], [[0, 9, None]], [[0, 9]], "text", None):
        assert score_of({"x": broken}, "x") is None
    assert score_of({}, "x") is None


def test_adapters_are_asked_for_no_more_than_filters_need():
    rules = [rule("c4"), rule("language", languages=["en"], sources=["fineweb_edu"])]
    assert recorded_names(rules, "fineweb_edu")[:2] == ("language", "language_score")
    c4 = tuple(sorted(bound.signal for bound in PUBLISHED[FilterRule.c4]))
    assert recorded_names(rules, "redpajama_v2") == c4
    assert recorded_names([rule("minimum_length", characters=3)], "redpajama_v2") == ()


def signals_line(row, **signals):
    name = "2023-06/0000/en_head.json.gz"
    told = {key: [[0, 9, value]] for key, value in (GOOD | signals).items()}
    return json.dumps({"id": f"{name}/{row}", "id_int": row, "quality_signals": told})


def read(config):
    corpus, skipped, found = build_corpus(config), Losses(), []
    for unit in corpus.units():
        found += corpus.read(unit, skipped)
    return found, skipped


def test_signals_of_redpajama_v2_are_read_beside_the_pages(tmp_path):
    write_redpajama_v2(tmp_path)
    lines = [
        signals_line(0),
        signals_line(1),
        signals_line(3, rps_doc_word_count=7),
        "not json",
        json.dumps({"id": "2023-06/0000/en_head.json.gz/9", "quality_signals": None}),
    ]
    path = tmp_path / "quality_signals/2023-06/0000/en_head.signals.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    place = RedpajamaV2Config(root=str(tmp_path))
    config = CorpusConfig("v2", CorpusKind.redpajama_v2, redpajama_v2=place, heldout_fraction=0.0)
    plain, before = read(config)
    config.filters = [rule("gopher")]
    found, skipped = read(config)
    head = "redpajama_v2/2023-06/0000/en_head.json.gz"
    assert [document.doc_id for document in found] == [f"{head}/0"]
    dropped = {reason: n for reason, n in (skipped - before).items() if reason.startswith("filter")}
    assert dropped == {
        "filter gopher: rps_doc_word_count below 50": 1,
        # Row 4 has no line, en_middle no file.
        "filter gopher: no rps_doc_word_count recorded": len(plain) - 2,
    }
    assert skipped["quality signals, bad json (kept)"] == 1
    assert skipped["quality signals, missing file (kept)"] == 1


def test_the_language_of_fineweb_edu_is_a_column(tmp_path):
    columns = {"text": ["one", "zwei", "drei"], "id": ["a", "b", "c"]}
    columns |= {"language": ["en", "de", "en"], "language_score": [0.9, 0.9, 0.5]}
    (tmp_path / "sample/10BT").mkdir(parents=True)
    pq.write_table(pa.table(columns), tmp_path / "sample/10BT/000_00000.parquet")
    place, only = FinewebEduConfig(root=str(tmp_path)), rule("language", languages=["en"])
    config = CorpusConfig("f", CorpusKind.fineweb_edu, fineweb_edu=place, heldout_fraction=0.0)
    config.filters = [only]
    found, skipped = read(config)
    assert [document.text for document in found] == ["one", "drei"]
    assert skipped == {"filter language: not en": 1}
    only.score = 0.65
    assert [document.text for document in read(config)[0]] == ["one"]


def test_filters_hold_for_held_out_text_too(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"number {number} " * (1 + number % 2))
    config = CorpusConfig("f", CorpusKind.folder, folder=str(tmp_path), heldout_fraction=0.5)
    everything = heldout_documents(config)
    config.filters = [rule("minimum_length", characters=15)]
    kept = heldout_documents(config)
    assert [d for d in everything if len(d.text) >= 15] == kept
    assert 0 < len(kept) < len(everything)


def test_faults_name_the_key_and_what_is_allowed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    place = RedpajamaV2Config(root=str(tmp_path), partitions=["tail"])
    config = CorpusConfig(
        "mix",
        CorpusKind.mix,
        members=[CorpusKind.folder, CorpusKind.redpajama_v2],
        folder=str(tmp_path),
        redpajama_v2=place,
        filters=[
            rule("gopher"),
            rule("language", score=2.0),
            rule("minimum_length"),
            rule("signal", sources=["redpajama_v2"]),
        ],
    )
    expected = [
        "corpus.filters[0]: gopher goes by quality signals, which folder has not; name some of "
        "redpajama_v2 in its sources",
        "corpus.filters[1].languages is empty: name codes as the corpus has them, for example [en]",
        "corpus.filters[1].score=2.0 is outside [0, 1]",
        "corpus.filters[1]: language goes by a recorded language, which folder has not; name some "
        "of redpajama_v2, fineweb_edu in its sources",
        "corpus.filters[2].characters=0: minimum_length needs characters=N, at least 1",
        "corpus.filters[3].signal is not set: name one, for example rps_doc_word_count",
        "corpus.filters[3].least and most are both null: give at least one of them",
        "corpus.redpajama_v2.partitions: of tail no quality signals are published; leave it out, "
        "or the filter",
    ]
    with pytest.raises(ConfigError) as refused:
        build_corpus(config)
    assert list(refused.value.faults) == expected
    config = CorpusConfig("f", CorpusKind.folder, folder=str(tmp_path))
    config.filters = [rule("minimum_length", characters=3, sources=["folders"])]
    message = "corpus.filters: the corpus has no source folders; it has folder"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_corpus(config)


def test_what_filters_drop_is_in_result_manifest_and_report(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        words = 3 if number < 4 else 400
        (texts / f"{number:02d}.txt").write_text(f"{number} " + "some words " * words)
    pack_module.main(
        [
            *("--target", "256", "--corpus", "folder", f"corpus.folder={texts}", "run.name=x"),
            *(f"run.root={tmp_path}", "workers=1", "corpus.heldout_fraction=0.0"),
            "corpus.filters=[{rule:minimum_length,characters:100}]",
        ]
    )
    folder = tmp_path / "x/1_segments"
    reason = "filter minimum_length: fewer than 100 characters"
    assert f"skipped: 4 records, {reason}" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["num_records_skipped"] == {"folder": {reason: 4}}
    assert manifest["config"]["corpus"]["filters"][0]["rule"] == "minimum_length"
    assert reason in (folder / "report.html").read_text()
