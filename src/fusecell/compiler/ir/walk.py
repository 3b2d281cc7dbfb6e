"""Walks over graphs that may be deeper than Python's stack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

__all__ = ["resolve"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def resolve(root: K, table: dict[K, V], needs: Callable[[K], Iterable[K]], compute: Callable[[K], V]) -> V:
    """``table[root]``, computed once after all that it needs: what a function that calls itself would do, in its order.

    Arguments:
        root: what is asked for.
        table: what has been computed; it grows.
        needs: what must be in the table before a key is computed, first to last.
        compute: the value of a key, from a table that holds all it needs.
    """
    stack = [root]
    while stack:
        key = stack[-1]
        if key in table:
            stack.pop()
            continue
        missing = [need for need in needs(key) if need not in table]
        if missing:
            stack.extend(reversed(missing))
        else:
            table[key] = compute(key)
            stack.pop()
    return table[root]
