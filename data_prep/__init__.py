"""Corpora in, tagged segments out: the pack stage, ``python -m data_prep.pack``."""
