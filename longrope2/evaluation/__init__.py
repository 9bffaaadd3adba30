"""Needle retrieval, perplexity and short-window retention of several models side by side, and the report of a run."""
