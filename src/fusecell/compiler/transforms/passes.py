"""Passes: rewrites of a graph into the form that is scheduled, run in the order of the tuple `PASSES`.

Each is a function from graph to graph. A pass rewrites node by node in topological order (`rebuild`), so that the
arguments of a node have been rewritten when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusecell.compiler.ir.affine import multiply_pairs
from fusecell.compiler.ir.graph import Builder, Graph, rebuild
from fusecell.compiler.ir.naming import restore_names
from fusecell.compiler.ir.primitives import LANES, PRIMITIVES
from fusecell.compiler.transforms.affines import gather_affines, split_affines
from fusecell.compiler.transforms.slices import save_in_parts, sink_slices

__all__ = ["PASSES", "optimise"]

Pass = Callable[[Graph], Graph]


def fold_constants(graph: Graph) -> Graph:
    """Compute arithmetic on numbers alone; replace x*1, x/1, x-0 and x+0 by x, their value for every x but -0.

    A sum over rows of products with zeros, as with tangents of what has none, is left out of a total.
    """

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        primitive = PRIMITIVES[node.op]
        numbers = [_number(builder, arg) for arg in args]
        result = _folded(primitive.fold, numbers)
        if result is not None:
            return builder.const(result)
        for position, identity in primitive.identities:
            other = args[1 - position]
            if numbers[position] == identity and builder.nodes[other].type == node.type:
                return other
        if node.op == "total":
            args = tuple([arg for arg in args if not _sums_zeros(builder, arg)]) or args[:1]
            if len(args) == 1:
                return args[0]
        if node.op == "broadcast" and builder.nodes[args[0]].type == node.type:
            return args[0]
        return builder.add_like(node, args)

    return rebuild(graph, rewrite)


def _sums_zeros(builder: Builder, index: int) -> bool:
    """Whether a value is a sum over rows of products, one operand of which is zero."""
    node = builder.nodes[index]
    if node.op == "transpose":
        return _sums_zeros(builder, node.args[0])
    return node.op == "outer" and any(_is_zero(builder, arg) for arg in node.args)


def _is_zero(builder: Builder, index: int) -> bool:
    node = builder.nodes[index]
    return _is_zero(builder, node.args[0]) if node.op == "broadcast" else _number(builder, index) == 0


def spread_constants(graph: Graph) -> Graph:
    """Make a row of a number that is an operand of a product, nest, sum over rows or concat: these read memory."""

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op in ("product", "concat") or PRIMITIVES[node.op].is_whole:
            args = tuple([_spread(builder, arg) for arg in args])
        return builder.add_like(node, args)

    return rebuild(graph, rewrite)


def _spread(builder: Builder, index: int) -> int:
    return builder.add("broadcast", index, size=1) if builder.nodes[index].op == "const" else index


def split_concat_products(graph: Graph) -> Graph:
    """Split a product of a concatenation into a sum of its parts' products, so that the part of x can leave the loop.

    cat(x, h) @ W is x @ W[:X] + h @ W[X:]. As one product all of it needs h, and has to wait for the step before.
    """

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op != "product" or builder.nodes[args[0]].op != "concat":
            return builder.add_like(node, args)
        first, total = int(node.attrs["rows"][0]), -1
        for part in builder.nodes[args[0]].args:
            last = first + builder.size(part)
            attrs = {**node.attrs, "rows": [first, last]}
            term = builder.add("product", part, args[1], name=node.name, **attrs)
            total = term if total < 0 else builder.add("add", total, term, name=node.name)
            first = last
        return total

    return rebuild(graph, rewrite)


def write_views(graph: Graph) -> Graph:
    """Replace views by copies of what they are views of, but those that pointwise values can read in place.

    These read sixteen features at a time: neighbours, or one number for all.
    """
    users, outputs = graph.users(), set(graph.outputs.values())

    def is_readable(index: int) -> bool:
        attrs = graph[index].attrs
        is_vectors = attrs["strides"][-1] in (0, 1) and attrs["shape"][-1] % LANES == 0
        primitives = [PRIMITIVES[graph[user].op] for user in users[index]]
        return is_vectors and index not in outputs and all(each.pointwise or each.reduction for each in primitives)

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op == "view" and not is_readable(index):
            return builder.add("gather", *args, name=node.name, **node.attrs)
        return builder.add_like(node, args)

    return rebuild(graph, rewrite)


PASSES: tuple[Pass, ...] = (
    fold_constants,
    spread_constants,
    split_concat_products,
    save_in_parts,  # adds slices, which sink next
    sink_slices,  # before products are gathered: of an affine there are no slices
    gather_affines,
    split_affines,
    write_views,
)


def optimise(graph: Graph, *, pairs: bool = False) -> list[tuple[str, Graph]]:
    """Run all passes; return the graph as traced and after each, by name. The last is the one that is scheduled.

    Arguments:
        pairs: whether it is for a CPU that multiplies pairs of bfloat16 numbers.
    """
    stages = [("traced", graph)]
    for rewrite in PASSES:
        stages.append((rewrite.__name__, rewrite(stages[-1][1])))
    stages.append(("restore_names", restore_names(stages[-1][1], graph)))
    paired = multiply_pairs(stages[-1][1]) if pairs else stages[-1][1]
    if paired is not stages[-1][1]:
        stages.append((multiply_pairs.__name__, paired))
    return stages


def _number(builder: Builder, index: int) -> float | None:
    node = builder.nodes[index]
    return float(node.attrs["value"]) if node.op == "const" else None


def _folded(fold: Callable[..., float] | None, values: Sequence[float | None]) -> float | None:
    """Compute a primitive of numbers; None leaves it to the kernel: an argument is no number, or Python raises."""
    if fold is None or any(value is None for value in values):
        return None
    try:
        return fold(*values)
    except (ZeroDivisionError, OverflowError, ValueError):
        return None
