"""Affine nodes, sums of matrix products and one more value: take one apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.storage import Storage

__all__ = ["Term", "affine_parts", "paired_operands"]

Term = tuple[int, int, Mapping[str, Any]]
"""One product of an affine: the row value, the weight, and which part of the weight."""


def affine_parts(node: Node) -> tuple[int | None, list[Term]]:
    """Return the init and the terms of an affine."""
    start = 1 if node.attrs["init"] else 0
    rest = node.args[start:]
    terms = [(rest[2 * i], rest[2 * i + 1], attrs) for i, attrs in enumerate(node.attrs["terms"])]
    return (node.args[0] if start else None), terms


def paired_operands(graph: Graph) -> set[int]:
    """Return the values that nothing reads but products by pairs."""
    results = set(graph.outputs.values())
    operands = {index for index, node in graph if node.op == "to_bfloat16" and index not in results}
    for _, node in graph:
        paired = set()
        if node.op == "affine":
            terms = affine_parts(node)[1]
            paired = {row for row, weight, _ in terms if graph[weight].attrs.get("stored") == Storage.BF16_BF16.value}
        operands -= set(node.args) - paired
    return operands
