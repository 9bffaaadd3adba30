"""Mixed-window training on DeepSpeed: configuration, step, checkpoints, run."""
