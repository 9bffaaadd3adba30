"""Checkpoints as Hugging Face folders that today's programs load."""
