"""Two changes to a private copy of a tokenizer's backend; neither changes the ids of ordinary text.

``flag_markers``: added tokens that look like markers (``<|assistant|>``, ``[INST]``) but are not flagged special are
matched in text even when special tokens are not; flagged, such text becomes ordinary pieces. Added tokens of plain text
(runs of spaces, for example) stay what they are.

``split_at_space_markers``: LLaMA-2-family tokenizers (Llama 2, Phi-3, Mistral) hand a whole document to the merge loop
as one word, which makes them slow, and slower still on long documents (tokenizers issue 1449). A piece is made by
merges, and every merge makes a piece of the vocabulary. If no piece holds the space marker behind another character,
no merge ever joins the two sides of the place in front of a run of markers: documents can be split there, and words,
now short, are found in the backend's cache. The condition is checked on the vocabulary, and a test compares ids.
"""

import json
import re

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

__all__ = ["flag_markers", "split_at_space_markers"]

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
SPACE_MARKER = "▁"
WORDS = Regex(f"{SPACE_MARKER}+[^{SPACE_MARKER}]*|[^{SPACE_MARKER}]+")


def flag_markers(backend: Tokenizer) -> Tokenizer:
    """Flag added tokens that look like markers as special; changes and returns ``backend``."""
    added = backend.get_added_tokens_decoder().values()
    markers = [token for token in added if not token.special and MARKER.fullmatch(token.content.strip())]
    if markers:
        backend.add_special_tokens([_special(token) for token in markers])
    return backend


def split_at_space_markers(backend: Tokenizer) -> Tokenizer:
    """Let a LLaMA-2-family backend split words at spaces, where that provably keeps all ids; otherwise do nothing."""
    fields = json.loads(backend.to_str())
    if _marks_spaces_without_splitting(fields) and _no_piece_crosses(fields["model"]):
        split = pre_tokenizers.Split(WORDS, "isolated")
        first = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, split]) if first is not None else split
    return backend


def _special(token: AddedToken) -> AddedToken:
    """The same token, flagged."""
    return AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=True,
    )  # fmt: skip


def _marks_spaces_without_splitting(fields: dict) -> bool:
    """Whether spaces become the marker and the merge loop then sees whole documents."""
    before = fields["pre_tokenizer"]
    if before is None:
        normalizer = fields["normalizer"] or {}
        steps = normalizer.get("normalizers", [normalizer])
        return any(s.get("type") == "Replace" and s.get("content") == SPACE_MARKER for s in steps)
    return before["type"] == "Metaspace" and before["replacement"] == SPACE_MARKER and not before["split"]


def _no_piece_crosses(model: dict) -> bool:
    """Whether merges alone make the pieces and none of them has the marker behind another character."""
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    # With ignore_merges a whole word of the vocabulary is taken without merging: splitting could make such words.
    if model.get("ignore_merges") or model.get("dropout") or SPACE_MARKER not in model["vocab"]:
        return False
    return not any(SPACE_MARKER in piece.lstrip(SPACE_MARKER) for piece in model["vocab"])
