"""Mixed-window training on DeepSpeed: configuration, step, checkpoints, run."""

from longrope2.training.config import TrainingConfig, TrainRoot, check
from longrope2.training.run import TrainingPlan, make_plan, train

__all__ = ["TrainRoot", "TrainingConfig", "TrainingPlan", "check", "make_plan", "train"]
