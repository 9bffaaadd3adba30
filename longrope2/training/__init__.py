"""Mixed-window training on DeepSpeed: configuration, step, checkpoints, run."""

from longrope2.training.config import TrainingConfig, TrainRoot, check
from longrope2.training.processes import world_size_from_environment
from longrope2.training.run import TrainingPlan, make_plan, train

__all__ = ["TrainRoot", "TrainingConfig", "TrainingPlan", "check", "make_plan", "train", "world_size_from_environment"]
