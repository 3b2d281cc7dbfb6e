"""Every cache of what was compiled, so that one call empties them all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar
from weakref import WeakMethod

__all__ = ["Forget", "forget_programs", "register_cache"]

Forget = Callable[[Collection[type] | None], None]
"""Drops what a cache holds for cells of some classes, whatever holds them, or all that it holds."""

Function = TypeVar("Function", bound=Forget)

_FORGETS: list[Callable[[], Forget | None]] = []


def register_cache(forget: Function) -> Function:
    """Have ``forget`` called whenever programs are to be forgotten; a decorator too.

    A method is called for as long as its object lives.
    """
    reference: Callable[[], Forget | None] = lambda: forget  # noqa: E731
    if hasattr(forget, "__self__") and not isinstance(forget.__self__, type):
        reference = WeakMethod(forget)
    _FORGETS.append(reference)
    return forget


def forget_programs(kinds: Collection[type] | None = None) -> None:
    """Drop what was compiled for cells of some classes, or for all."""
    for reference in list(_FORGETS):
        forget = reference()
        if forget is None:
            _FORGETS.remove(reference)
        else:
            forget(kinds)
