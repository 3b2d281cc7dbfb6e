"""``Track``: what one cell did in one direction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Track"]


@dataclass(frozen=True)
class Track:
    """What one cell did in one direction.

    Attributes:
        kind: the cell's class.
        reverse: whether it ran from the end to the start.
        states: the names of its states.
        values: (T, N, size) tensors by name.
        find_before: finds ``before``, which few ask for.
        probes: what a backward leaves the gradient of each value in, by name.
        equation: its step, as the zoo writes it; "" for other cells.
        source: its step, as Python.
    """

    kind: str
    reverse: bool
    states: tuple[str, ...]
    values: Mapping[str, Tensor]
    find_before: Callable[[], Mapping[str, Tensor]]
    probes: Mapping[str, Tensor]
    equation: str = ""
    source: str = ""

    @functools.cached_property
    def before(self) -> Mapping[str, Tensor]:
        """The states each step began with, (T, N, size) by name."""
        return self.find_before()
