"""Measurements that need a GPU; each runs at a tiny size on a CPU, which shows that it works and nothing else."""
