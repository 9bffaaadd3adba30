"""Checkpoints as Hugging Face folders that today's programs load."""

from longrope2.export.config import ExportConfig, ExportDtype, ExportRoot
from longrope2.export.hugging_face import merged_config, write_hugging_face_folder
from longrope2.export.verification import LOGIT_TOLERANCE, verify_export

__all__ = [
    "LOGIT_TOLERANCE",
    "ExportConfig",
    "ExportDtype",
    "ExportRoot",
    "merged_config",
    "verify_export",
    "write_hugging_face_folder",
]
