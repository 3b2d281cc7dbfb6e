"""Gradients of weights: sums over all rows of all steps of a^T b, or of b alone, in row panels of 512."""
