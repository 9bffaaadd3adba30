"""Measurements that need a GPU; a tiny size on a CPU shows that each works."""
