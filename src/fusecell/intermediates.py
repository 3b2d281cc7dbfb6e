"""What steps note of themselves: who collects it, and who goes on with another value."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = ["record_intermediate", "capture_intermediates", "rewrite_intermediates"]

_COLLECT: ContextVar[Callable[[Cell, str, Tensor], None] | None] = ContextVar("fusecell_notes", default=None)
_REWRITE = threading.local()  # torch.compile follows it where a ContextVar would break its graph

Rewrite = Callable[["Cell", str, Tensor], Tensor]
"""What a step goes on with where it notes a value: of the cell, the name and the value."""


def record_intermediate(cell: Cell, name: str, value: Tensor) -> Tensor:
    """What a step goes on with that notes a value, after all who want to know of it."""
    rewrite: Rewrite | None = getattr(_REWRITE, "function", None)
    if rewrite is not None:
        value = rewrite(cell, name, value)
    collect = None if torch.compiler.is_compiling() else _COLLECT.get()
    if collect is not None:
        collect(cell, name, value)
    return value


@contextmanager
def capture_intermediates(collect: Callable[[Cell, str, Tensor], None]) -> Iterator[None]:
    """Hand every ``note`` made inside the block to ``collect(cell, name, value)``."""
    token = _COLLECT.set(collect)
    try:
        yield
    finally:
        _COLLECT.reset(token)


@contextmanager
def rewrite_intermediates(rewrite: Rewrite) -> Iterator[None]:
    """Let steps inside the block go on with ``rewrite(cell, name, value)`` where they note ``value``."""
    before: Rewrite | None = getattr(_REWRITE, "function", None)

    def both(cell: Cell, name: str, value: Tensor) -> Tensor:
        value = rewrite(cell, name, value)
        return value if before is None else before(cell, name, value)

    _REWRITE.function = both
    try:
        yield
    finally:
        _REWRITE.function = before
