"""What cells with heads share: the check of their sizes."""

from __future__ import annotations

__all__ = ["head_size"]


def head_size(cell: str, features: int, heads: int) -> int:
    """Return the features of a head; raise ValueError unless heads divide all features."""
    if not isinstance(heads, int) or heads < 1 or features % heads:
        raise ValueError(f"{cell}: heads must divide the features, got {heads} heads for {features} features.")
    return features // heads
