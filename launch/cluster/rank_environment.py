"""What a launcher puts into the environment of its ranks; what is set there already stays."""

import os

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # its name, and its name before 2.9


def set_rank_environment() -> None:
    """Defaults for this process and those that it starts; before torch is loaded.

    GPU memory in segments that grow: steps of both window kinds ask for blocks of many sizes, and
    segments of fixed size end in pieces that fit none of them.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
