"""Rotary position embedding as pure maths: periods, rescaling methods, ``RescaleFactors``."""
