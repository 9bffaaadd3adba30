"""Load a Hugging Face model; attach windowed rotary and attention, fused loss and norms."""
