"""Pieces of a text have the ids of the whole, by tokenizer family; where that is not known, none.

The reference is the tokenizer itself on the whole text.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from longrope2.corpora import cuts, tokenizer
from longrope2.corpora.cuts import WORD_PATTERNS, cuts_of
from longrope2.corpora.tokenizer import load_document_tokenizer, split_at_space_markers
from longrope2.errors import DataError

TINY = Path("models/tiny/tokenizer.json")
SNIPPETS = [
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "word", "Words", "don't", "it's\n",
    "x=1;", "    indented", "12345", "3.14 ", "1\n2", "日本語", "日\n", "é", "e\u0301", " \u0301",
    "a\u0301 ", "😀", "\u00a0", "\u3000", "▁", " ▁", "▁ ", "</s>", "'s", " 's", "/\n", ";\n", "ǅ",
    "a b c d", "!!", ". ", "-" * 9, "x" * 30, "\u00a8", "한국어 ", "Ω", "١٢", "\x00", "_ _",
    "a\n\nb",
]  # fmt: skip
PATTERNS = sorted(WORD_PATTERNS)


def texts(number=150, most=40):
    rng = random.Random(2)
    return ["".join(rng.choices(SNIPPETS, k=rng.randint(1, most))) for _ in range(number)]


def byte_level(*steps, normalizer=None):
    """A small byte-level BPE tokenizer that has merges across whatever its steps leave together."""
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(["".join(SNIPPETS), *texts(60)], trainer)
    backend.pre_tokenizer = pre.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.encode_special_tokens = True
    return backend


def bytes_alone():
    return pre.ByteLevel(add_prefix_space=False, use_regex=False)


def sentencepiece_like(kind):
    """A family of LLaMA 2's kind, as it comes out of ``split_at_space_markers``."""
    fields = json.loads(TINY.read_text(encoding="utf-8"))
    fields["pre_tokenizer"] = None
    if kind == "prepend":
        steps = [{"type": "Prepend", "prepend": "▁"}, fields["normalizer"]]
        fields["normalizer"] = {"type": "Sequence", "normalizers": steps}
    elif kind.startswith("metaspace"):
        fields["normalizer"] = None
        scheme, marked = kind.partition(" ")[2], {"type": "Metaspace", "replacement": "▁"}
        fields["pre_tokenizer"] = {**marked, "prepend_scheme": scheme, "split": False}
    backend = split_at_space_markers(Tokenizer.from_str(json.dumps(fields)))
    backend.encode_special_tokens = True
    return backend


FAMILIES = {
    "gpt2": lambda: byte_level(pre.ByteLevel(add_prefix_space=False, use_regex=True)),
    "gpt2 prefix": lambda: byte_level(pre.ByteLevel(add_prefix_space=True, use_regex=True)),
    "smollm2": lambda: byte_level(pre.Digits(True), pre.ByteLevel(False, True, True)),
    "punctuation": lambda: byte_level(pre.Punctuation(), pre.ByteLevel(False, True, True)),
    **{
        f"pattern {n}": lambda p=pattern: byte_level(pre.Split(Regex(p), "isolated"), bytes_alone())
        for n, pattern in enumerate(PATTERNS)
    },
    "matches kept": lambda: byte_level(
        pre.Split(Regex(PATTERNS[0]), "removed", invert=True), bytes_alone()
    ),
    **{
        form: lambda form=form: byte_level(
            pre.Split(Regex(PATTERNS[1]), "isolated"),
            bytes_alone(),
            normalizer=getattr(normalizers, form)(),
        )
        for form in cuts.NORMAL_FORMS
    },
    **{
        kind: lambda kind=kind: sentencepiece_like(kind)
        for kind in "replace|prepend|metaspace first|metaspace always|metaspace never".split("|")
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_have_the_ids_of_the_whole(family):
    backend = FAMILIES[family]()
    found = cuts_of(backend)
    assert found is not None
    num_cuts = 0
    for number, text in enumerate(texts()):
        pieces = list(found.pieces(text, 1 + number % 12))
        num_cuts += len(pieces) - 1
        parts = [backend.encode(piece, add_special_tokens=False).ids for piece in pieces]
        assert sum(parts, []) == backend.encode(text, add_special_tokens=False).ids, pieces
    assert num_cuts > 200


def test_the_families_tell_good_places_from_bad_ones():
    """The same check finds a cut in front of any space wrong, so it would find a wrong rule."""
    import re

    backend = FAMILIES["pattern 1"]()
    bad = cuts.Cuts(re.compile(r".(?=[ \n].)", re.DOTALL), leaves_out_space=False)
    wrong = 0
    for text in texts():
        pieces = [backend.encode(p, add_special_tokens=False).ids for p in bad.pieces(text, 3)]
        wrong += sum(pieces, []) != backend.encode(text, add_special_tokens=False).ids
    assert wrong > 20


def with_token(content, **settings):
    backend = FAMILIES["gpt2"]()
    backend.add_tokens([AddedToken(content, **settings)])
    return backend


UNKNOWN = {
    "another pattern": lambda: byte_level(pre.Split(Regex(r"\S+\s*"), "isolated"), bytes_alone()),
    "no split at all": lambda: byte_level(bytes_alone()),
    "kept with the one before": lambda: byte_level(
        pre.Split(Regex(PATTERNS[0]), "merged_with_previous"), bytes_alone()
    ),
    "another step": lambda: byte_level(pre.ByteLevel(False, True, True), pre.FixedLength(5)),
    "another normalizer": lambda: byte_level(
        pre.ByteLevel(False, True, True), normalizer=normalizers.Strip()
    ),
    "a token over a place": lambda: with_token("New York"),
    "a token that eats spaces": lambda: with_token("word", rstrip=True),
    "another model": lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    "dropout": lambda: Tokenizer(models.BPE(vocab={"a": 0}, merges=[], dropout=0.1)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_nothing_is_cut_where_it_is_not_known(kind):
    assert cuts_of(UNKNOWN[kind]()) is None


def test_a_token_in_text_forbids_cuts_of_the_sentencepiece_family():
    backend = sentencepiece_like("prepend")
    backend.add_tokens([AddedToken("hello")])
    assert cuts_of(backend) is None


def test_a_long_document_is_encoded_in_pieces_and_equals_the_whole(monkeypatch):
    encoder = load_document_tokenizer(Path("models/tiny"))
    text = Path("data_prep/packing.py").read_text() * 3
    whole = encoder.encode(text)
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 1000)
    lengths, encode = [], encoder._backend.encode_batch_fast

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch_fast(self, batch, **rest):
            lengths.append(max(map(len, batch)))
            return encode(batch, **rest)

    backend = encoder._backend
    monkeypatch.setattr(encoder, "_backend", Watched())
    short, long, empty = encoder.encode_contents(["a b", text, ""])
    assert long.tolist() == whole and short.tolist() == encoder.encode("a b") and len(empty) == 0
    assert long.dtype == encoder.dtype and max(lengths) < 1200 and len(lengths) > 20


def test_a_text_that_cannot_be_cut_is_whole_up_to_a_limit_and_refused_by_name_above(monkeypatch):
    encoder = load_document_tokenizer(Path("models/tiny"))
    monkeypatch.setattr(encoder, "_cuts", None)
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 100)
    text = "some words " * 50
    assert encoder.encode_contents([text])[0].tolist() == encoder.encode(text)
    monkeypatch.setattr(tokenizer, "MOST_WHOLE_CHARACTERS", 500)
    refused = (
        r"^books/7 has 550 characters in one piece, which this tokenizer cannot be shown to split "
        r"anywhere, and encoding them takes 0 GiB; the most is 500; split the record, or name it "
        r"in documents\.exclude$"
    )
    with pytest.raises(DataError, match=refused):
        encoder.encode_contents(["short", text], ["books/6", "books/7"])


def test_settings_of_a_tokenizer_file_never_shorten_or_pad_a_text(tmp_path):
    fields = json.loads(TINY.read_text(encoding="utf-8"))
    shorten = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY.parent / name).read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**fields, "truncation": shorten, "padding": pad}))
    (ids,) = load_document_tokenizer(tmp_path).encode_contents(["one text of several words"])
    (plain,) = load_document_tokenizer(TINY.parent).encode_contents(["one text of several words"])
    assert np.array_equal(ids, plain) and len(ids) > 4


def test_a_tokenizer_is_made_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes((TINY.parent / name).read_bytes())
    made, make = [], tokenizer._from_transformers

    def counted(*given):
        made.append(given)
        return make(*given)

    monkeypatch.setattr(tokenizer, "_from_transformers", counted)
    first, again = load_document_tokenizer(folder), load_document_tokenizer(folder)
    text = "".join(SNIPPETS)
    assert len(made) == 1 and first.encode(text) == again.encode(text)
    assert vars(first)["control_ids"] == vars(again)["control_ids"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**settings, "eos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    assert load_document_tokenizer(folder).eos_id == 0 and len(made) == 2
    monkeypatch.setenv("LONGROPE2_CACHE", str(TINY))  # a file: nothing can be kept there
    assert load_document_tokenizer(folder).eos_id == 0 and len(made) == 3


def test_windowless_classes_have_no_window():
    """What ``model/folder.py`` knows without asking them."""
    from transformers import AutoConfig

    from longrope2.model.folder import WINDOWLESS

    for name in WINDOWLESS:
        config = AutoConfig.for_model(name)
        assert not [key for key in vars(config) if "sliding" in key]
        assert "sliding_attention" not in str(config.to_dict())
