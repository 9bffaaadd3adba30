"""Run by a Python that has vLLM (on a CPU): what it makes of exported folders, as JSON.

Reads a list of requests from the file named first, writes a list of answers to the second. A
request names a folder and ``max_model_len`` (null is vLLM's default), and holds token ids to read
(``prompts``) or to continue (``continue``), and texts to tokenize (``texts``).
"""

import gc
import json
import os
import sys

# Its engine in this process: another would import everything once more for each request. And
# nothing compiled: that takes minutes, for a model of a million parameters.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}

import vllm
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

VOCAB_SIZE = 2048


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = [answer(request) for request in requests]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


def answer(request: dict) -> dict:
    model = LLM(
        request["folder"],
        max_model_len=request["max_model_len"],
        dtype="float32",
        enforce_eager=True,
        max_logprobs=VOCAB_SIZE,
        enable_prefix_caching=False,
    )
    found = {
        "version": vllm.__version__,
        "max_model_len": model.llm_engine.model_config.max_model_len,
        "distributions": [distribution(model, ids) for ids in request.get("prompts", [])],
        "generations": [generation(model, *asked) for asked in request.get("continue", [])],
        "tokens": [model.get_tokenizer().encode(text) for text in request.get("texts", [])],
    }
    del model
    gc.collect()
    return found


def distribution(model: LLM, ids: list[int]) -> dict:
    """Log-probability of every token behind a prompt, or the refusal."""
    settings = SamplingParams(max_tokens=1, temperature=0, logprobs=VOCAB_SIZE)
    try:
        made = model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)
    except VLLMValidationError as error:
        return {"error": str(error)}
    return {str(n): entry.logprob for n, entry in made[0].outputs[0].logprobs[0].items()}


def generation(model: LLM, ids: list[int], num_tokens: int) -> list[int]:
    """Ids generated greedily, all but EOS."""
    settings = SamplingParams(
        max_tokens=num_tokens, min_tokens=num_tokens, temperature=0, logit_bias={2: -100.0}
    )
    made = model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)
    return list(made[0].outputs[0].token_ids)


if __name__ == "__main__":
    main()
