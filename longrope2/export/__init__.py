"""Checkpoints as Hugging Face folders that today's programs load."""

from longrope2.export.config import ExportConfig, ExportDtype, ExportRoot, check
from longrope2.export.gguf_file import GGUF_FILE, check_gguf, write_gguf
from longrope2.export.hugging_face import merged_config, write_hugging_face_folder
from longrope2.export.static_cost import StaticCost, measure_static_cost
from longrope2.export.variants import ExportVariant, variant_factors
from longrope2.export.verification import LOGIT_TOLERANCE, verify_export

__all__ = [
    "GGUF_FILE",
    "LOGIT_TOLERANCE",
    "ExportConfig",
    "ExportDtype",
    "ExportRoot",
    "ExportVariant",
    "StaticCost",
    "check",
    "check_gguf",
    "measure_static_cost",
    "merged_config",
    "variant_factors",
    "verify_export",
    "write_gguf",
    "write_hugging_face_folder",
]
