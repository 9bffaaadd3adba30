"""Generation with the factor switch."""
