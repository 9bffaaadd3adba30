"""Mixed-window training on DeepSpeed: configuration, step, checkpoints, run."""

from longrope2.training.config import TrainingConfig, TrainRoot, check
from longrope2.training.heartbeat import HANG_EXIT_CODE
from longrope2.training.machine import check_machine
from longrope2.training.plan import CHANGEABLE_TRAINING_KEYS, TrainingPlan, make_plan
from longrope2.training.preview import preview_plan
from longrope2.training.run import RunEnd, train
from longrope2.training.stopping import REQUEUE_EXIT_CODE

__all__ = [
    "CHANGEABLE_TRAINING_KEYS",
    "HANG_EXIT_CODE",
    "REQUEUE_EXIT_CODE",
    "RunEnd",
    "TrainRoot",
    "TrainingConfig",
    "TrainingPlan",
    "check",
    "check_machine",
    "make_plan",
    "preview_plan",
    "train",
]
