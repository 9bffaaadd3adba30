"""What a training takes before it is started: FLOPs, memory, time, and the best way to lay it out."""

from longrope2.planning.choice import Candidate, Choice, Refusal, choose_layout, cost_table, find_refusal
from longrope2.planning.hardware import GPUS, PEAK_BF16_TFLOPS, HardwareConfig, Machine, find_gpu, make_machine
from longrope2.planning.layout import Layout, RecomputePolicy, ZeroBuffers
from longrope2.planning.memory import MemoryPlan, load_bytes, plan_memory
from longrope2.planning.shape import ModelShape, Workload
from longrope2.planning.stages import forward_hours
from longrope2.planning.timing import RunTime, exchange_bytes, gather_bytes, plan_micro_step, plan_time

__all__ = [
    "GPUS",
    "PEAK_BF16_TFLOPS",
    "Candidate",
    "Choice",
    "HardwareConfig",
    "Layout",
    "Machine",
    "MemoryPlan",
    "ModelShape",
    "RecomputePolicy",
    "Refusal",
    "RunTime",
    "Workload",
    "ZeroBuffers",
    "choose_layout",
    "cost_table",
    "exchange_bytes",
    "find_gpu",
    "find_refusal",
    "forward_hours",
    "gather_bytes",
    "load_bytes",
    "make_machine",
    "plan_memory",
    "plan_micro_step",
    "plan_time",
]
