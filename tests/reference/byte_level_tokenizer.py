"""A byte-level BPE tokenizer made as Llama 3's is: its splitting, its whole words, its BOS."""

import textwrap
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# As the published tokenizer.json has it, unlike llama.cpp's spelling of the same.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def save_llama3_style(folder: Path, pattern: str = LLAMA3_PATTERN, vocab_size: int = 1200) -> Path:
    """Train one on Python's own ``textwrap`` and words of other scripts, written to ``folder``.

    Its control tokens have the highest ids, as Llama 3's.
    """
    backend = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    more = ["Größe, naïve café 2024 1234567 'll 've", "日本語 한국어 مرحبا", "  \n\n\t x == y"] * 40
    backend.train_from_iterator([text, *more], trainer)
    control = [BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", TURN_END]
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A",
                pair=f"{BEGIN} $A {BEGIN} $B",
                special_tokens=[(BEGIN, backend.token_to_id(BEGIN))],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder
