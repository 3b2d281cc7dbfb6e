"""Copy a module with some of its tensors replaced, to run a step again in the backward as it was in the forward.

``torch.func.functional_call`` swaps the tensors of the module itself, which other threads would see, and knows
parameters and buffers only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from fusecell.attribute_paths import with_tensor
from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["rebound"]


def rebound(cell: Cell, tensors: Mapping[str, Tensor], reset: State) -> Cell:
    """Return a copy of a cell with some of its tensors replaced; it shares everything else with the cell.

    Arguments:
        tensors: by the path of the attribute, ``"inp.weight"``.
        reset: the initial state of the copy, which resets go back to; the cell's own where empty.
    """
    result = _copied(cell, {})
    assert isinstance(result, Cell)
    for path, value in tensors.items():
        with_tensor(result, path, value)
    if reset:
        # Python finds an instance's attribute before its class's method.
        result.__dict__["initial_state"] = lambda batch_size, *, dtype=None, device=None: reset
    return result


def _copied(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Copy a module and its submodules, but no tensor; a submodule that is there twice stays one.

    Arguments:
        copies: those made so far, by the id of the original.
    """
    if id(module) not in copies:
        result = copies[id(module)] = copy.copy(module)
        # nn.Module's own copy shares these tables with the module it copies.
        for table in ("_parameters", "_buffers", "_modules"):
            result.__dict__[table] = dict(module.__dict__[table])
        for name, part in result._modules.items():
            if part is not None:
                result._modules[name] = _copied(part, copies)
    return copies[id(module)]
