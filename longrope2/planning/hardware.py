"""GPUs and machines as the planner sees them: data sheets, and rates expected to be sustained.

The kernel-efficiency model: matrix products run at ``gemm_tflops``, attention kernels at
``attention_tflops`` (of the FLOPs they really execute), everything elementwise at
``memory_efficiency`` of the memory bandwidth, messages at ``link_efficiency`` of the links. A100:
220 and 180 TFLOP/s with FlashAttention-2, assumptions of this project that put the paper's recipe
at a floor of 32.2 to 38.1 h (the paper took 54 h). H100 and H200: the A100's share of the peak for
matrix products, and one third of it for FlashAttention-2, which was made for the A100. None of
these rates has been measured by this project; replace them by measurements of your machine with
``hardware.gemm_tflops`` and its siblings.
"""

import re
from dataclasses import dataclass

from longrope2.config import MISSING
from longrope2.errors import ConfigError

# Dense bf16 peak by what the device's name contains, the first match counts; from NVIDIA's data
# sheets.
PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0,
    "H800": 989.0, "H20": 148.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "A40": 149.7,
    "A30": 165.0, "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71.2,
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: sustained rates; bandwidths from data sheets, one direction for links."""

    memory_gib: float
    peak_tflops: float
    gemm_tflops: float
    attention_tflops: float
    memory_gb_per_second: float
    node_link_gb_per_second: float


# By what torch.cuda.get_device_name contains.
GPUS = {
    "A100": Gpu(
        80,
        peak_tflops=PEAK_BF16_TFLOPS["A100"],
        gemm_tflops=220,
        attention_tflops=180,
        memory_gb_per_second=2039,
        node_link_gb_per_second=300,
    ),
    "H100": Gpu(
        80,
        peak_tflops=PEAK_BF16_TFLOPS["H100"],
        gemm_tflops=697,
        attention_tflops=330,
        memory_gb_per_second=3350,
        node_link_gb_per_second=450,
    ),
    "H200": Gpu(
        141,
        peak_tflops=PEAK_BF16_TFLOPS["H200"],
        gemm_tflops=697,
        attention_tflops=330,
        memory_gb_per_second=4800,
        node_link_gb_per_second=450,
    ),
}


@dataclass
class HardwareConfig:
    """The GPUs of a run. What is null comes from the table of GPU kinds."""

    gpu: str = MISSING
    """Kind of GPU: A100, H100 or H200."""
    num_gpus: int = 64
    """GPUs of the run."""
    gpus_per_node: int = 8
    """GPUs joined by NVLink."""
    network_gb_per_second: float = 25.0
    """Network bandwidth per GPU, one direction, GB/s: 25 is a 200 Gb/s adapter for each, 3.125 one
    adapter for eight."""
    host_link_gb_per_second: float = 20.0
    """Bandwidth to CPU memory per GPU with all GPUs of a node copying, GB/s; for
    ``training.offload_activations``."""
    memory_gib: float | None = None
    """Memory of one GPU, GiB."""
    usable_memory: float = 0.92
    """Share of the memory a layout may fill; the rest is for the CUDA context, NCCL and
    fragmentation."""
    gemm_tflops: float | None = None
    """Sustained TFLOP/s of matrix products."""
    attention_tflops: float | None = None
    """Sustained TFLOP/s of the attention kernel, on the FLOPs it executes."""
    memory_efficiency: float = 0.85
    """Share of the memory bandwidth that elementwise kernels reach."""
    link_efficiency: float = 0.7
    """Share of the links' bandwidth that collectives reach."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run, every number known; rates per second and GPU in FLOPs and bytes."""

    name: str
    num_gpus: int
    gpus_per_node: int
    usable_bytes: float
    peak_flops: float
    gemm_flops: float
    attention_flops: float
    memory_bytes: float
    node_link_bytes: float
    network_bytes: float
    host_link_bytes: float


def find_gpu(device_name: str) -> str | None:
    """Key of ``GPUS`` for a device name as CUDA gives it; None for a GPU without rates."""
    # An RTX A1000 is no A100.
    return next((kind for kind in GPUS if re.search(rf"\b{kind}\b", device_name)), None)


def make_machine(config: HardwareConfig, num_gpus: int | None = None) -> Machine:
    """The machine a configuration describes; ``num_gpus`` stands for its own number if given.

    Raises:
        ConfigError: an unknown GPU, or values out of range; all faults together.
    """
    if faults := _faults(config):
        raise ConfigError(faults)
    gpu = GPUS[config.gpu]
    memory_gib = config.memory_gib or gpu.memory_gib
    return Machine(
        name=config.gpu,
        num_gpus=num_gpus or config.num_gpus,
        gpus_per_node=config.gpus_per_node,
        usable_bytes=config.usable_memory * memory_gib * 2**30,
        peak_flops=gpu.peak_tflops * 1e12,
        gemm_flops=(config.gemm_tflops or gpu.gemm_tflops) * 1e12,
        attention_flops=(config.attention_tflops or gpu.attention_tflops) * 1e12,
        memory_bytes=config.memory_efficiency * gpu.memory_gb_per_second * 1e9,
        node_link_bytes=config.link_efficiency * gpu.node_link_gb_per_second * 1e9,
        network_bytes=config.link_efficiency * config.network_gb_per_second * 1e9,
        host_link_bytes=config.host_link_gb_per_second * 1e9,
    )


def _faults(config: HardwareConfig) -> list[str]:
    above_zero = ("network_gb_per_second", "host_link_gb_per_second", "memory_gib", "gemm_tflops",
                  "attention_tflops")  # fmt: skip
    shares = ("usable_memory", "memory_efficiency", "link_efficiency")
    rules = {
        **dict.fromkeys(("num_gpus", "gpus_per_node"), ("at least 1", lambda n: n >= 1)),
        **dict.fromkeys(above_zero, ("above 0", lambda n: n is None or n > 0)),
        **dict.fromkeys(shares, ("above 0 and at most 1", lambda n: 0 < n <= 1)),
    }
    faults = []
    if config.gpu not in GPUS:
        faults.append(f"hardware.gpu={config.gpu} is not known; use one of {', '.join(GPUS)}")
    return faults + [
        f"hardware.{name}={getattr(config, name)} must be {allowed}"
        for name, (allowed, is_allowed) in rules.items()
        if not is_allowed(getattr(config, name))
    ]
