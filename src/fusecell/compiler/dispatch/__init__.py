"""Which program a call gets: compiled, cached, repeated, or the Python loop."""
