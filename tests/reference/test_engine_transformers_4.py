"""transformers 4.57 on exports: tokens, both windows, generation across L0 and its stale cache.

``LONGROPE2_TRANSFORMERS_4_PYTHON`` names a Python that has it. Every model class and attention
scale: ``test_export_variants.py``.
"""

import json
import os
import shutil

import pytest
import torch
from byte_level_tokenizer import save_llama3_style
from engines import (
    ROUNDING,
    TINY,
    export,
    factors_for,
    our_continuation,
    run_worker,
    token_ids,
    window_of,
)
from transformers import AutoTokenizer

from longrope2.export.gguf_vocabulary import AWKWARD_TEXTS
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.variants import ExportVariant
from longrope2.rope.factors import Window

VARIABLE = "LONGROPE2_TRANSFORMERS_4_PYTHON"
PYTHON = os.environ.get(VARIABLE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason=f"{VARIABLE} names no Python that has transformers 4.57"
    ),
]
SHORT, LONG = Window.SHORT, Window.LONG
CASES = {
    ExportVariant.dual: {100: SHORT, 256: SHORT, 257: LONG, 600: LONG},
    ExportVariant.long_only: {100: LONG, 256: LONG, 257: LONG, 600: LONG},
    # Beyond L0 it goes on without a word.
    ExportVariant.short_only: {100: SHORT, 256: SHORT, 300: SHORT},
}


def test_both_windows_are_ours_and_the_length_decides(tmp_path):
    requests = [
        {
            "folder": str(export(tmp_path / variant.value, 256, variant)),
            "prompts": [token_ids(length) for length in windows],
        }
        for variant, windows in CASES.items()
    ]
    answers = run_worker(PYTHON, "engine_transformers.py", requests, tmp_path)
    for (variant, windows), answer in zip(CASES.items(), answers, strict=True):
        assert answer["version"].startswith("4.57")
        for (length, wanted), values in zip(windows.items(), answer["distributions"], strict=True):
            window, difference = window_of(torch.tensor(values), 256, token_ids(length))
            print(f"transformers {answer['version']} {variant.value} L0=256: {length} tokens, "
                  f"{window.value} window, {difference:.1e}")  # fmt: skip
            assert window is wanted and difference < ROUNDING


def test_generation_within_a_window_is_ours(tmp_path):
    """In either window; what crosses L0 with a cache is not (the card's warning)."""
    folders = {
        v: export(tmp_path / v.value, 256, v) for v in (ExportVariant.dual, ExportVariant.long_only)
    }
    asked = {
        ExportVariant.dual: [(200, 20), (257, 20), (246, 20)],
        ExportVariant.long_only: [(246, 20)],
    }
    requests = [
        {"folder": str(folders[v]), "continue": [[token_ids(n), more] for n, more in cases]}
        for v, cases in asked.items()
    ]
    dual, long_only = run_worker(PYTHON, "engine_transformers.py", requests, tmp_path)
    within, beyond, crossing = dual["generations"]
    assert within == our_continuation(256, token_ids(200), 20, SHORT)
    assert beyond == our_continuation(256, token_ids(257), 20, LONG)
    assert long_only["generations"][0] == our_continuation(256, token_ids(246), 20, LONG)
    before = our_continuation(256, token_ids(246), 11, SHORT)
    assert crossing[:11] == before
    exact = our_continuation(256, token_ids(246) + before, 9, LONG)
    print("transformers 4.57 dual, 246 tokens and 20 more:", crossing[11:], "exact:", exact)


@pytest.mark.parametrize("name", ["miniature", "llama3_style"])
def test_tokenizers_of_exports_load_and_read_the_same(name, tmp_path):
    """One was saved by transformers 5 with further special tokens."""
    model = TINY
    if name == "llama3_style":
        model = tmp_path / "model"
        shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("token*"))
        made = AutoTokenizer.from_pretrained(save_llama3_style(tmp_path / "made"))
        made.add_special_tokens({"additional_special_tokens": ["<one>"]})
        made.save_pretrained(model)
        saved = json.loads((model / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "TokenizersBackend"
    folder = tmp_path / "export"
    write_hugging_face_folder(model, factors_for(128), folder, torch.float32)
    texts = [*AWKWARD_TEXTS, "a<one> b<|eot_id|> c"]
    messages = [{"role": "user", "content": "x"}]
    request = {"folder": str(folder), "texts": texts}
    if name == "llama3_style":
        request["messages"] = messages
    (answer,) = run_worker(PYTHON, "engine_transformers.py", [request], tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert answer["tokens"] == [theirs(text).input_ids for text in texts]
    if name == "llama3_style":
        assert answer["chat"] == theirs.apply_chat_template(messages, tokenize=False)
