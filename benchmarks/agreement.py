"""Hold the numbers of contestants against one another before they are timed."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_agreement"]

_TOLERANCE = 1e-3
"""Of float32, relative to each result's largest number."""


def check_agreement(name: str, results: dict[str, Any], reference: str = "loop") -> None:
    """Raise SystemExit where a contestant's results differ from the reference's by more than rounding.

    Arguments:
        name: of the task.
        results: by contestant, lists of tensors or arrays.
    """
    expected = list(map(_array, results[reference]))
    for contestant, values in results.items():
        for value, other in zip(map(_array, values), expected, strict=True):
            apart = np.abs(value - other).max() / np.abs(other).max()
            if apart > _TOLERANCE:
                raise SystemExit(f"{name}: {contestant}'s numbers are apart from the {reference}'s by {apart:.1e}")


def _array(value: Any) -> Any:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)
