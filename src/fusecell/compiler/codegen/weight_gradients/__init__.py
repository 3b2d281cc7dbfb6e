"""Sums over all rows and steps: the gradients of weights."""
