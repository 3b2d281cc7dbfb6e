"""Modules named on the command line."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from fusecell.cells import CELLS
from fusecell.layers import Recurrent

__all__ = ["find_cell", "find_module"]


def find_cell(name: str, input_size: int, hidden_size: int) -> Recurrent:
    """A layer of the zoo's cell of that name or class, case and underscores aside.

    Raises:
        ValueError: if there is none.
    """
    wanted = _plain(name)
    for member in CELLS:
        if wanted in (_plain(member.name), _plain(member.cell.__name__), _plain(member.cell.__name__) + "cell"):
            return Recurrent(member.make(input_size, hidden_size))
    names = ", ".join(member.name for member in CELLS)
    raise ValueError(f"no cell is called {name!r}; there are: {names}.")


def find_module(path: str) -> nn.Module:
    """What ``package.module:name`` stands for: a module, or a function of no arguments that returns one.

    Raises:
        ValueError: if the path has no colon, or leads nowhere.
        TypeError: if what stands there is no torch.nn.Module.
    """
    source, colon, name = path.partition(":")
    if not (source and colon and name):
        raise ValueError(f"{path!r} is not of the form MODULE:FACTORY, for example models.tagger:build.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: modules of the folder we are in
    try:
        found = getattr(importlib.import_module(source), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: {error}. Is it importable from here?") from error
    except AttributeError as error:
        raise ValueError(f"{path}: {error}.") from error
    module = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(module, nn.Module):
        raise TypeError(f"{path} gave {type(module).__name__}, expected a torch.nn.Module.")
    return module


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
