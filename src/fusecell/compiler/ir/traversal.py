"""Recursion over graphs that may be deeper than Python's stack: a step may be a chain of thousands of operations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

__all__ = ["resolve"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def resolve(root: K, table: dict[K, V], needs: Callable[[K], Iterable[K]], compute: Callable[[K], V]) -> V:
    """Return ``table[root]``, computed after all that it needs: a memoised recursion, in its order, without the stack.

    Arguments:
        root: the key of the result.
        table: the values computed so far; it grows.
        needs: the keys that must be in the table before a key is computed, first to last.
        compute: the value of a key, once the table holds all that it needs.
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
