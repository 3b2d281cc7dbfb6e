"""Affine nodes, sums of matrix products and one more value: take one apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusecell.compiler.ir.graph import Node

__all__ = ["Term", "affine_parts"]

Term = tuple[int, int, Mapping[str, Any]]
"""One product of an affine: the row value, the weight, and which part of the weight."""


def affine_parts(node: Node) -> tuple[int | None, list[Term]]:
    """Return the init and the terms of an affine."""
    start = 1 if node.attrs["init"] else 0
    rest = node.args[start:]
    terms = [(rest[2 * i], rest[2 * i + 1], attrs) for i, attrs in enumerate(node.attrs["terms"])]
    return (node.args[0] if start else None), terms
