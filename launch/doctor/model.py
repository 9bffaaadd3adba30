"""What ``launch.doctor`` says of a model: whether it can be extended, and at what cost.

Reads config.json and the tokenizer; the parity figures are those of a cut of the model with random
weights. Whole models are compared once more when they are loaded.
"""

from pathlib import Path

from longrope2.config import ModelConfig
from longrope2.corpora.tokenizer import DocumentTokenizer, load_document_tokenizer
from longrope2.export.hugging_face import check_exportable
from longrope2.model.folder import NO_WINDOW, merged_config_file
from longrope2.model.given import GivenModel, active_window, look_at
from longrope2.model.loading import check_model, rope_geometry
from longrope2.model.shape import ASSUMED_LONG_SHARE, ModelShape, Workload
from longrope2.planning.choice import choose_layout
from longrope2.planning.hardware import HardwareConfig, make_machine
from longrope2.rope.frequencies import RopeGeometry, ten_period_index, theoretical_critical_index
from longrope2.training.config import ZeroConfig, with_room_for_largest
from longrope2.training.machine import zero_buffers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PLANNED_TOKENS, _STEP_TOKENS = 10**9, 2**22
_PLANNED_GPU, _PLANNED_GPUS = "A100", 64


def examine(config_file: Path, model: ModelConfig, target_len: int) -> dict[str, str]:
    """What -> found, for a model that is supported.

    Raises:
        ArtifactError: it is not; says why, and the way out where there is one.
    """
    folder = merged_config_file(config_file, model, target_len).parent
    geometry, given = rope_geometry(folder, model.original_len), look_at(folder)
    parity, shape = check_model(folder, model.original_len), ModelShape.from_folder(folder)
    check_exportable(folder, model.original_len, target_len)
    rotary, arrangement = geometry.rotary_dim, given.rotary.arrangement.value
    critical, tens = theoretical_critical_index(geometry), ten_period_index(geometry)
    return {
        "supported": f"yes: {given.config.model_type}, {shape.parameters / 1e9:.3g} B parameters, "
        f"window {model.original_len:,} -> {target_len:,}; an export loads in transformers",
        "geometry": f"{rotary} rotated channels ({arrangement}), base {geometry.rope_base:g}",
        "critical dimensions": f"cosine index {critical} of {rotary // 2} turns once in the window "
        f"(dimension {2 * critical}), {tens} ten times",
        "attention": _attention(given, shape),
        "logits": str(given.head_rule),
        "tokenizer rule": _tokenizer(folder, model),
        "parity": f"{parity} (of a cut, against transformers, relative)",
        "cost": _cost(shape, geometry, target_len),
    }


def _attention(given: GivenModel, shape: ModelShape) -> str:
    """Heads, and what became of a sliding window."""
    heads = f"{shape.num_heads} heads, {shape.num_kv_heads} of keys and values"
    window = active_window(given.config)
    if window is None:
        return f"{heads}; full"
    what = "sliding window dropped" if window == NO_WINDOW else f"sliding window {window:,}"
    return f"{heads}; {what}, full within the target"


def _tokenizer(folder: Path, model: ModelConfig) -> str:
    """Special tokens between documents.

    Raises:
        DataError: there is one, and it cannot be used with this model.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return "none here"
    encoder = load_document_tokenizer(folder, model.document_start)
    start = "nothing" if encoder.bos_id is None else _named(encoder, encoder.bos_id)
    return f"{start} starts a document, {_named(encoder, encoder.eos_id)} ends it"


def _named(encoder: DocumentTokenizer, token_id: int) -> str:
    return f"{encoder.decode([token_id])} ({token_id})"


def _cost(shape: ModelShape, geometry: RopeGeometry, target_len: int) -> str:
    """The planner's best layout for a billion tokens, in a line."""
    workload = Workload(
        target_len=target_len,
        step_tokens=target_len * max(1, _STEP_TOKENS // target_len),
        total_tokens=_PLANNED_TOKENS,
        long_share=ASSUMED_LONG_SHARE,
        short_document_tokens=geometry.original_len / 2,
    )
    machine = make_machine(HardwareConfig(gpu=_PLANNED_GPU, num_gpus=_PLANNED_GPUS))
    zero = zero_buffers(with_room_for_largest(ZeroConfig(), shape))
    best = choose_layout(shape, workload, machine, zero, (1,)).best
    where = f"{_PLANNED_TOKENS / 1e9:g} B tokens on {_PLANNED_GPUS} {_PLANNED_GPU}"
    if best is None:
        return f"{where}: no layout fits; launch.plan says why"
    gpu_hours, gib = best.time.gpu_hours, best.memory.peak / 2**30
    return (
        f"{where}: {best.time.hours:.2g} h = {gpu_hours:,.0f} GPU-hours, {gib:.0f} GiB each "
        f"({best.layout.describe()}); launch.plan says more"
    )
