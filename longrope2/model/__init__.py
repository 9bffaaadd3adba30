"""Load a Hugging Face model and attach the windowed rotary, the windowed attention, the fused loss and norms."""
