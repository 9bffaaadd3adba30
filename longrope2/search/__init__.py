"""Search of rescale factors and of the critical dimension, guided by needle perplexity."""
