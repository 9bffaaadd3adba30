"""What a run takes, counted operator by operator: memory, FLOPs, collectives and host reads.

Both modes see every operator under them, autograd's and DeepSpeed's too, on whatever thread; they
count real tensors and torch's fake ones alike.
"""

import traceback
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_SCALAR = torch.ops.aten._local_scalar_dense.default
# Whose lines a host read is blamed on.
_OWNERS = ("longrope2/", "deepspeed/", "torch/optim/")
# A collective is named by its function in torch.distributed.
_NAMES = {
    "_allgather_base_": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor",
    "reduce_scatter_": "reduce_scatter",
    "allgather_": "all_gather",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all_single",
    "broadcast_": "broadcast",
}


class LiveStorages(TorchDispatchMode):
    """Bytes of all storages made inside, now and at the peak.

    Resident memory is too noisy for models of tests, and a fake tensor has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.now -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


@dataclass
class Phase:
    """What one phase took on this rank."""

    name: str
    peak_bytes: int = 0
    """Most bytes alive at once, what earlier phases left included."""
    product_flops: int = 0
    attention_flops: int = 0
    """Of whole squares, as torch counts them: twice the causal half."""
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Calls, by name and number of ranks in the group."""
    collective_bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Of the larger side of each call: what a rank gathers, or what it gives to be reduced."""
    host_reads: Counter[str] = field(default_factory=Counter)
    """Numbers that the host waits for, by the line that asks."""


class Meter(LiveStorages):
    """Counts by phase, and answers every host read of a fake number: 1, and False of a truth value.

    Truth values are asked for of faults: whether a number is infinite, whether gradients overflow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[Phase] = []
        self.begin("start")

    def begin(self, name: str) -> None:
        """Count for a new phase from now on."""
        self.close()
        self.phases.append(Phase(name))
        self.peak = self.now

    def close(self) -> None:
        """Write down the peak of the present phase."""
        if self.phases:
            self.phases[-1].peak_bytes = self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, phase = kwargs or {}, self.phases[-1]
        if torch.Tag.data_dependent_output in func.tags:
            phase.host_reads[_asking_line()] += 1
            if not isinstance(args[0], FakeTensor):
                return func(*args, **kwargs)
            return _answer(args[0].dtype) if func is _SCALAR else True  # equal, all close
        if func.namespace == "c10d":
            self._count_collective(func.name().split("::")[1].split(".")[0], (args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            with unset_fake_temporarily():  # documents' lengths are read
                flops = formula(*args, **kwargs, out_val=result)
            if "attn" in func.name() or "attention" in func.name():
                phase.attention_flops += flops
            else:
                phase.product_flops += flops
        return result

    def _count_collective(self, operation: str, arguments: Any) -> None:
        leaves = tree_leaves(arguments)
        sizes = [_group_size(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = _NAMES.get(operation, operation), max(sizes, default=0)
        self.phases[-1].collectives[key] += 1
        num_bytes = max((t.numel() * t.element_size() for t in tensors), default=0)
        self.phases[-1].collective_bytes[key] += num_bytes


def _answer(dtype: torch.dtype) -> float | int | bool:
    """What a number that is not there is taken for."""
    if dtype is torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _group_size(handle: torch.ScriptObject) -> int:
    """Ranks of a process group in an operator's arguments; 0 for any other object."""
    try:
        return dist.ProcessGroup.unbox(handle).size()
    except RuntimeError:
        return 0


def _asking_line() -> str:
    """The innermost line of this project, DeepSpeed or the optimizer that waits for a number."""
    for frame in reversed(traceback.extract_stack()):
        for owner in _OWNERS:
            if owner in frame.filename and frame.filename != __file__:
                return f"{owner}{frame.filename.rpartition(owner)[2]}:{frame.lineno} {frame.line}"
    return "elsewhere"
