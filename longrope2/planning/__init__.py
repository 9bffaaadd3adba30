"""What a training takes before it is started: FLOPs, memory, time, and the best way to lay it out."""
