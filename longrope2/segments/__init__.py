"""The on-disk contract between packing and everything that reads tokens: segments, their order, needle sets."""
