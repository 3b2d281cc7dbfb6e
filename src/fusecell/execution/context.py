"""The runner in force in a thread, and whether it recomputes or records; set by ``with`` blocks."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from fusecell.execution.options import Options, Recompute, check_recompute

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


class _Context(threading.local):
    """The settings of one thread."""

    name: Any = None  # a RunnerName, or "record", a runner that users can't name
    recompute: Recompute = False
    keep: Any = None


_CONTEXT = _Context()


def active_runner() -> RunnerName:
    """Return the runner in force here: the innermost ``with runner(...)``, else ``FUSECELL_RUNNER``, else auto."""
    name: RunnerName | None = _CONTEXT.name
    return default_runner() if name is None else name


@functools.cache
def default_runner() -> RunnerName:
    """Return the runner of the process, used where no ``with runner(...)`` is in force."""
    # Read once: os.environ.get takes a tenth of a small cell's step.
    return _checked(os.environ.get("FUSECELL_RUNNER", "auto"), "the environment variable FUSECELL_RUNNER")


@contextmanager
def runner(name: RunnerName) -> Iterator[None]:
    """Choose how cells run inside a ``with`` block, in this thread.

    ``"compiled"`` runs machine code, or raises :class:`fusecell.NotCompilable`; ``"eager"`` loops over ``cell.step`` in
    Python; ``"auto"``, the default, runs machine code where the cell can be compiled, else the Python loop, with one
    :class:`fusecell.EagerWarning` per class of cell.

    Example:
        >>> import torch, fusecell as fc
        >>> with fc.runner("eager"):
        ...     y, h = fc.Recurrent(fc.GRUCell(5, 10))(torch.randn(7, 3, 5))

    Raises:
        ValueError: for any other name.
    """
    before = _CONTEXT.name
    _CONTEXT.name = _checked(name, "runner()")
    try:
        yield
    finally:
        _CONTEXT.name = before


@contextmanager
def recompute(enabled: Recompute = True) -> Iterator[None]:
    """Save less for the backward inside a ``with`` block, in this thread.

    Training saves, for each row and step, the products and transcendental functions that the gradient needs: for a GRU
    five numbers per unit. With recomputation only the states are saved and the backward computes the rest again, about
    a third more arithmetic. The layers' argument ``recompute=True`` does the same for one layer.

    With ``"chunk"`` a sequence is divided into about as many chunks as each has steps, of which only the first state is
    saved; the backward runs the forward of each again. Beside inputs and outputs memory then grows with the square root
    of the steps.

    Example:
        >>> import torch, fusecell as fc
        >>> gru = fc.GRU(5, 10)
        >>> with fc.recompute():
        ...     y, h = gru(torch.randn(7, 3, 5))
        >>> y.sum().backward()

    Arguments:
        enabled: True or "chunk"; False to switch it off again inside another block; a layer's own ``recompute=True``
            stays.

    Raises:
        ValueError: for any other value.
    """
    before = recomputing()
    _CONTEXT.recompute = check_recompute("fusecell.recompute", enabled)
    try:
        yield
    finally:
        _CONTEXT.recompute = before


def recomputing() -> Recompute:
    """Return the argument of the ``with recompute():`` that is in force in this thread; False outside."""
    return _CONTEXT.recompute


@contextmanager
def recording(keep: Callable[[Cell, dict[str, Any], Options], None]) -> Iterator[None]:
    """Run the cells in a ``with`` block with the recording runner, in this thread.

    Arguments:
        keep: called after each cell's sequence with the cell, its recorded values by name, and the options.
    """
    before = _CONTEXT.name, _CONTEXT.keep
    _CONTEXT.name, _CONTEXT.keep = "record", keep
    try:
        yield
    finally:
        _CONTEXT.name, _CONTEXT.keep = before


def recording_into() -> Callable[[Cell, dict[str, Any], Options], None]:
    """Return the ``keep`` of the innermost ``with recording(...)`` in this thread."""
    keep: Callable[[Cell, dict[str, Any], Options], None] = _CONTEXT.keep
    return keep


def is_compiled() -> bool:
    """Return whether calls in this thread may run machine code."""
    return (_CONTEXT.name or default_runner()) in _COMPILED


def chosen_runner() -> RunnerName | None:
    """Return the runner of this thread's innermost ``with runner(...)``; None outside."""
    name: RunnerName | None = _CONTEXT.name
    return name


def _checked(name: str, where: str) -> RunnerName:
    if name not in get_args(RunnerName):
        raise ValueError(f"{where} got {name!r}; expected one of 'auto', 'compiled' or 'eager'.")
    return name  # type: ignore[return-value]  # narrowed by the test above
