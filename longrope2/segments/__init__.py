"""The on-disk contract between packing and all that reads tokens: segments, order, needles."""
