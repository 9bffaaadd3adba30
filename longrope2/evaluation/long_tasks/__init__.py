"""Long tasks of the paper's Table 3: LongBench, InfiniteBench and LOFT, with upstream's prompts, cuts and scores."""
