"""The two windows; by itself, so that whoever only names them imports no torch."""

from enum import StrEnum


class Window(StrEnum):
    """Which RoPE a sequence is computed with: the original (short) or the rescaled one (long)."""

    SHORT = "short"
    LONG = "long"
