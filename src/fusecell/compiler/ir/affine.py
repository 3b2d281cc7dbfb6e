"""Affine nodes, sums of matrix products and one more value: take one apart, and have those of bfloat16 take pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusecell.compiler.ir.graph import Builder, Graph, Node, rebuild
from fusecell.compiler.ir.storage import Storage

__all__ = ["Term", "affine_parts", "multiply_pairs", "paired_operands"]

Term = tuple[int, int, Mapping[str, Any]]
"""One product of an affine: the row value, the weight, and which part of the weight."""


def affine_parts(node: Node) -> tuple[int | None, list[Term]]:
    """Return the init and the terms of an affine."""
    start = 1 if node.attrs["init"] else 0
    rest = node.args[start:]
    terms = [(rest[2 * i], rest[2 * i + 1], attrs) for i, attrs in enumerate(node.attrs["terms"])]
    return (node.args[0] if start else None), terms


def multiply_pairs(graph: Graph) -> Graph:
    """Round what weights of bfloat16 numbers multiply to such numbers too, and say so of the weights.

    Of an input of the layer that changes nothing: it has such numbers. A state, or a gradient, is rounded as torch
    rounds it when it hands it from one operation to the next; the sums stay float32. The same for what is summed over
    rows for the gradients of such weights. A graph without any is returned itself.
    """
    weights, rounded = _paired_weights(graph), dict[int, int]()
    sums = {index for index, node in graph if node.op == "outer" and "numbers" in node.attrs}

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node, operands = graph[index], list(args)
        if index in weights:
            return builder.append(node.op, (), {**node.attrs, "stored": Storage.BF16_BF16.value}, node.name)
        if index in sums:
            return builder.append(node.op, args, {**node.attrs, "stored": Storage.BF16_BF16.value}, node.name)
        if node.op == "affine":
            for place in range(len(args) - 2 * len(node.attrs["terms"]), len(args), 2):
                if node.args[place + 1] in weights:
                    operands[place] = rounded_operand(builder, args[place])
        return builder.add_like(node, operands)

    def rounded_operand(builder: Builder, operand: int) -> int:
        # Appended, as nothing else may read it: the step's own rounding of a value is another node.
        if operand not in rounded:
            name = f"{builder.nodes[operand].name}.pairs"
            rounded[operand] = builder.append("to_bfloat16", (operand,), {}, name)
        return rounded[operand]

    return rebuild(graph, rewrite) if weights or sums else graph


def _paired_weights(graph: Graph) -> set[int]:
    """Return the weights of bfloat16 numbers that are operands of products alone, each over two features or more."""
    weights = {index for index in graph.leaves("weight") if graph[index].attrs.get("numbers") == Storage.BF16.value}
    for _, node in graph:
        paired = set()
        if node.op == "affine":
            terms = affine_parts(node)[1]
            paired = {weight for _, weight, attrs in terms if attrs["rows"][1] - attrs["rows"][0] > 1}
        weights -= set(node.args) - paired
    return weights


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
