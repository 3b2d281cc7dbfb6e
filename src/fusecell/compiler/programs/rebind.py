"""A copy of a cell that holds other tensors: what a step is run again with, long after its cell may have changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.execution.options import State

__all__ = ["bound"]


def bound(cell: Cell, tensors: Mapping[str, Tensor], start: State) -> Cell:
    """A cell that computes as ``cell`` does, with some of its tensors replaced.

    Arguments:
        cell: it stays as it is; the copy shares everything with it but what is replaced.
        tensors: by the path of the attribute, ``"inp.weight"``.
        start: the state that resets go back to; the cell's own where empty.
    """
    made = _copied(cell, {})
    assert isinstance(made, Cell)
    for path, value in tensors.items():
        owner, _, name = path.rpartition(".")
        _replace(made.get_submodule(owner), name, value)
    if start:
        # An instance's attribute stands before its class's method.
        made.__dict__["initial_state"] = lambda batch_size, *, dtype=None, device=None: start
    return made


def _copied(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """The module with tables of its own, and so its submodules; one that is there twice stays one."""
    if id(module) not in known:
        made = known[id(module)] = copy.copy(module)
        # nn.Module's own copy shares these tables with the module it copies.
        for table in ("_parameters", "_buffers", "_modules"):
            made.__dict__[table] = dict(module.__dict__[table])
        for name, part in made._modules.items():
            if part is not None:
                made._modules[name] = _copied(part, known)
    return known[id(module)]


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a tensor where it is, without asking whether a parameter may become a plain tensor."""
    for table in (module._parameters, module._buffers, module.__dict__):
        if name in table:
            table[name] = value  # type: ignore[assignment]  # a gradient flows through plain tensors too
            return
    raise AttributeError(f"{type(module).__name__} has no tensor {name!r}.")
