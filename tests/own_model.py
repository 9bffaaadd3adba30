"""Your own model and documents, made on the spot: three heads, window 256, names with spaces."""

import json
import pydoc_data.topics
import random
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
WINDOW = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def make_model(folder: Path) -> Path:
    """A Llama of random weights with the miniature's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=2048,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copy(ROOT / "models" / "tiny" / name, folder / name)
    return folder


def make_documents(folder: Path, short: int, long: int, long_words: tuple[int, ...]) -> Path:
    """``short`` documents of up to 60 words and ``long`` ones, a third of each in every format."""
    words = "\n\n".join(pydoc_data.topics.topics.values()).split(" ")
    rng = random.Random(0)
    sizes = [rng.choice((30, 40, 60)) for _ in range(short)]
    sizes += [rng.choice(long_words) for _ in range(long)]
    starts = [rng.randrange(len(words) - size) for size in sizes]
    texts = [
        " ".join(words[start : start + size]) for start, size in zip(starts, sizes, strict=True)
    ]
    for name in ("plain texts", "notes of mine", "records 2024"):
        (folder / name).mkdir(parents=True)
    for number, text in enumerate(texts[0::3]):
        (folder / "plain texts" / f"text {number}.txt").write_text(text, encoding="utf-8")
    for number, text in enumerate(texts[1::3]):
        (folder / "notes of mine" / f"note {number}.md").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in texts[2::3]]
    (folder / "records 2024" / "all.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
