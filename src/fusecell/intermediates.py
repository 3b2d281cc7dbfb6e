"""The named intermediate values of a step (``Cell.note``): capture them, or replace them while the step runs."""

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
# Thread-local rather than a ContextVar, at which torch.compile would break its graph: wrappers rewrite while it traces.
_REWRITE = threading.local()

Rewrite = Callable[["Cell", str, Tensor], Tensor]
"""A function of the cell, the name and the value; the step continues with what it returns."""


def record_intermediate(cell: Cell, name: str, value: Tensor) -> Tensor:
    """Report an intermediate value; return the value with which the step is to continue."""
    rewrite: Rewrite | None = getattr(_REWRITE, "function", None)
    if rewrite is not None:
        value = rewrite(cell, name, value)
    collect = None if torch.compiler.is_compiling() else _COLLECT.get()
    if collect is not None:
        collect(cell, name, value)
    return value


@contextmanager
def capture_intermediates(collect: Callable[[Cell, str, Tensor], None]) -> Iterator[None]:
    """Call ``collect(cell, name, value)`` for every value that a step notes inside a ``with`` block."""
    token = _COLLECT.set(collect)
    try:
        yield
    finally:
        _COLLECT.reset(token)


@contextmanager
def rewrite_intermediates(rewrite: Rewrite) -> Iterator[None]:
    """Replace every value that a step notes inside a ``with`` block by ``rewrite(cell, name, value)``.

    Blocks nest: the innermost rewrites first.
    """
    outer: Rewrite | None = getattr(_REWRITE, "function", None)

    def composed(cell: Cell, name: str, value: Tensor) -> Tensor:
        value = rewrite(cell, name, value)
        return value if outer is None else outer(cell, name, value)

    _REWRITE.function = composed
    try:
        yield
    finally:
        _REWRITE.function = outer
