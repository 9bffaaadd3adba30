"""``python -m launch.doctor``: look at a machine, its nodes or a RoPE before computing."""
