"""What the tests of RULER share: texts in the official layouts, tokenizers, and an oracle."""

import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from longrope2.evaluation.ruler.config import RulerConfig, RulerMode

SUBJECTS = ("box", "lamp", "door", "cart", "hat", "boat")
FILLER = (
    "time person year way day thing man world life hand part child eye place work week case "
    "point number group problem fact night home water room mother area money story"
).split()
__all__ = ["RulerMode"]
GPT2_SPLIT = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LLAMA3_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def essays(num_words=30_000, seed=0):
    """Two texts of plain sentences."""
    rng = random.Random(seed)
    sentences = []
    while sum(map(len, sentences)) < num_words:
        sentences.append([*rng.choices(FILLER, k=rng.randint(3, 14))])
    text = " ".join(" ".join(words).capitalize() + "." for words in sentences)
    half = len(text) // 2
    return [text[:half], text[half:]]


def filler(rng):
    return " ".join(rng.choices(FILLER, k=rng.randint(15, 90)))


def squad(num_articles=60, seed=1):
    """SQuAD's layout: ``The colour of the box 3-7 is hue3x7.``."""
    rng = random.Random(seed)
    articles = []
    for article in range(num_articles):
        paragraphs = []
        for number in range(10):
            name = f"{rng.choice(SUBJECTS)} {article}-{number}"
            hue = f"hue{article}x{number}"
            before, after = filler(rng).capitalize(), filler(rng).capitalize()
            text = f"{before}. The colour of the {name} is {hue}. {after}."
            answers = [{"text": hue, "answer_start": 0}, {"text": hue.upper(), "answer_start": 0}]
            asked = {
                "question": f"What is the colour of the {name}?",
                "is_impossible": False,
                "answers": answers,
                "id": name,
            }
            never = {
                "question": "And of the sky?",
                "is_impossible": True,
                "answers": [],
                "id": f"{name} sky",
            }
            paragraphs.append({"context": text, "qas": [asked, never]})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpotqa(num_entries=60, seed=2):
    """HotpotQA's layout: two supporting documents among ten."""
    rng = random.Random(seed)
    entries = []
    for entry in range(num_entries):
        names = [f"{rng.choice(SUBJECTS)} {entry}-{number}" for number in range(10)]
        context = [
            [name, [f"{filler(rng).capitalize()}.", f" The {name} is of no colour."]]
            for name in names
        ]
        first, second = rng.sample(range(10), 2)
        context[first][1][1] = f" The {names[first]} belongs to {names[second]}."
        context[second][1][1] = f" The colour of the {names[second]} is hue{entry}."
        entries.append(
            {
                "_id": str(entry),
                "question": f"What is the colour of what the {names[first]} belongs to?",
                "answer": f"hue{entry}",
                "context": context,
                "type": "bridge",
                "level": "hard",
                "supporting_facts": [[names[first], 1], [names[second], 1]],
            }
        )
    return entries


def question_files(folder: Path, num_articles=60, num_entries=60):
    """Paths of both, written as JSON."""
    paths = {
        "squad": folder / "dev-v2.0.json",
        "hotpotqa": folder / "hotpot_dev_distractor_v1.json",
    }
    paths["squad"].write_text(json.dumps(squad(num_articles)), encoding="utf-8")
    paths["hotpotqa"].write_text(json.dumps(hotpotqa(num_entries)), encoding="utf-8")
    return {key: str(path) for key, path in paths.items()}


def config(questions, **fields):
    return RulerConfig(**{"num_samples": 3, **questions, **fields})


def byte_level(split, *, bos=True):
    """A byte-level BPE tokenizer with the pre-tokenizer of GPT-2 or Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return trained(tokenizer, bos=bos)


def across_words():
    """A tokenizer whose tokens span words: joined pieces have other ids than the whole text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^.\n]+|[.\n]"), "isolated")
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    return trained(tokenizer, alphabet=alphabet)


def trained(tokenizer, *, bos=True, alphabet=None):
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(essays(3000), trainer)
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Sequence):
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    if bos:
        start = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>"
    )


def start_of(tokenizer):
    """What the tokenizer itself puts in front of a text."""
    first = tokenizer.encode("x", add_special_tokens=False)[0]
    whole = tokenizer.encode("x")
    return whole[: whole.index(first)]


def prompt_text(tokenizer, sample):
    """The prompt without what starts it, decoded."""
    return tokenizer.decode(sample.prompt_T.tolist()[len(start_of(tokenizer)) :])


def oracle(task, text):
    """Reads a prompt of our wording and answers it."""
    if task.startswith("niah"):
        return needle_oracle(text)
    if task == "vt":
        return chain_oracle(text)
    if task in ("cwe", "fwe"):
        entries = re.split(r"List:|Text:", text)[-1].split(" (End of the")[0].split()
        counts = Counter(word for word in entries if re.fullmatch("[a-z]+", word))
        return " ".join(word for word, _ in counts.most_common(10 if task == "cwe" else 3))
    return colour_oracle(text)


def needle_oracle(text):
    asked = re.search(r"Which special magic \w+ for (.*) does the text mention\?", text).group(1)
    keys = re.split(", | and ", asked)
    return " ".join(
        value
        for key in keys
        for value in re.findall(rf"magic \w+ for {re.escape(key)} is: ([0-9a-f-]+)\.", text)
    )


def chain_oracle(text):
    problem = text.split("Keep track of them.\n")[-1]
    value = re.search(r"which variables hold the value (\d+)\?", problem).group(1)
    holding = []
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", problem):
        if source == value or source in holding:
            holding.append(name)
    return ", ".join(holding)


def colour_oracle(text):
    asked = re.search(r"Question: What is the colour of (what )?the (.*?)( belongs to)?\?", text)
    name = asked.group(2)
    if asked.group(1):
        name = re.search(rf"The {name} belongs to (\w+ [\d-]+)\.", text).group(1)
    return re.search(rf"The colour of the {name} is (hue\w+)\.", text).group(1)
