"""ZeRO-3 from the first parameter on: each rank keeps its share of a parameter as soon as it exists.

Without this DeepSpeed shards a model that every rank has loaded whole. The sharding itself is DeepSpeed's own
(``deepspeed.zero.Init``): rank 0's values are broadcast, every rank keeps its part.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["RankShares"]


class RankShares:
    """Takes the parameters of one model, in the same order on all ranks."""

    def __init__(self, settings: dict[str, Any], mpu: ModuleType | None, dtype: torch.dtype) -> None:
        """Prepare for the engine that will own the parameters.

        Args:
            settings: DeepSpeed's dictionary of that engine.
            mpu: Its sequence-parallel groups.
            dtype: Number format of the parameters.
        """
        self._settings, self._mpu, self._dtype = settings, mpu, dtype
        self._first: Any = None

    def take(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share of rank 0's values; the rest is released. Every rank calls this."""
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        from deepspeed.runtime.zero import Init  # by now loaded with DS_ACCELERATOR set (processes.py)
        from deepspeed.utils import groups

        holder = nn.Module()
        holder.register_parameter("first", parameter)
        Init(
            module=holder,
            config_dict_or_path=self._settings,
            dtype=self._dtype,
            mpu=self._mpu,
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        self._first = parameter
