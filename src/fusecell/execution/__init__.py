"""How a call of a cell reaches the runner that computes it."""
