"""The tokenizer of an export starts texts as the training's documents started.

Training obeys ``model.document_start``; whoever loads the export calls its tokenizer. Where the two
differ (``none`` for a tokenizer that puts BOS in front, ``bos`` for one that does not), the
exported tokenizer's own rule is changed: the post-processor of tokenizer.json, and
``add_bos_token`` of tokenizer_config.json, which transformers and GGUF read.
"""

import json
from pathlib import Path
from typing import Any

from longrope2.config import DocumentStart
from longrope2.corpora.tokenizer import start_ids
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import write_text
from longrope2.model.loading import load_tokenizer

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_NOTED_BY_TRANSFORMERS_5 = ("backend", "is_local", "local_files_only")


def settings_for_all_readers(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.57 and 5 read alike.

    transformers 5 saves the class ``TokenizersBackend``, which 4.57 does not know, and further
    special tokens as a list under a name that holds a mapping in 4.57; both versions know the older
    class (by it 5 loads its own) and the older name. What 5 notes of the machine that saved is left
    out.
    """
    kept = {key: value for key, value in settings.items() if key not in _NOTED_BY_TRANSFORMERS_5}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(more := kept.get("extra_special_tokens"), list):
        del kept["extra_special_tokens"]
        older = kept.get("additional_special_tokens") or []
        kept["additional_special_tokens"] = [*older, *more]
    return kept


def start_as_trained(folder: Path, document_start: DocumentStart) -> None:
    """Make the tokenizer of an exported folder start texts as ``document_start`` says.

    ``auto`` is what it does by itself.

    Raises:
        ArtifactError: it goes on to do otherwise.
        DataError: ``bos``, and it names none.
    """
    if document_start is DocumentStart.auto:
        return
    tokenizer = load_tokenizer(folder)
    wanted = start_ids(tokenizer, document_start)
    if start_ids(tokenizer, DocumentStart.auto) == wanted:
        return
    fields = json.loads((folder / _TOKENIZER).read_text(encoding="utf-8"))
    changed = _without(fields["post_processor"], tokenizer.bos_token)
    if wanted:
        own = [] if changed is None else [changed]
        template = _bos_first(tokenizer.bos_token, tokenizer.bos_token_id)
        changed = {"type": "Sequence", "processors": [*own, template]} if own else template
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    _write(folder / _TOKENIZER, fields | {"post_processor": changed})
    _write(folder / _SETTINGS, settings | {"add_bos_token": bool(wanted)})
    if start_ids(load_tokenizer(folder), DocumentStart.auto) != wanted:
        raise ArtifactError(
            f"the model was trained with model.document_start={document_start.value}, and the "
            f"exported tokenizer ({settings.get('tokenizer_class')}) starts texts otherwise; "
            f"correct post_processor in the checkpoint's {_TOKENIZER}"
        )


def _without(processor: dict[str, Any] | None, bos: str) -> dict[str, Any] | None:
    """A post-processor that puts no BOS anywhere."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        inner = [_without(part, bos) for part in processor["processors"]]
        return processor | {"processors": [part for part in inner if part is not None]}
    if processor["type"] != "TemplateProcessing":
        return processor
    kept = {
        name: [piece for piece in processor[name] if not _is_special(piece, bos)]
        for name in ("single", "pair")
    }
    others = {key: value for key, value in processor["special_tokens"].items() if key != bos}
    return processor | kept | {"special_tokens": others}


def _is_special(piece: dict[str, Any], token: str) -> bool:
    return piece.get("SpecialToken", {}).get("id") == token


def _bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """A post-processor that puts BOS in front of every text."""

    def pieces(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": special,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
