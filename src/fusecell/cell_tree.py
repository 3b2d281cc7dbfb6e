"""Find the cells inside a module, those of drop-in layers included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from fusecell.cell import Cell

__all__ = ["HasCells", "iter_cells"]


@runtime_checkable
class HasCells(Protocol):
    """A layer that builds its cells on request and keeps none of them as a submodule, as GRU, LSTM and RNN do."""

    def leaf_cells(self) -> Sequence[tuple[int, int, Cell]]:
        """Build the layer's cells as (layer, direction, cell), bottom first, around its present weights."""
        ...


def iter_cells(module: nn.Module) -> Iterator[Cell]:
    """Iterate over all cells in a module, in the order of ``module.modules()``.

    A wrapper or Stack comes before the cells inside it. A drop-in layer yields new cells around its weights each time.

    Example:
        >>> import torch, fusecell as fc
        >>> from fusecell.cell_tree import iter_cells
        >>> model = torch.nn.ModuleList([fc.Recurrent(fc.Zoneout(fc.GRUCell(5, 10))), fc.LSTM(10, 8)])
        >>> [type(cell).__name__ for cell in iter_cells(model)]
        ['Zoneout', 'GRUCell', 'LSTMCell']

    Arguments:
        module: a cell, a layer, or any module that contains some.
    """
    for part in module.modules():
        if isinstance(part, Cell):
            yield part
        elif isinstance(part, HasCells):
            yield from (cell for *_, cell in part.leaf_cells())
