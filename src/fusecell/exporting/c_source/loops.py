"""A graph as loop nests: which values are computed together, and which are kept in arrays.

Values of one width that need only the same feature of each other share a nest. A value that needs all features of
another one is in a later nest: an operand of a product, a reduction, a part of it or a concatenation. So nests have a
level, one more than that of what must be complete before, and run level by level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.errors import ExportError

__all__ = ["PARTS", "Nest", "Nests", "arrange", "base", "is_alone", "no_loop", "operands", "segments"]


PARTS = ("slice", "view")
"""What is no value of its own, but is read where another is."""


def is_alone(op: str) -> bool:
    """Whether a value of a primitive has a nest of its own."""
    return op == "concat" or PRIMITIVES[op].category == "nest"


@dataclass(frozen=True)
class Nest:
    """Values that are computed in one loop nest: in order, of one width; or one that is alone.

    Attributes:
        values: indices of nodes.
    """

    level: int
    width: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Nests:
    """The nests of a graph.

    Attributes:
        nests: in the order in which they run.
        stored: the values that later nests read, and those that are results.
        constants: the values that depend on weights alone, and that other values or results need.
    """

    nests: tuple[Nest, ...]
    stored: frozenset[int]
    constants: tuple[int, ...]


def arrange(graph: Graph) -> Nests:
    """Group the values of a step's graph.

    Raises:
        ExportError: for a primitive that C has no loop for.
    """
    varies = graph.reaches([*graph.leaves("input"), *graph.leaves("state")])
    levels: dict[int, int] = {}
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, node in graph:
        if not varies[index] or PRIMITIVES[node.op].leaf or node.op in PARTS:
            continue
        levels[index] = level = max((_level(graph, levels, index, arg) for arg in node.args), default=0)
        # What moves features, or computes along axes, is a nest of its own, before those that go feature by feature.
        key = (level, 0, index) if is_alone(node.op) else (level, 1, _width(graph, index))
        groups.setdefault(key, []).append(index)
    nests = tuple(Nest(level, graph[values[0]].size, tuple(values)) for (level, *_), values in sorted(groups.items()))
    home = {index: place for place, nest in enumerate(nests) for index in nest.values}
    stored = {base(graph, index) for index in graph.outputs.values()}
    for index in home:
        stored |= {base(graph, arg) for arg in graph[index].args if _is_read_whole(graph, index, arg)}
        stored |= {arg for arg in graph[index].args if arg in home and home[arg] != home[index]}
    constants = {base(graph, index) for index in graph.outputs.values()}
    constants |= {base(graph, arg) for index in home for arg in graph[index].args}
    constants = {index for index in constants if not varies[index] and graph[index].op not in ("const", "weight")}
    return Nests(nests, frozenset(stored & home.keys()), tuple(sorted(constants)))


def no_loop(node: Node) -> ExportError:
    """Return the error for a value that C has no loop for."""
    return ExportError(
        f"format='c' has no loop for the primitive {node.op!r}, which {node.name} needs: export format='object'."
    )


def base(graph: Graph, index: int) -> int:
    """Return the value that a value is a part of: the argument of a slice or view, or the value itself."""
    while graph[index].op in PARTS:
        index = graph[index].args[0]
    return index


def _width(graph: Graph, index: int) -> int:
    """Return the width of the nest that computes a value; reductions are among the single numbers."""
    node = graph[index]
    if not (PRIMITIVES[node.op].pointwise or PRIMITIVES[node.op].reduction or node.op == "affine"):
        raise no_loop(node)
    return node.size


def _is_read_whole(graph: Graph, index: int, arg: int) -> bool:
    """Whether a value needs other features of an argument than its own."""
    node = graph[index]
    if node.op == "affine":
        return arg in operands(graph, index)
    return graph[arg].op in PARTS or is_alone(node.op) or PRIMITIVES[node.op].reduction


def operands(graph: Graph, index: int) -> set[int]:
    """Return the row operands of an affine's products."""
    return {row for row, *_ in affine_parts(graph[index])[1]}


def _level(graph: Graph, levels: dict[int, int], index: int, arg: int) -> int:
    """Return the level from which a value can be computed, as far as one of its arguments is concerned."""
    source = base(graph, arg)
    if source not in levels:
        return 0
    whole = _is_read_whole(graph, index, arg) or is_alone(graph[source].op)
    whole = whole or graph[source].size != graph[index].size
    return levels[source] + whole


def segments(graph: Graph, values: tuple[int, ...]) -> Iterator[tuple[bool, list[int]]]:
    """Split the values of a nest into runs: products as early as they can be, then what shares a loop over features."""
    left, done = list(values), set[int]()
    for is_product in cycle((True, False)):
        run: list[int] = []
        for index in left:
            ready = all(arg in done or arg not in left for arg in graph[index].args)
            if ready and (graph[index].op == "affine") is is_product:
                run.append(index)
                done.add(index)
        left = [index for index in left if index not in done]
        if run:
            yield is_product, run
        if not left:
            return
