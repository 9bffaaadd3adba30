"""Run by a Python that has another version of transformers: what it makes of an export, as JSON.

Reads a list of requests from the file named first, writes a list of answers to the second. A
request names a folder and holds token ids to read (``prompts``) or to continue (``continue``),
texts to tokenize (``texts``), and messages (``messages``).
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = [answer(request) for request in requests]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)


def answer(request: dict) -> dict:
    folder, found = request["folder"], {"version": transformers.__version__}
    if "texts" in request:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found["tokens"] = [tokenizer(text).input_ids for text in request["texts"]]
        if "messages" in request:
            chat = tokenizer.apply_chat_template(request["messages"], tokenize=False)
            found["chat"] = chat
    if "prompts" in request or "continue" in request:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        found["distributions"] = [
            model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()
            for ids in request.get("prompts", [])
        ]
        found["generations"] = [generation(model, *asked) for asked in request.get("continue", [])]
    return found


def generation(model, ids: list[int], num_tokens: int) -> list[int]:
    """Ids generated greedily, all but EOS."""
    tokens = torch.tensor([ids])
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=[model.config.eos_token_id],
        eos_token_id=-1,
    )
    return made[0, len(ids) :].tolist()


if __name__ == "__main__":
    main()
