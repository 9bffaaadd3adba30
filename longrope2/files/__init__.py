"""Products on disk: atomic writes, hashes, manifests, and the names of the run folder."""
