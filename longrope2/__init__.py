"""LongRoPE2: a longer context window for a pre-trained RoPE model (arXiv 2502.20082)."""
