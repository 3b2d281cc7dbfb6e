"""Find the modules that one time step goes through: cells and recurrent layers, torch.nn's included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fusecell.cell import Cell
from fusecell.layers.stack import Stack

__all__ = ["named_recurrent_parts"]


def named_recurrent_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the recurrent modules in a module, each with the path to it.

    These are cells, drop-in layers and torch.nn's recurrent layers and cells. A Stack counts as its cells; any other
    wrapper counts as one cell, because its ``step`` is what runs. A module that appears twice is yielded twice.

    Arguments:
        module: a cell, a layer, or any module that contains some.
        name: the path to ``module`` itself.
    """
    if isinstance(module, Cell | nn.RNNBase | nn.RNNCellBase) and not isinstance(module, Stack):
        yield name, module
        return
    # Not named_children(), which leaves out a module's second appearance.
    for child, part in module._modules.items():
        if part is not None:
            yield from named_recurrent_parts(part, f"{name}.{child}" if name else child)
