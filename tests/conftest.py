"""What holds for every test: no network, and one thread a process, as files run side by side."""

import os

# The hub is asked for nothing; a refused connection would be tried again for half a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
