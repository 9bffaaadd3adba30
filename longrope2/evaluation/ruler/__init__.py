"""RULER (arXiv 2404.06654): our own generators, or NVIDIA's prompts and defects from a checkout; metrics; a store."""
