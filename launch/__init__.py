"""One thin main per verb."""
