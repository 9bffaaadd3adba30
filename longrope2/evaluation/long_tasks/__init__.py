"""Long tasks of the paper's Table 3, with upstream's prompts, cuts and scores."""
