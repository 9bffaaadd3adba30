"""Adapters of the public corpora: read from the hub, from their URLs, or from a mirror."""
