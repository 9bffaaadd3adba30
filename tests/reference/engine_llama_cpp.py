"""Run by a Python that has ``xllamacpp``: what llama.cpp makes of GGUF files, as JSON.

Reads a list of requests from the file named first, writes a list of answers to the second. A
request names a file and a context and holds token ids to continue (``prompts``), texts to tokenize
over HTTP (``texts``), or messages of a chat (``chat``).
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = [answer(request) for request in requests]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


def answer(request: dict) -> dict:
    server = start(request)
    return {
        "version": xllamacpp.BUILD_INFO,
        "distributions": [distribution(server, ids) for ids in request.get("prompts", [])],
        "generations": [generation(server, *asked) for asked in request.get("continue", [])],
        "tokens": [tokens(server, text) for text in request.get("texts", [])],
        "chat": post(server, "/v1/chat/completions", request["chat"])
        if "chat" in request
        else None,
        "context": get(server, "/props")["default_generation_settings"]["n_ctx"],
    }


def start(request: dict) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx, params.n_parallel = request.get("n_ctx", 0), request.get("n_parallel", 1)
    params.cpuparams.n_threads, params.n_gpu_layers = 1, 0
    params.warmup = params.cache_prompt = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 0
    return xllamacpp.Server(params)


def distribution(server: xllamacpp.Server, ids: list[int]) -> dict:
    """Log-probability of every token behind a prompt, or the server's refusal."""
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 100_000, "temperature": 0}
    found = server.handle_completions(asked)
    if "choices" not in found:
        return found
    chosen = found["choices"][0]["logprobs"]["content"][0]
    return {str(entry["id"]): entry["logprob"] for entry in chosen["top_logprobs"]}


def generation(server: xllamacpp.Server, ids: list[int], num_tokens: int) -> list[int]:
    """Ids generated greedily, whatever they are."""
    asked = {"prompt": ids, "n_predict": num_tokens, "n_probs": 1, "temperature": 0}
    asked["ignore_eos"] = True
    content = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return [entry["id"] for entry in content]


def tokens(server: xllamacpp.Server, text: str) -> dict[str, list[int]]:
    """As documents are read (``bare``), and as prompts are (``whole``)."""
    bare = {"content": text, "add_special": False, "parse_special": False}
    whole = {"content": text, "add_special": True, "parse_special": True}
    asked = {"bare": bare, "whole": whole}
    return {name: post(server, "/tokenize", body)["tokens"] for name, body in asked.items()}


def post(server: xllamacpp.Server, route: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    url = server.listening_address + route
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def get(server: xllamacpp.Server, route: str) -> dict:
    with urllib.request.urlopen(server.listening_address + route, timeout=120) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
