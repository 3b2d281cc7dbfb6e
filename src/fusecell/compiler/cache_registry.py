"""Registry of all caches of compiled programs, so that one call empties them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar
from weakref import WeakMethod

__all__ = ["Forget", "forget_programs", "register_cache"]

Forget = Callable[[Collection[type] | None], None]
"""Drops from a cache what was compiled for cells of some classes, or everything."""

Function = TypeVar("Function", bound=Forget)

_FORGETS: list[Callable[[], Forget | None]] = []


def register_cache(forget: Function) -> Function:
    """Call ``forget`` whenever programs are to be dropped; usable as a decorator.

    A method is called for as long as its object lives: the registry keeps no cache alive.
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
