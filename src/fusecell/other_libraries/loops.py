"""What the subclasses of other libraries' layers share: their cells, kept from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.torchscript import refuse_script

__all__ = ["Loop", "draws"]


class Loop:
    """Base class of the mixins, each of which comes before a library's class in the order of method resolution.

    Attributes:
        overrides: the names of the library's methods that are run as scans.
        added_attributes: attributes that the library's class lacks, with their first values.
    """

    overrides: ClassVar[tuple[str, ...]] = ()
    added_attributes: ClassVar[Mapping[str, object]] = {"scanned_cells": None}
    scanned_cells: dict[int, tuple[tuple[Any, ...], Cell]] | None = None

    def cell_around(self, build: Callable[..., Cell], *parts: Any, index: int = 0) -> Cell:
        """Return the cell that ``build`` made of these parts at an earlier call, as calls are prepared for a cell.

        It is no submodule, so names and state_dicts stay the library's.
        """
        cells = self.scanned_cells = {} if self.scanned_cells is None else self.scanned_cells
        known = cells.get(index)
        if (
            known is None
            or len(known[0]) != len(parts)
            or any(a is not b for a, b in zip(known[0], parts, strict=True))
        ):
            known = cells[index] = parts, build(*parts)
        return known[1]

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script, which calls this first."""
        refuse_script(type(self).__name__, "its loop over time runs as a scan of fusecell's.")


def draws(module: nn.Module) -> bool:
    """Return whether a module draws random numbers in each step, which a scan would draw in another order."""
    dropouts = (nn.modules.dropout._DropoutNd, nn.RReLU)
    return any(isinstance(part, dropouts) and part.training and getattr(part, "p", 1) for part in module.modules())


def time_major(value: Tensor, batch_first: bool) -> Tensor:
    return value.transpose(0, 1) if batch_first else value


def is_plain(value: Any, rank: int) -> bool:
    """Return whether a value is a tensor of ``rank`` dimensions and at least one step, as a scan takes it."""
    return isinstance(value, torch.Tensor) and value.dim() == rank and 0 not in value.shape[:2]
