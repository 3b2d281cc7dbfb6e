"""``Track``: the recorded values of one cell in one direction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Track"]


@dataclass(frozen=True)
class Track:
    """The recorded values of one cell in one direction.

    Attributes:
        kind: the name of the cell's class.
        reverse: whether the cell ran from the last step to the first.
        states: the names of the cell's states.
        values: (T, N, ...) tensors by name.
        find_before: computes ``before``, on first use: most readers of a tape never need it.
        probes: zeros added to each value, by name, whose ``.grad`` a backward fills; empty without gradients.
        equation: the equations of the step: as in ``CELLS``, or the formulas of the cell's graph; "" if it has none.
        source: the step's Python source; "" where Python has none.
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
        """The states before each step, (T, N, size) by name."""
        return self.find_before()
