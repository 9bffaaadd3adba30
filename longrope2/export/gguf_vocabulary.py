"""A tokenizer as the ``tokenizer.ggml.*`` keys of a GGUF file, and proof that they say the same.

All is asked of the exported tokenizer as transformers loads it, not of the base model's files:
what it puts around a text, whether it begins with a space, its pieces and merges. Every key that
llama.cpp would else default is written. Before anything is written, and again from the finished
file, the tokens of ``AWKWARD_TEXTS`` are compared (``llama_cpp_tokens.py``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError
from longrope2.export.llama_cpp_tokens import SPACE_MARKER, SPLITTINGS, LlamaCppTokenizer, TokenKind
from longrope2.model.loading import load_tokenizer

AWKWARD_TEXTS = (
    "a",
    "Hello world, it's 2024-05-17; I'LL pay $1234567.89!",
    " leading, trailing ",
    "two  three   and     more spaces",
    "def f(x):\n    return {'a': x[0]}  # ok\n\n\n\tpass\n",
    "line\r\nnext\r\n\r\n \n  \n end",
    "\t\ttabs\tand \t mixed  \t",
    "naïve café, e\u0301 decomposed, \ufb01 ligature, \uff21\uff22 wide",
    "Größe ΣΑΣ İstanbul ſs",
    "日本語のテキスト、中文字符。한국어",
    "مرحبا بالعالم नमस्ते ไทย",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301\u200d\u00a0\u3000\u2009x",
    "𒀀𒁀 \U0001f9ec ∀x∈ℝ: x²≥0 ½",
    "don't we'Re they'LL 'tis ''s a''b",
    "http://a.b/c?d=e&f=%20#g <b>x</b> [INST] <|user|> </s> <s>",
    "x" * 30 + "111 22 3\u0660\u0661" + "=" * 20,
)
"""Compared one by one: blanks, line ends, digits, signs, contractions, scripts, emoji, markup."""
_MOST_NAMED = 8
# transformers' word and the file's, spelt as llama.cpp spells it.
_SPECIALS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"


def tokenizer_keys(
    folder: Path, vocab_size: int, pretokenizer: str | None = None
) -> dict[str, Any]:
    """The keys of a model folder's tokenizer, checked against it.

    Args:
        folder: Holds the tokenizer, and config.json or generation_config.json for ids that end a
            generation.
        vocab_size: Rows of the embedding; ids beyond the tokenizer's are unused.
        pretokenizer: llama.cpp's name for how a byte-level BPE splits text; None finds it.

    Raises:
        ArtifactError: a tokenizer of another kind, or one whose tokens llama.cpp would not make;
            says for which text.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtifactError(f"export.gguf=true: {folder} has no fast tokenizer (tokenizer.json)")
    fields = json.loads(backend.to_str())
    keys = _vocabulary(fields, vocab_size)
    keys |= _around_a_text(tokenizer) | _special_ids(tokenizer, folder)
    if keys["tokenizer.ggml.model"] == _SENTENCEPIECE:
        if pretokenizer is not None:
            raise ArtifactError(
                f"export.gguf_pretokenizer={pretokenizer} is for byte-level BPE tokenizers; the "
                f"one in {folder} is of SentencePiece's kind: leave it out"
            )
        first = backend.encode("a", add_special_tokens=False).tokens[0]
        keys["tokenizer.ggml.add_space_prefix"] = first.startswith(SPACE_MARKER)
        _require_same_tokens(keys, tokenizer)
        return keys
    keys["tokenizer.ggml.add_space_prefix"] = False
    return keys | {"tokenizer.ggml.pre": _pretokenizer(keys, tokenizer, pretokenizer)}


def check_read_back(fields: Mapping[str, Any], folder: Path, path: Path) -> list[str]:
    """Compare the tokens of a finished file with those of the exported tokenizer in ``folder``.

    Returns:
        Notes for the user: added tokens inside a text around which llama.cpp reads otherwise.

    Raises:
        ArtifactError: a text without added tokens is read otherwise.
    """
    tokenizer = load_tokenizer(folder)
    _require_same_tokens(fields, tokenizer, f"{path}: ")
    ours = LlamaCppTokenizer(fields)
    tokenizer.split_special_tokens = False
    added = tokenizer.get_added_vocab()
    texts = {token: f"a {token} b{token}c" for token in sorted(added, key=added.__getitem__)}
    different = [t for t, text in texts.items() if ours.encode(text) != tokenizer(text).input_ids]
    if not different:
        return []
    named = ", ".join([*different[:_MOST_NAMED], *["..."][: len(different) - _MOST_NAMED]])
    return [
        f"{path.name}: llama.cpp reads blanks around {named} inside a text otherwise "
        "than transformers; send chats as token ids where that matters"
    ]


def _vocabulary(fields: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Pieces, kinds, scores or merges; the kind of tokenizer is told by its byte tokens."""
    model = fields["model"]
    if model["type"] != "BPE":
        raise ArtifactError(
            f"export.gguf=true: {model['type']} tokenizers are not supported, BPE ones are "
            "(SentencePiece's with byte fallback, and byte-level)"
        )
    by_id = {number: (token, TokenKind.NORMAL) for token, number in model["vocab"].items()}
    is_sentencepiece = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    if is_sentencepiece:
        for byte in range(256):
            token = f"<0x{byte:02X}>"
            by_id[model["vocab"][token]] = token, TokenKind.BYTE
    elif not _is_byte_level(fields):
        raise ArtifactError(
            "export.gguf=true: this BPE tokenizer has neither SentencePiece's byte tokens (<0x00> "
            "to <0xFF>) nor a byte-level pre-tokenizer; llama.cpp has no place for its kind"
        )
    for added in fields["added_tokens"]:
        kind = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
        is_unknown = added["content"] == model.get("unk_token")
        by_id[added["id"]] = added["content"], TokenKind.UNKNOWN if is_unknown else kind
    # A vocabulary may leave ids out, and an embedding may have more rows.
    entries = [
        by_id.get(number, (f"[PAD{number}]", TokenKind.UNUSED)) for number in range(vocab_size)
    ]
    tokens = [token for token, _ in entries]
    _refuse_doubles(tokens)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": _SENTENCEPIECE if is_sentencepiece else _BYTE_LEVEL,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for _, kind in entries],
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if is_sentencepiece:
        return keys | {"tokenizer.ggml.scores": _scores(entries, merges)}
    return keys | {"tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}


def _is_byte_level(fields: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer turns text into GPT-2's letters for bytes."""
    before = fields["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _refuse_doubles(tokens: list[str]) -> None:
    """llama.cpp refuses a file in which a token stands twice."""
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if token in seen:
            raise ArtifactError(
                f"export.gguf=true: the token {token!r} has the ids {seen[token]} and {number}; "
                "llama.cpp loads no file with such a vocabulary"
            )
        seen[token] = number


def _scores(entries: list[tuple[str, TokenKind]], merges: list[tuple[str, ...]]) -> list[float]:
    """Pieces in the order in which they are merged; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    last = len(merges)
    return [-float(ranks.get(token, last)) for token, _ in entries]


def _around_a_text(tokenizer: Any) -> dict[str, Any]:
    """Whether the tokenizer's own call puts BOS in front and EOS behind."""
    inside = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            if [bos] * adds_bos + inside + [eos] * adds_eos == whole:
                return {
                    "tokenizer.ggml.add_bos_token": adds_bos,
                    "tokenizer.ggml.add_eos_token": adds_eos,
                    "tokenizer.ggml.add_sep_token": False,
                }
    raise ArtifactError(
        f"export.gguf=true: this tokenizer makes {whole} of a text whose tokens are {inside}; "
        f"llama.cpp can put BOS ({bos}) in front and EOS ({eos}) behind, nothing else"
    )


def _special_ids(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Special ids, the chat template, and a second token that ends a generation."""
    keys: dict[str, Any] = {}
    for name, key in _SPECIALS.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if isinstance(number, int):
            keys[f"tokenizer.ggml.{key}_token_id"] = number
    eos = keys.get("tokenizer.ggml.eos_token_id")
    others = [number for number in _ending_ids(folder) if number != eos]
    # Else llama.cpp takes whichever of its known names it meets first.
    keys["tokenizer.ggml.eot_token_id"] = others[0] if others else eos
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return {key: value for key, value in keys.items() if value is not None}


def _ending_ids(folder: Path) -> list[int]:
    """What ends a generation in transformers."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            given = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if given is not None:
                return given if isinstance(given, list) else [given]
    return []


def _pretokenizer(keys: dict[str, Any], tokenizer: Any, given: str | None) -> str:
    """llama.cpp's name for how a byte-level BPE splits text: the given one, or the first that fits.

    Raises:
        ArtifactError: it is not known here, or it gives other tokens; or none fits.
    """
    if given is not None and given not in SPLITTINGS:
        raise ArtifactError(
            f"export.gguf_pretokenizer={given} is not one whose splitting is known here; those "
            f"are {', '.join(SPLITTINGS)}"
        )
    if given is not None:
        _require_same_tokens(keys | {"tokenizer.ggml.pre": given}, tokenizer)
        return given
    for name in SPLITTINGS:
        if _first_difference(keys | {"tokenizer.ggml.pre": name}, tokenizer) is None:
            return name
    raise ArtifactError(
        f"export.gguf=true: none of llama.cpp's splittings known here ({', '.join(SPLITTINGS)}) "
        "gives this tokenizer's tokens; use an engine that reads the Hugging Face folder"
    )


def _require_same_tokens(keys: Mapping[str, Any], tokenizer: Any, where: str = "") -> None:
    """Refuse keys of which llama.cpp would make other tokens."""
    difference = _first_difference(keys, tokenizer)
    if difference is not None:
        text, found, wanted = difference
        pre = keys.get("tokenizer.ggml.pre")
        cause = "" if pre is None else f" with export.gguf_pretokenizer={pre}"
        raise ArtifactError(
            f"{where}llama.cpp would read {text!r} as {found}{cause}, the model's tokenizer reads "
            f"it as {wanted}; nothing was exported"
        )


def _first_difference(
    keys: Mapping[str, Any], tokenizer: Any
) -> tuple[str, list[int], list[int]] | None:
    """A text of ``AWKWARD_TEXTS`` that llama.cpp reads otherwise, with both readings; or None."""
    ours, added = LlamaCppTokenizer(keys), tokenizer.get_added_vocab()
    for text in AWKWARD_TEXTS:
        # Around added tokens blanks may differ (``check_read_back``), in text alone they may not.
        spelt_out = any(token in text for token in added)
        for parse_special in (False,) if spelt_out else (False, True):
            tokenizer.split_special_tokens = not parse_special
            found = ours.encode(text, parse_special=parse_special)
            wanted = tokenizer(text).input_ids
            if found != wanted:
                return text, found, wanted
    return None
