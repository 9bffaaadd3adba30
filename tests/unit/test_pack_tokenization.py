"""Ids with and without the split at spaces; text never becomes a control id."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from longrope2.corpora.tokenizer import (
    flag_markers,
    load_document_tokenizer,
    prepared_tokenizer,
    save_prepared_tokenizer,
    split_at_space_markers,
)

TINY = Path("models/tiny/tokenizer.json")
SNIPPETS = [
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "word", "Words", "don't", "x=1;",
    "    indented", "12345", "3.14", "日本語", "é", "e\u0301", "😀", "👩‍👩‍👧", "\u00a0", "\u3000",
    "▁", "▁▁", "a▁b", " ▁", "▁ ", "</s>", "<s>", "<|end|>", "\x00", "_",
    "averyverylongwordwithoutanyspaces" * 3, "-" * 40,
]  # fmt: skip


def family(kind):
    """Backends of the LLaMA-2 family: by normaliser, with a leading marker, or by Metaspace."""
    fields = json.loads(TINY.read_text(encoding="utf-8"))
    fields["pre_tokenizer"] = None
    if kind == "prepend":
        steps = [{"type": "Prepend", "prepend": "▁"}, fields["normalizer"]]
        fields["normalizer"] = {"type": "Sequence", "normalizers": steps}
    elif kind.startswith("metaspace"):
        scheme = kind.partition(" ")[2]
        fields["normalizer"] = None
        fields["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }
    return json.dumps(fields)


@pytest.mark.parametrize(
    "kind", ["replace", "prepend", "metaspace first", "metaspace always", "metaspace never"]
)
def test_split_at_space_markers_keeps_all_ids(kind):
    plain, split = (
        Tokenizer.from_str(family(kind)),
        split_at_space_markers(Tokenizer.from_str(family(kind))),
    )
    assert split.pre_tokenizer is not None and str(split.to_str()) != plain.to_str()
    rng = random.Random(kind)
    texts = [*SNIPPETS, *("".join(rng.choices(SNIPPETS, k=rng.randint(1, 40))) for _ in range(400))]
    texts += [Path("data_prep/packing.py").read_text(), Path("README.md").read_text()]
    for backend in (plain, split):
        backend.encode_special_tokens = True
    for text in texts:
        ids = [backend.encode(text, add_special_tokens=False).ids for backend in (plain, split)]
        assert ids[0] == ids[1], repr(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["model"]["vocab"].update({"a▁b": 5000}),
        lambda fields: fields["model"].update(ignore_merges=True),
        lambda fields: fields.update(pre_tokenizer={"type": "Whitespace"}),
        lambda fields: fields.update(normalizer=None),
    ],
)
def test_no_split_where_ids_could_change(change):
    fields = json.loads(family("replace"))
    change(fields)
    backend = Tokenizer.from_str(json.dumps(fields))
    before = backend.to_str()
    assert split_at_space_markers(backend).to_str() == before


def test_markers_that_are_not_flagged_become_text():
    backend = Tokenizer(
        models.BPE(
            vocab={c: n for n, c in enumerate(sorted(set("<|assistant>[INST] ab")))}, merges=[]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<|assistant|>"), AddedToken("[INST]"), AddedToken("  ")])
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    text = "a<|assistant|>b[INST]a  b"
    backend.encode_special_tokens = True
    assert set(backend.encode(text).ids) >= set(added.values())
    ids = flag_markers(backend).encode(text).ids
    assert added["<|assistant|>"] not in ids and added["[INST]"] not in ids
    assert added["  "] in ids  # plain text stays a token


def test_a_prepared_tokenizer_is_the_same(tmp_path):
    encoder = load_document_tokenizer(Path("models/tiny"))
    save_prepared_tokenizer(encoder, tmp_path / "tokenizer.json")
    prepared = prepared_tokenizer(tmp_path / "tokenizer.json")
    for name in ("bos_id", "eos_id", "vocab_size", "control_ids", "dtype"):
        assert getattr(prepared, name) == getattr(encoder, name)
    texts = ["".join(SNIPPETS), "plain text </s> and <s> more"]
    for one, other in zip(
        encoder.encode_documents(texts), prepared.encode_documents(texts), strict=True
    ):
        assert one.tolist() == other.tolist()
        assert one[0] == 1 and one[-1] == 2 and not set(one[1:-1].tolist()) & {1, 2}
