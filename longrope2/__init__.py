"""LongRoPE2: extend the context window of a pre-trained RoPE model without losing its short window (arXiv 2502.20082)."""
