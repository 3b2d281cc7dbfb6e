"""Plan the gradients of weights: each is a few sums over all rows and steps, done after the loop of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import ceil_div
from fusecell.compiler.refusal import TooLarge
from fusecell.compiler.schedule.plan import Sum

__all__ = ["MOST_SUMS", "sums_over_rows"]

MOST_SUMS = 1_000
"""Sums over rows of a gradient, at the most: each is a function of its own, some 30 ms of LLVM's time."""


def sums_over_rows(graph: Graph) -> list[Sum]:
    """List the sums of a gradient's graph, label by label, without the locations of their operands yet.

    Raises:
        TooLarge: if there are more than `MOST_SUMS`.
    """
    sums: list[Sum] = []
    first: dict[tuple[int | None, int, int | None, bool], str] = {}
    for label, index in graph.outputs.items():
        # One gradient may be several sums: of a weight that is used twice, or of parts of a concatenation.
        if graph[index].type.kind == "sum":
            for value, flipped, corner in _contributions(graph, index):
                each = _sum(graph, f"sum.{len(sums)}", label, value, flipped, corner)
                # The two biases of a gate have the same gradient.
                name = first.setdefault((each.a, each.b, each.nest, each.pairs), each.name)
                sums.append(each if name == each.name else replace(each, same_as=name))
    if len(sums) > MOST_SUMS:
        raise TooLarge(
            f"The step uses its weights {len(sums):,} times, and each use is a sum in the gradient: at most "
            f"{MOST_SUMS:,} are compiled."
        )
    return sums


def _sum(graph: Graph, name: str, label: str, value: int, flipped: bool, corner: tuple[int, int]) -> Sum:
    """Return a sum; one of two operands has columns that run over the operand that fills whole vectors better."""
    node = graph[value]
    if node.op in ("contract_sum", "scatter_sum"):
        height, width = (1, *node.type.shape)[-2:]
        return Sum(
            name=name,
            label=label,
            a=node.args[0],
            b=node.args[1],
            height=height,
            width=width,
            corner=corner,
            flipped=flipped,
            nest=value,
        )
    a, b = (None, node.args[0]) if node.op == "rowsum" else node.args
    # a^T b or its transpose: rows are single features, columns are padded to 16.
    height, width = 1 if a is None else graph[a].size, graph[b].size
    if a is not None and height * ceil_div(width, LANES) > width * ceil_div(height, LANES):
        a, b, height, width, corner, flipped = b, a, width, height, corner[::-1], not flipped
    pairs = "stored" in node.attrs
    return Sum(
        name=name, label=label, a=a, b=b, height=height, width=width, corner=corner, flipped=flipped, pairs=pairs
    )


def _contributions(graph: Graph, index: int) -> Iterator[tuple[int, bool, tuple[int, int]]]:
    """Yield the sums over rows of a gradient of a weight, and where they are; a vector is a matrix of one row."""
    pending: list[tuple[int, bool, tuple[int, int]]] = [(index, False, (0, 0))]
    while pending:
        value, flipped, corner = pending.pop()
        node = graph[value]
        if node.op == "total":
            pending += [(arg, flipped, corner) for arg in reversed(node.args)]
        elif node.op == "transpose":
            pending.append((node.args[0], not flipped, corner[::-1]))
        elif node.op == "place":
            row, column = (0, *node.attrs["corner"])[-2:]
            pending.append((node.args[0], flipped, (corner[0] + row, corner[1] + column)))
        else:
            yield value, flipped, corner
