"""Passes: what is done to a graph before it becomes stages. Read the tuple ``PASSES`` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from fusecell.compiler.ir.affine import Term, affine_parts
from fusecell.compiler.ir.graph import SAVED, Builder, Graph, Node, rebuild
from fusecell.compiler.ir.naming import restore_names
from fusecell.compiler.ir.primitives import PRIMITIVES

__all__ = ["PASSES", "optimise"]

Pass = Callable[[Graph], Graph]


def fold_constants(graph: Graph) -> Graph:
    """Arithmetic on numbers is done here; x*1, x/1, x-0 and x+0 are x, as they are for every number but -0."""

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
        if node.op == "broadcast" and builder.nodes[args[0]].type == node.type:
            return args[0]
        return builder.add_like(node, args)

    return rebuild(graph, rewrite)


def spread_constants(graph: Graph) -> Graph:
    """A number that is an operand of a product, a sum over rows or a join is read from memory: it becomes a row."""

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op in ("product", "outer", "rowsum", "concat"):
            args = tuple([_spread(builder, arg) for arg in args])
        return builder.add_like(node, args)

    return rebuild(graph, rewrite)


def _spread(builder: Builder, index: int) -> int:
    return builder.add("broadcast", index, size=1) if builder.nodes[index].op == "const" else index


def split_concat_products(graph: Graph) -> Graph:
    """A product of a concatenation is the sum of the parts' products, so that the part of x can leave the loop."""

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


def save_in_parts(graph: Graph) -> Graph:
    """A wide value that is saved, but else used in parts only, is saved as its parts: it isn't computed whole too."""
    users, only_sliced = graph.users(), _only_sliced(graph)
    builder = Builder(graph.title, graph.dtype)
    new: list[int] = []
    for _, node in graph:
        new.append(builder.add_like(node, [new[arg] for arg in node.args]))
    outputs = {label: new[index] for label, index in graph.outputs.items()}
    for label, index in graph.outputs.items():
        cuts = sorted(_cuts(graph, users, index)) if label.startswith(SAVED) and only_sliced[index] else []
        if len(cuts) > 2:
            parts = [builder.add("slice", new[index], start=start, stop=stop) for start, stop in pairwise(cuts)]
            outputs[label] = builder.add("concat", *parts, name=graph[index].name)
    return builder.build(outputs)


def _cuts(graph: Graph, users: list[list[int]], index: int) -> set[int]:
    """The features at which the slices of a value, and of what is made of it element by element, begin and end."""
    found = {0, graph[index].size}
    for user in users[index]:
        node = graph[user]
        if node.op == "slice":
            found |= {node.attrs["start"], node.attrs["stop"]}
        elif node.size == graph[index].size:
            found |= _cuts(graph, users, user)
    return found


def sink_slices(graph: Graph) -> Graph:
    """A slice of a product is a product with fewer columns; a slice of a pointwise value, the value of slices.

    A value that is also used whole is computed once and stays: what is sliced then is its memory.
    """
    only_sliced = _only_sliced(graph)
    sinks: dict[int, bool] = {}

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op == "slice":
            return _sink(builder, args[0], node.attrs["start"], node.attrs["stop"], node.name, sinks)
        made = builder.add_like(node, args)
        sinks[made] = sinks.get(made, True) and only_sliced[index]
        return made

    return rebuild(graph, rewrite)


def _only_sliced(graph: Graph) -> list[bool]:
    """For each node, whether slices are all that is ever used of it, once those after it have sunk."""
    users, outputs = _users(graph), _results(graph)
    found = [False] * len(graph.nodes)
    for index in range(len(graph.nodes) - 1, -1, -1):
        found[index] = (
            bool(users[index])
            and index not in outputs
            and all(
                graph[user].op == "slice" or (PRIMITIVES[graph[user].op].pointwise and found[user])
                for user in users[index]
            )
        )
    return found


def _results(graph: Graph) -> set[int]:
    """The outputs but for what is saved: whether a value is saved must not change how others are computed."""
    return {index for label, index in graph.outputs.items() if not label.startswith(SAVED)}


def _users(graph: Graph) -> list[list[int]]:
    """For each node, the nodes that read it on the way to a result; what is read to be saved only does not count."""
    needed = graph.needed(_results(graph))
    return [[user for user in users if needed[user]] for users in graph.users()]


def _sink(builder: Builder, index: int, start: int, stop: int, name: str, sinks: dict[int, bool]) -> int:
    node = builder.nodes[index]
    if start == 0 and stop == node.size:
        return index
    if node.op == "slice":
        offset = node.attrs["start"]
        return _sink(builder, node.args[0], offset + start, offset + stop, name, sinks)
    if node.op == "broadcast":
        return builder.add("broadcast", *node.args, name=name, size=stop - start)
    if node.op == "product" and sinks.get(index, True):
        first = node.attrs["cols"][0]
        return builder.add("product", *node.args, name=name, **{**node.attrs, "cols": [first + start, first + stop]})
    if node.op == "concat":
        offset = 0
        for part in node.args:
            if offset <= start and stop <= offset + builder.size(part):
                return _sink(builder, part, start - offset, stop - offset, name, sinks)
            offset += builder.size(part)
    if PRIMITIVES[node.op].pointwise and sinks.get(index, True):
        args = [arg if builder.size(arg) == 1 else _sink(builder, arg, start, stop, name, sinks) for arg in node.args]
        return builder.add(node.op, *args, name=name, **node.attrs)
    return builder.add("slice", index, name=name, start=start, stop=stop)


def gather_affines(graph: Graph) -> Graph:
    """Products and what is added to them become one accumulation: init + sum of products, in one fixed order.

    First the init, a weight or what needs x only; then the terms that need x only; then the rest as written.
    """
    users, outputs = _users(graph), _results(graph)
    open_: dict[int, bool] = {}
    facts = _Facts()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        made = -1
        if node.op == "product":
            made = _affine(builder, None, [(args[0], args[1], node.attrs)], node.name)
        elif node.op == "add":
            made = _merge(builder, args, node, open_, facts)
        if made < 0:
            return builder.add_like(node, args)
        open_[made] = made not in open_ and len(users[index]) == 1 and index not in outputs
        return made

    return rebuild(graph, rewrite)


def _merge(builder: Builder, args: tuple[int, ...], node: Node, open_: dict[int, bool], facts: _Facts) -> int:
    """The affine that an addition makes of an affine that is used here alone, or -1."""
    for mine, other in (args, args[::-1]):
        if not open_.get(mine, False) or builder.size(mine) != node.size or builder.size(other) != node.size:
            continue
        init, terms = affine_parts(builder.nodes[mine])
        inits = [] if init is None else [init]
        if open_.get(other, False):
            second, more = affine_parts(builder.nodes[other])
            inits += [] if second is None else [second]
            terms = terms + more
        elif facts.can_start(builder, other):
            inits.append(other)
        else:
            continue
        if len(inits) == 2:
            inits = [builder.add("add", *inits, name=f"{node.name}.bias")]
        early = [term for term in terms if not facts.late(builder, term[0])]
        late = [term for term in terms if facts.late(builder, term[0])]
        return _affine(builder, inits[0] if inits else None, early + late, node.name)
    return -1


def split_affines(graph: Graph) -> Graph:
    """The part of an accumulation that needs x only becomes one of its own, the init of the rest: it can leave."""
    facts = _Facts()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op != "affine":
            return builder.add_like(node, args)
        init, terms = affine_parts(Node(node.name, node.op, args, node.attrs, node.type))
        early = [term for term in terms if not facts.late(builder, term[0])]
        late = [term for term in terms if facts.late(builder, term[0])]
        if not early or not late:
            return builder.add_like(node, args)
        hoisted = _affine(builder, init, early, f"{node.name}.input")
        return _affine(builder, hoisted, late, node.name)

    return rebuild(graph, rewrite)


class _Facts:
    """What is known of the nodes of a growing builder, worked out once each."""

    def __init__(self) -> None:
        self._late: dict[int, bool] = {}
        self._heavy: dict[int, bool] = {}

    def late(self, builder: Builder, index: int) -> bool:
        """Whether a value depends on a state."""
        if index not in self._late:
            node = builder.nodes[index]
            self._late[index] = node.op == "state" or any(self.late(builder, arg) for arg in node.args)
        return self._late[index]

    def heavy(self, builder: Builder, index: int) -> bool:
        """Whether a value depends on a product or a reduction."""
        if index not in self._heavy:
            node = builder.nodes[index]
            primitive = PRIMITIVES[node.op]
            itself = primitive.category == "product" or primitive.reduction
            self._heavy[index] = itself or any(self.heavy(builder, arg) for arg in node.args)
        return self._heavy[index]

    def can_start(self, builder: Builder, index: int) -> bool:
        """Whether an accumulation may start from a value: a weight, or what is in memory before the loop anyway."""
        node = builder.nodes[index]
        if node.type.kind == "weight":
            return True
        return (
            node.type.kind == "row"
            and not self.late(builder, index)
            and (node.op == "input" or self.heavy(builder, index))
        )


def _affine(builder: Builder, init: int | None, terms: Sequence[Term], name: str) -> int:
    args = [] if init is None else [init]
    for row, weight, _ in terms:
        args += [row, weight]
    attrs = [{key: term[2][key] for key in ("transposed", "rows", "cols")} for term in terms]
    return builder.add("affine", *args, name=name, init=init is not None, terms=attrs)


PASSES: tuple[Pass, ...] = (
    fold_constants,
    spread_constants,
    split_concat_products,
    save_in_parts,
    sink_slices,
    gather_affines,
    split_affines,
)


def optimise(graph: Graph) -> list[tuple[str, Graph]]:
    """The graph as traced and after each pass, by name; the last is what is scheduled."""
    stages = [("traced", graph)]
    for rewrite in PASSES:
        stages.append((rewrite.__name__, rewrite(stages[-1][1])))
    stages.append(("restore_names", restore_names(stages[-1][1], graph)))
    return stages


def _number(builder: Builder, index: int) -> float | None:
    node = builder.nodes[index]
    return float(node.attrs["value"]) if node.op == "const" else None


def _folded(fold: Callable[..., float] | None, values: Sequence[float | None]) -> float | None:
    """What a primitive computes of numbers, None where it is left to the kernel: an argument is no number, or 1/0."""
    if fold is None or any(value is None for value in values):
        return None
    try:
        return fold(*values)
    except (ZeroDivisionError, OverflowError, ValueError):
        return None
