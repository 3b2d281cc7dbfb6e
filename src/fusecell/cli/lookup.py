"""Find the modules named on the command line."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from fusecell.cells import CELLS
from fusecell.layers import Recurrent

__all__ = ["find_cell", "find_module", "sizes_of"]


def find_cell(name: str, input_size: int, hidden_size: int) -> Recurrent:
    """Build a layer of the published cell with a name or class name; case, hyphens and underscores don't matter.

    Raises:
        ValueError: if there is none.
    """
    # "gru", "GRU", "GRUCell" and "gru-cell" all mean the same to a user.
    query = _plain(name)
    for member in CELLS:
        if query in (_plain(member.name), _plain(member.cell.__name__), _plain(member.cell.__name__) + "cell"):
            return Recurrent(member.make(input_size, hidden_size))
    names = ", ".join(member.name for member in CELLS)
    own = f" A layer of your own is named without --cell, {name}." if ":" in name else ""
    raise ValueError(f"no cell is called {name!r}; there are: {names}.{own}")


def find_module(path: str) -> nn.Module:
    """Import ``package.module:name``: a module, or a function without arguments that returns one.

    Raises:
        ValueError: if the path has no colon, or there is nothing of that name.
        TypeError: if it is no torch.nn.Module.
    """
    source, colon, name = path.partition(":")
    if not (source and colon and name):
        raise ValueError(f"{path!r} is not of the form MODULE:FACTORY, for example models.tagger:build.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does, for modules in the current folder
    try:
        target = getattr(importlib.import_module(source), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: {error}. Is it importable from here?") from error
    except AttributeError as error:
        raise ValueError(f"{path}: {error}.") from error
    # A module is callable too: calling it would run it.
    module = target() if callable(target) and not isinstance(target, nn.Module) else target
    if not isinstance(module, nn.Module):
        raise TypeError(f"{path} gave {type(module).__name__}, expected a torch.nn.Module.")
    return module


def sizes_of(text: str) -> tuple[tuple[int, ...], ...]:
    """Read the sizes of several inputs: ``5,4x16,scalar`` is ((5,), (4, 16), ()).

    Raises:
        ValueError: for anything else.
    """
    try:
        shapes = [() if part.strip() == "scalar" else tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or any(dim < 1 for shape in shapes for dim in shape):
        raise ValueError(
            f"{text!r} lists no sizes; expected numbers, shapes or scalar with commas, as in 5,4x16,scalar."
        )
    return tuple(shapes)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
