"""What a training takes, before it is started: memory, time, and the best layout."""
