"""``@team``: what each thread of a team runs, part after part of a call, until none is left."""

from __future__ import annotations

from fusecell.compiler.emit.text import Function, Module

__all__ = ["BLOCKS", "emit_team"]

BLOCKS = 2
"""The words of a team's data before the addresses of its argument blocks: the next part, and how many there are."""


def emit_team(module: Module) -> None:
    """Write ``@team``, which calls ``@run``."""
    f = Function(module, "team", "ptr %data", exported=True)
    parts = f.load_int(f.at("%data", 8), "parts")
    with f.loop("turn", 0, parts):
        part = f.let("part", "atomicrmw add ptr %data, i64 1 monotonic")
        with f.when("left", f.let("is.left", f"icmp slt i64 {part}, {parts}")):
            at = f.at(f.at("%data", 8 * BLOCKS), f.mul(part, 8))
            f.call("run", f"ptr {f.let('block', f'load ptr, ptr {at}')}")
    f.end()
