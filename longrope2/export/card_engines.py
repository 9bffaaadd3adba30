"""Which engines read an exported folder correctly, and by which rule: a section of its card.

Every row says how it is known: ``tested`` rows by ``tests/reference/test_engine_*.py`` (of the
project, on exports of its miniature; ``docs/serving.md`` has the figures), the others by the public
source of the version named. A statement that gets a test moves from one to the other here.
"""

from typing import Any

from longrope2.export.variants import ExportVariant

TRANSFORMERS_4, VLLM, SGLANG = "4.57.6", "0.32.0", "0.5.23"
LLAMA_CPP = "October 2026"
"""Versions that the rows speak of; llama.cpp's as in the wheel ``xllamacpp`` 2026.10.11549."""
CONTEXT_STEP = 256
"""Tokens to a multiple of which llama.cpp rounds its context up."""
GGUF_CLASSES = ("llama", "mistral")
"""``model_type`` of what becomes a GGUF file."""
_BY_SOURCE = "by its source"
_HEAD = """\
| engine | reads it correctly | what to set | known how |
|---|---|---|---|
"""
_KNOWN_HOW = """\
`tested`: the project that wrote this folder ran that version on folders of this kind and compared \
its log-probabilities
and tokens (its `docs/serving.md`). `by its source`: read in the code of that version, not run. \
This folder itself was run in
transformers {transformers_version} only."""
_CACHE_DROPPING_TYPES = ("phi3", "phi4_multimodal")
_STALE_CACHE = """\
When generation crosses {original_len:,} tokens, transformers keeps \
the key/value cache that was computed under the
  short window's RoPE (for this model class). {mixed} \
Start with a prompt that is beyond
  {original_len:,} tokens already, stay within, or run the prompt again \
after the crossing, as `launch.generate` does."""
_DROPPED_CACHE = """\
When generation crosses {original_len:,} tokens, transformers drops the key/value cache of this \
model class once and reads
  the text again; it counts padding as text there, so keep rows of a batch equally long."""
_BATCH = """\
transformers switches once per forward pass, **for the whole batch**: \
one sequence beyond {original_len:,} tokens
  moves all others of its batch to the long window's RoPE. \
Put short and long sequences into separate batches."""
_SGLANG_POSITION = """\
SGLang {sglang} rotates the token at position {original_len:,} as that at position 0 when no other \
token of its batch is further
  ({by_source})."""
_TABLES = """\
vLLM and SGLang keep the cosines and sines in the number format of the weights (by their sources): \
beside bfloat16 weights
  they are coarse at long positions."""


def engines_section(
    config: dict[str, Any],
    variant: ExportVariant,
    lengths: dict[str, int],
    *,
    unscaled: bool,
    trained: bool,
    transformers_version: str,
) -> str:
    """The table of engines and the notes below it.

    Args:
        config: The exported config.json.
        variant: What the folder holds.
        lengths: ``original_len`` and ``target_len``, tokens.
        unscaled: Whether config.json asks for no rescaling of RoPE.
        trained: Whether the weights were trained with the factors.
        transformers_version: That wrote and checked the folder.
    """
    words = {**lengths, "sglang": SGLANG, "by_source": _BY_SOURCE}
    rows = [("`launch.generate` of the project", "yes, each sequence for itself", "", "tested")]
    if variant is not ExportVariant.dual:
        rows = []
    rows += _transformers_rows(config, variant, transformers_version)
    rows += _static_rows(variant, lengths["original_len"], lengths["target_len"])
    notes = [llama_cpp_note(variant, lengths["original_len"], lengths["target_len"])]
    if config["model_type"] not in GGUF_CLASSES:
        written = f"`export.gguf=true` writes {' and '.join(GGUF_CLASSES)} classes only"
        rows[-1], notes = ("llama.cpp", "not known", written, "not tried"), []
    if variant is ExportVariant.dual:
        drops_cache = config["model_type"] in _CACHE_DROPPING_TYPES
        mixed = (
            "That is not the model that was trained." if trained else "That mixes the two RoPEs."
        )
        cache = (_DROPPED_CACHE if drops_cache else _STALE_CACHE).format(**words, mixed=mixed)
        notes = [_BATCH.format(**words), cache, *notes]
    if not unscaled:
        notes += [_SGLANG_POSITION.format(**words), _TABLES]
    known = _KNOWN_HOW.format(transformers_version=transformers_version)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    listed = "\n".join(f"- {note}" for note in notes)
    return f"{_HEAD}{table}\n\n{listed}\n\n{known}"


def _transformers_rows(
    config: dict[str, Any], variant: ExportVariant, version: str
) -> list[tuple[str, str, str, str]]:
    tested = f"tested: {TRANSFORMERS_4}; this folder: {version}"
    if variant is ExportVariant.short_only:
        limit = "texts of at most L0 tokens; it goes on beyond without a word"
        return [("transformers 4.57 and later", "yes", limit, tested)]
    is_dual = variant is ExportVariant.dual
    limits = "yes, with two limits below" if is_dual else "yes, and batches may mix lengths"
    other = "the `long_only` or `short_only` variant" if is_dual else ""
    if config["model_type"] == "phi3":
        refused = "no: its Phi-3 config refuses the attention factor, and this folder with it"
        return [
            ("transformers 5 and later", limits, "", f"this folder: {version}"),
            ("transformers before 5", refused, "", f"tested: {TRANSFORMERS_4}"),
        ]
    rows = [("transformers 4.57 and later", limits, "", tested)]
    if is_dual:
        never = "no: Llama classes never switch"
        return [*rows, ("transformers before 4.57", never, other, _BY_SOURCE)]
    return [*rows, ("transformers 4.46 to 4.56", "yes", "", _BY_SOURCE)]


def _static_rows(
    variant: ExportVariant, original_len: int, target_len: int
) -> list[tuple[str, str, str, str]]:
    """Engines that choose once."""
    vllm, sglang = f"tested: {VLLM} on a CPU", f"{_BY_SOURCE}, {SGLANG}"
    llama_cpp = f"tested: {LLAMA_CPP}"
    file = "`model.gguf` of an export with `export.gguf=true`, `-c`: below"
    if variant is ExportVariant.dual:
        lengths = (
            f"`--max-model-len` up to {original_len} (its default): the original RoPE; above, up "
            f"to {target_len}: the rescaled one"
        )
        moved = "no: one long request moves the whole running batch to the rescaled RoPE"
        other = "the `long_only` or `short_only` variant"
        return [
            ("vLLM", "one window, chosen at load", lengths, vllm),
            ("SGLang", moved, other, sglang),
            ("llama.cpp", "one window, chosen at load", file, llama_cpp),
        ]
    if variant is ExportVariant.long_only:
        lengths = f"`--max-model-len {target_len}` (its default is {original_len})"
        context = f"`--context-length {target_len}`"
        return [
            ("vLLM", "yes", lengths, vllm),
            ("SGLang", "yes, but for one position: below", context, sglang),
            ("llama.cpp", "yes", file, llama_cpp),
        ]
    return [
        ("vLLM", "yes", f"nothing; its default is {original_len}", vllm),
        ("SGLang", "yes", f"a context of at most {original_len}", sglang),
        ("llama.cpp", "yes", file, llama_cpp),
    ]


def llama_cpp_note(variant: ExportVariant, original_len: int, target_len: int) -> str:
    """By which rule llama.cpp takes its window, as a sentence or three."""
    context = (
        "llama.cpp chooses once, by the context of a sequence: `-c`, divided by `-np` where that "
        f"is given, rounded up to a multiple of {CONTEXT_STEP}"
    )
    if variant is ExportVariant.short_only:
        return (
            f"{context}. Its server cuts it to {original_len:,} and refuses longer texts (tested); "
            f"a program on its library may go on beyond with the original RoPE, without a word "
            f"({_BY_SOURCE})."
        )
    default = f"without `-c` it is the whole window, {target_len:,}"
    if variant is ExportVariant.long_only:
        return f"{context}; {default}. This file holds one RoPE, so any context reads alike."
    largest = original_len // CONTEXT_STEP * CONTEXT_STEP
    if largest == 0:
        return (
            f"{context}; {default}. **No context is as small as {original_len:,} tokens: "
            "`model.gguf` is always read with the rescaled RoPE.** Take the `short_only` variant's "
            "file for short texts."
        )
    cut = ""
    if largest < original_len:
        cut = (
            f" {original_len:,} is no multiple of {CONTEXT_STEP}: texts of {largest + 1:,} to "
            f"{original_len:,} tokens need a context that is read with the rescaled one."
        )
    return (
        f"{context}. Up to {largest:,}: the original RoPE; above: the rescaled one, for short "
        f"texts too; {default}.{cut}"
    )
