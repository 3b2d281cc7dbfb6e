"""The pass that has products of bfloat16 layers computed by pairs, for CPUs with an instruction for these."""

from __future__ import annotations

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import Builder, Graph, rebuild
from fusecell.compiler.ir.storage import Storage

__all__ = ["multiply_pairs"]


def multiply_pairs(graph: Graph) -> Graph:
    """Round what weights of bfloat16 numbers multiply to such numbers too, and say so of the weights.

    Of an input of the layer that changes nothing: it has such numbers. A state, or a gradient, is rounded as torch
    rounds it when it hands it from one operation to the next; the sums stay float32. A graph without such weights is
    returned itself.
    """
    weights, rounded = _paired_weights(graph), dict[int, int]()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node, operands = graph[index], list(args)
        if index in weights:
            return builder.append(node.op, (), {**node.attrs, "stored": Storage.BF16_BF16.value}, node.name)
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

    return rebuild(graph, rewrite) if weights else graph


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
