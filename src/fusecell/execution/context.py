"""What is in force in a thread: the runner, recomputing, recording."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusecell.execution.options import Options

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = [
    "RunnerName",
    "active_runner",
    "chosen_runner",
    "default_runner",
    "is_compiled",
    "recompute",
    "recomputing",
    "recording",
    "recording_into",
    "runner",
]

RunnerName = Literal["auto", "compiled", "eager"]
_COMPILED = ("auto", "compiled")


class _Choice(threading.local):
    """What is in force in a thread."""

    name: Any = None  # a RunnerName, or "record"
    recompute = False
    keep: Any = None


_CHOICE = _Choice()


def active_runner() -> RunnerName:
    """The runner in force in this thread: the innermost ``with runner(...)``, else ``FUSECELL_RUNNER``, else auto."""
    chosen: Any = _CHOICE.name
    found: RunnerName = default_runner() if chosen is None else chosen
    return found


@functools.cache
def default_runner() -> RunnerName:
    """The runner of the process, where no ``with runner(...)`` is in force."""
    # Read once: a look into os.environ costs a tenth of a small cell's step.
    return _checked(os.environ.get("FUSECELL_RUNNER", "auto"), "the environment variable FUSECELL_RUNNER")


@contextmanager
def runner(name: RunnerName) -> Iterator[None]:
    """Choose how cells run inside a ``with`` block, in this thread.

    ``"compiled"`` runs machine code and raises :class:`fusecell.NotCompilable` where it can't; ``"eager"`` loops
    over ``cell.step`` in Python; ``"auto"``, the default, compiles where it can and falls back to eager with one
    :class:`fusecell.EagerWarning` per cell.

    Example:
        >>> import torch, fusecell as fc
        >>> with fc.runner("eager"):
        ...     y, h = fc.Recurrent(fc.GRUCell(5, 10))(torch.randn(7, 3, 5))

    Raises:
        ValueError: for any other name.
    """
    before = _CHOICE.name
    _CHOICE.name = _checked(name, "runner()")
    try:
        yield
    finally:
        _CHOICE.name = before


@contextmanager
def recompute(enabled: bool = True) -> Iterator[None]:
    """Keep less for the backward inside a ``with`` block, in this thread.

    Training keeps, for each row and step, the products and transcendentals that the gradient needs: for a GRU five
    numbers per unit. Recomputing keeps the states only and works out the rest in the backward, for about a third more
    arithmetic. The layers' keyword ``recompute=True`` does the same for one layer.

    Example:
        >>> import torch, fusecell as fc
        >>> gru = fc.GRU(5, 10)
        >>> with fc.recompute():
        ...     y, h = gru(torch.randn(7, 3, 5))
        >>> y.sum().backward()

    Arguments:
        enabled: False to switch it off again inside another block; a layer's own ``recompute=True`` stays.
    """
    before = recomputing()
    _CHOICE.recompute = enabled
    try:
        yield
    finally:
        _CHOICE.recompute = before


def recomputing() -> bool:
    """Whether ``with recompute():`` is in force in this thread."""
    return _CHOICE.recompute


@contextmanager
def recording(keep: Callable[[Cell, dict[str, Any], Options], None]) -> Iterator[None]:
    """Hand what happens inside every cell that runs in a ``with`` block to ``keep``, in this thread."""
    before = _CHOICE.name, _CHOICE.keep
    _CHOICE.name, _CHOICE.keep = "record", keep
    try:
        yield
    finally:
        _CHOICE.name, _CHOICE.keep = before


def recording_into() -> Callable[[Cell, dict[str, Any], Options], None]:
    """Who gets what is recorded in this thread."""
    keep: Callable[[Cell, dict[str, Any], Options], None] = _CHOICE.keep
    return keep


def is_compiled() -> bool:
    """Whether calls in this thread may run machine code."""
    return (_CHOICE.name or default_runner()) in _COMPILED


def chosen_runner() -> RunnerName | None:
    """The runner of this thread's innermost ``with runner(...)``; None outside."""
    name: RunnerName | None = _CHOICE.name
    return name


def _checked(name: str, where: str) -> RunnerName:
    if name not in get_args(RunnerName):
        raise ValueError(f"{where} got {name!r}; expected one of 'auto', 'compiled' or 'eager'.")
    return name  # type: ignore[return-value]  # narrowed by the test above
