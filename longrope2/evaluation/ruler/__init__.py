"""RULER (arXiv 2404.06654): our own generators, and upstream's from a checkout with its draws."""
