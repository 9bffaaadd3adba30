"""Settings of an export, and three ways to say an extended model in a config.json.

vLLM and SGLang do not read ``attention_factor``: they multiply cosine and sine by sqrt(1 + ln s /
ln L0) in both windows unless ``short_mscale`` and ``long_mscale`` stand in the RoPE keys.
transformers warns about the two and ignores them. So all three are written and say the same.
"""

import importlib.util
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope2.config import StageConfig, target_faults
from longrope2.corpora.config import CorpusConfig
from longrope2.errors import ConfigError, FactorsError
from longrope2.evaluation.before import missing_checkpoint, trained_faults
from longrope2.files.artifacts import UNTRAINED_FOLDER, product_folder
from longrope2.model.factors_source import RopeConfig, factors_faults, missing_factors
from longrope2.model.folder import ModelLook
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.hf_config import UNSCALED_TYPE, to_hf_config

if TYPE_CHECKING:
    import torch

_RESCALING_KEYS = ("rope_scaling", "original_max_position_embeddings")
_UNSCALED_KEYS = ("rope_theta", "partial_rotary_factor")


class ExportVariant(Enum):
    """Which windows' RoPE an exported folder holds."""

    dual = "dual"
    """Both; the engine switches at L0 (transformers does)."""
    long_only = "long_only"
    """The rescaled RoPE at every length, for engines that choose once."""
    short_only = "short_only"
    """The original RoPE and window, for engines that choose once."""

    @property
    def folder_name(self) -> str:
        """Folder inside ``5_exports``."""
        return "hugging_face" if self is ExportVariant.dual else f"hugging_face_{self.value}"


class ExportDtype(Enum):
    """Number format of the exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The format in torch."""
        import torch  # loads for seconds; a configuration is checked without it

        return torch.float32 if self is ExportDtype.fp32 else torch.bfloat16


class ExportVerify(Enum):
    """How a written folder is compared with the checkpoint before it is published."""

    full = "full"
    """Logits of the whole model in float32, on texts that end on either side of L0."""
    quick = "quick"
    """Every stored weight; and logits of its first layers on few tokens at those positions."""


@dataclass
class ExportConfig:
    """What is exported, and how."""

    trained: bool = True
    """False exports the base model's weights with the factors of ``rope``, without a training,
    into ``5_exports/untrained``."""
    checkpoint: str | None = None
    """Folder of a finished checkpoint; null is the run's own ``3_checkpoints/final``."""
    dtype: ExportDtype = ExportDtype.fp32
    """Number format of the weights: fp32 is what was trained, bf16 half the size (and what most
    base models are published in). RoPE tables are always float32."""
    variants: list[ExportVariant] = field(default_factory=lambda: [ExportVariant.dual])
    """Folders to write: ``dual`` (both windows, for transformers), ``long_only`` and
    ``short_only`` (one window each, for engines that choose once at load, such as vLLM). They
    share their weight files."""
    gguf: bool = False
    """Also write ``model.gguf`` into each folder, with both factor tensors, for llama.cpp (Llama
    classes; needs the package ``gguf``). llama.cpp chooses the factors once, by the size of its
    context."""
    gguf_pretokenizer: str | None = None
    """llama.cpp's name for the splitting rule of a byte-level BPE tokenizer (llama-bpe, qwen2,
    tekken, smollm, gpt-2); null takes the first of them that gives the model's own tokens of a list
    of awkward texts. A SentencePiece tokenizer needs none."""
    verify: ExportVerify = ExportVerify.full
    """How a folder is compared with the checkpoint before it is published. full: logits of the
    whole model, float32 (4 bytes a parameter of memory), on texts of L0 tokens and one more. quick:
    every stored weight, and logits of the first layers on 64 tokens at the positions around L0;
    memory of one weight file and those layers."""
    cost_windows: int = 8
    """Short texts, of L0 tokens at most, on which the cost of a static choice is measured for
    the model cards (perplexity of held-out text of the run's corpus, or ``corpus=``, under either
    RoPE); 0 leaves it unmeasured, and the cards say so."""


@dataclass
class ExportRoot(StageConfig):
    """Configuration of ``launch.export``."""

    export: ExportConfig = field(default_factory=ExportConfig)
    rope: RopeConfig | None = None
    """Factors of an export without training; null is ``searched``, the run's own search. A
    trained model has its own."""
    corpus: CorpusConfig | None = None
    """Held-out text that ``export.cost_windows`` are taken from; null: the corpus of the run's own
    segments. Without either the cost is not measured."""


def export_folder(config: ExportRoot) -> Path:
    """The product folder; that of untrained weights lies inside, with a manifest of its own."""
    exports = product_folder(config.run.folder, "exports")
    return exports if config.export.trained else exports / UNTRAINED_FOLDER


def final_folders(config: ExportRoot) -> list[Path]:
    """Where each wanted variant will stand."""
    return [export_folder(config) / variant.folder_name for variant in config.export.variants]


def known_faults(config: ExportRoot, look: ModelLook) -> list[str]:
    """All faults of an export that are known without loading anything.

    What is not there yet is none in a dry run (``missing_input``).

    Args:
        config: What was given.
        look: At the base model, by ``look_before``.
    """
    config, export = look.with_its_window(config), config.export
    faults = [*look.faults, *settings_faults(config)]
    if export.trained:
        return faults + trained_faults(config, "export.checkpoint", export.checkpoint)
    rope, run_folder = config.rope or RopeConfig(), config.run.folder_with("factors")
    found = factors_faults(
        rope, run_folder, config.target_len, missing_is_a_fault=not config.dry_run
    )
    return faults + found + look.missing_files()


def missing_input(config: ExportRoot) -> str | None:
    """The fault of a checkpoint or factors that are not there yet; names who makes them."""
    if config.export.trained:
        return missing_checkpoint(config, "export.checkpoint", config.export.checkpoint)
    return missing_factors(config.rope or RopeConfig(), config.run.folder_with("factors"))


def check(config: ExportRoot) -> None:
    """Refuse values outside their range.

    Raises:
        ConfigError: all faults together, each naming its key.
    """
    if faults := settings_faults(config):
        raise ConfigError(faults)


def settings_faults(config: ExportRoot) -> list[str]:
    """Faults of the settings by themselves."""
    given = [variant.value for variant in config.export.variants]
    no_gguf = config.export.gguf and importlib.util.find_spec("gguf") is None
    cost_windows = config.export.cost_windows
    faults = {
        f"export.variants={given} must name one or more of dual, long_only, short_only, "
        "each once": not given or len(set(given)) != len(given),
        "export.gguf=true needs the gguf package; run `pip install gguf`": no_gguf,
        f"export.cost_windows={cost_windows} must be 0 or more": cost_windows < 0,
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    return found + _source_faults(config)


def _source_faults(config: ExportRoot) -> list[str]:
    """Settings that ask for trained and for untrained weights at once."""
    rope, checkpoint = config.rope, config.export.checkpoint
    if config.export.trained:
        if rope is None:
            return []
        return [
            f"rope.method={rope.method.value} is given, but a trained model has the factors of its "
            "training; leave rope out, or set export.trained=false to export the base model's "
            "weights with it"
        ]
    faults = target_faults(config.model, config.target_len, extends=True)
    if checkpoint is not None:
        faults.append(
            f"export.checkpoint={checkpoint} is given with export.trained=false, which exports the "
            "weights of model.path; leave one of them out"
        )
    if config.model.from_scratch:
        faults.append(
            "export.trained=false exports the weights of model.path; set model.from_scratch=false"
        )
    return faults


def variant_factors(factors: RescaleFactors, variant: ExportVariant) -> RescaleFactors:
    """What a folder of this variant applies in either window.

    Raises:
        FactorsError: ``dual`` with two attention scales, which no Hugging Face config can say.
    """
    if variant is ExportVariant.long_only:
        return factors.in_both_windows()
    if variant is ExportVariant.short_only:
        return replace(
            factors,
            factors=factors.window_factors(Window.SHORT),
            long_attention_scale=factors.short_attention_scale,
            target_len=factors.geometry.original_len,
            critical_index=None,
            method="none" if factors.short_factors is None else factors.method,
        )
    if factors.short_attention_scale != factors.long_attention_scale:
        raise FactorsError(
            f"attention scale is {factors.short_attention_scale} in the short window and "
            f"{factors.long_attention_scale} in the long one ({factors.method}); a Hugging Face "
            "longrope config holds a single attention_factor for both windows. Set "
            "export.variants=[long_only,short_only], which hold one window each, or use factors "
            "with one attention scale (longrope2 has 1 in both)"
        )
    return factors


def variant_keys(
    config: dict[str, Any], factors: RescaleFactors, variant: ExportVariant
) -> dict[str, Any]:
    """A base model's config.json with the RoPE of ``variant_factors``; the rest as it is."""
    from longrope2.model.given import class_config  # loads for seconds

    kept = {key: value for key, value in config.items() if key not in _RESCALING_KEYS}
    own = class_config(config)
    head_dim = config.get("head_dim") or getattr(own, "head_dim", None)
    if head_dim is None:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        if hasattr(own, "head_dim"):  # null, with which Mixtral's class refuses every RoPE scaling
            kept["head_dim"] = head_dim
    keys = to_hf_config(factors, head_dim)
    unscaled = factors.method == "none" and factors.long_attention_scale == 1
    if variant is ExportVariant.short_only and unscaled:
        # The model as it was: no engine needs to know any rescaling to read it.
        parameters = {name: keys[name] for name in _UNSCALED_KEYS if name in keys}
        own = {"max_position_embeddings": factors.target_len, **parameters}
        parameters["rope_type"] = UNSCALED_TYPE
        return {**kept, **own, "rope_parameters": parameters}
    magnitudes = {
        "short_mscale": factors.short_attention_scale,
        "long_mscale": factors.long_attention_scale,
    }
    for layout in ("rope_scaling", "rope_parameters"):
        keys[layout] = {**keys[layout], **magnitudes}
    return {**kept, **keys}


def full_attention_keys(config: dict[str, Any], target_len: int) -> dict[str, Any]:
    """Changes to a config.json whose sliding window contradicts the attention of the training.

    A window of ``target_len`` is full attention. Layer types stay: some classes rotate their
    windowed layers only. Asked of the model class, whose default may be a window that config.json
    does not mention (Mistral).
    """
    from longrope2.model.given import active_window, class_config  # loads for seconds

    own = class_config(config)
    return {} if own is None or active_window(own) is None else {"sliding_window": target_len}
