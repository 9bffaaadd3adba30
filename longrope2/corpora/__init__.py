"""Documents in: corpora and their adapters, tokenizer, needles, and the held-out split."""
