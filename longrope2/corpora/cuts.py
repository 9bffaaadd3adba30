r"""Where a text can be cut so that the ids of its pieces are those of the whole.

Encoding takes about 120 bytes a character for a moment: 15 GB for a record of 128 MiB. Tokenizers
split a text into words before anything else, and a word's ids depend on the word alone. A text may
therefore be cut where every rule that splits it does so whatever stands around, and where no rule
looks across. That is shown here for two families; any other tokenizer gets its texts whole.

*Byte-level BPE* (GPT-2, LLaMA 3, Qwen, SmolLM2, ...): between a printable ASCII character and a
space, and between an ASCII letter or digit and a line feed. In the regular expressions of
``WORD_PATTERNS`` no alternative matches a space behind another character, or a line feed behind a
letter or digit, so a word ends there; the next one begins with the space or line feed, and the only
look-ahead, ``\s+(?!\S)``, ends in front of a character that stands on the same side of the cut.
Steps of one character each (digits, punctuation) and normal forms of Unicode do not reach across
either: a space and a line feed begin no composition and end any.

*SentencePiece-like BPE* (LLaMA 2, Mistral, Phi-3), where ``tokenizer.split_at_space_markers`` has
proven that words may be split in front of a space: there. Where the normalizer puts a marker in
front of every text, it stands for the space, which is left out.

Tokens that are found in the text before it is split may contain such a place or eat the space
behind them; then nothing is cut.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

SPACE_MARKER = "▁"
# What split_at_space_markers adds.
WORDS_AT_MARKERS = f"{SPACE_MARKER}+[^{SPACE_MARKER}]*|[^{SPACE_MARKER}]+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_REST}"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_REST}"
)
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_REST}"
)
# By who brought them: GPT-2, LLaMA 3 (cl100k), Qwen 2, GPT-4o (o200k), Mistral's Tekken.
WORD_PATTERNS = frozenset(
    [
        _GPT2,
        _LLAMA3,
        _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
        _CASED,
        _CASED.replace(r"\p{N}{1,3}", r"\p{N}").replace(f"{_CONTRACTIONS}?", ""),
    ]
)
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
STEPS_OF_CHARACTERS = ("Digits", "Punctuation")
# The end of a cut's left side; something stands behind the space, so no piece is empty.
_BETWEEN_WORDS = re.compile(r"[!-~](?= .)|[0-9A-Za-z](?=\n)", re.DOTALL)
_BEFORE_SPACES = re.compile(r"[!-~](?= .)", re.DOTALL)


@dataclass(frozen=True)
class Cuts:
    """How texts of one tokenizer are cut."""

    place: re.Pattern[str]
    """Matches the character in front of a cut."""
    leaves_out_space: bool
    """Whether the space behind a cut belongs to neither piece."""

    def pieces(self, text: str, characters: int) -> Iterator[str]:
        """Pieces of ``characters`` or somewhat more, up to the next place for a cut."""
        first = 0
        while (found := self.place.search(text, first + characters - 1)) is not None:
            yield text[first : found.end()]
            first = found.end() + self.leaves_out_space
        yield text[first:]


def cuts_of(backend: Tokenizer) -> Cuts | None:
    """Where texts of a prepared backend may be cut; None where that is not known.

    A prepared backend takes special tokens in a text for text (``encode_special_tokens``) and has
    been through ``split_at_space_markers``.
    """
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return None
    normalizer, steps = state_of(backend.normalizer), _steps(state_of(backend.pre_tokenizer))
    added = backend.get_added_tokens_decoder().values()
    if any(_BETWEEN_WORDS.search(token.content) for token in added):
        return None
    found_in_text = [token for token in added if not token.special]
    if normalizer is None or normalizer["type"] in NORMAL_FORMS:
        if _splits_words(steps) and not any(token.rstrip for token in found_in_text):
            # With a prefix space every piece gets one that does not begin with a space.
            prefixes = any(step.get("add_prefix_space") for step in steps)
            place = _BEFORE_SPACES if prefixes else _BETWEEN_WORDS
            return Cuts(place, leaves_out_space=False)
    if not found_in_text and steps and _pattern(steps[-1]) == WORDS_AT_MARKERS:
        if normalizer is None and _marks_spaces(steps[:-1]):
            return Cuts(_BEFORE_SPACES, leaves_out_space=False)
        if len(steps) == 1 and _is_marker_for_space(normalizer):
            return Cuts(_BEFORE_SPACES, leaves_out_space=False)
        if len(steps) == 1 and _puts_marker_in_front(normalizer):
            return Cuts(_BEFORE_SPACES, leaves_out_space=True)
    return None


def state_of(component: Any) -> dict[str, Any] | None:
    """Settings of a normalizer or pre-tokenizer, as in ``tokenizer.json``."""
    return None if component is None else json.loads(component.__getstate__())


def _steps(before: dict[str, Any] | None) -> list[dict[str, Any]]:
    if before is None:
        return []
    return before["pretokenizers"] if before["type"] == "Sequence" else [before]


def _pattern(step: dict[str, Any]) -> str | None:
    """Regular expression by which a step splits, every match and what is between them a word."""
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        return None
    # "Removed" and inverted: the matches are the words, and nothing is between them.
    is_isolated = step["behavior"] == "Isolated" and not step["invert"]
    is_matched = step["behavior"] == "Removed" and step["invert"]
    return step["pattern"]["Regex"] if is_isolated or is_matched else None


def _splits_words(steps: list[dict[str, Any]]) -> bool:
    """Whether one of the steps surely splits at the places, and none of the others looks across."""
    splits = False
    for step in steps:
        is_byte_level = step["type"] == "ByteLevel"
        if (is_byte_level and step["use_regex"]) or _pattern(step) in WORD_PATTERNS:
            splits = True
        elif not is_byte_level and step["type"] not in STEPS_OF_CHARACTERS:
            return False
    return splits


def _marks_spaces(steps: list[dict[str, Any]]) -> bool:
    return len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0]["split"]


def _is_marker_for_space(normalizer: dict[str, Any] | None) -> bool:
    match normalizer:
        case {"type": "Replace", "pattern": {"String": " "}, "content": content}:
            return content == SPACE_MARKER
    return False


def _puts_marker_in_front(normalizer: dict[str, Any] | None) -> bool:
    """A marker in front of every text, and in place of every space, and nothing else."""
    match normalizer:
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": marker}, second]}:
            return marker == SPACE_MARKER and _is_marker_for_space(second)
    return False
