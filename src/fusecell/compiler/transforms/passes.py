"""Passes: rewrites of a graph into the form that is scheduled, run in the order of the tuple `PASSES`.

Each is a function from graph to graph. A pass rewrites node by node in topological order (`rebuild`), so that the
arguments of a node have been rewritten when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from fusecell.compiler.ir.affine import Term, affine_parts, multiply_pairs
from fusecell.compiler.ir.graph import SAVED, Builder, Graph, Node, rebuild
from fusecell.compiler.ir.naming import restore_names
from fusecell.compiler.ir.primitives import LANES, PRIMITIVES
from fusecell.compiler.ir.traversal import resolve

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


def save_in_parts(graph: Graph) -> Graph:
    """Save a wide value that is otherwise only used in slices as these, so that it is not computed whole as well."""
    only_sliced, cuts_of = _only_sliced(graph), _Cuts(graph)
    builder = Builder(graph.title, graph.dtype)
    new: list[int] = []
    for _, node in graph:
        new.append(builder.add_like(node, [new[arg] for arg in node.args]))
    outputs = {label: new[index] for label, index in graph.outputs.items()}
    for label, index in graph.outputs.items():
        cuts = sorted(cuts_of(index)) if label.startswith(SAVED) and only_sliced[index] else []
        # The concat is no computation: each part is stored at its offset in what is saved.
        if len(cuts) > 2:
            parts = [builder.add("slice", new[index], start=start, stop=stop) for start, stop in pairwise(cuts)]
            outputs[label] = builder.add("concat", *parts, name=graph[index].name)
    return builder.build(outputs)


class _Cuts:
    """Features at which the slices of a value, and of pointwise functions of it, begin and end."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._users = graph, graph.users()
        self._table: dict[int, frozenset[int]] = {}

    def __call__(self, index: int) -> frozenset[int]:
        return resolve(index, self._table, self._elementwise_users, self._of)

    def _elementwise_users(self, index: int) -> list[int]:
        graph = self._graph
        return [
            user for user in self._users[index] if graph[user].op != "slice" and graph[user].size == graph[index].size
        ]

    def _of(self, index: int) -> frozenset[int]:
        cuts = {0, self._graph[index].size}
        for user in self._users[index]:
            node = self._graph[user]
            if node.op == "slice":
                cuts |= {node.attrs["start"], node.attrs["stop"]}
        return frozenset(cuts.union(*(self._table[user] for user in self._elementwise_users(index))))


def sink_slices(graph: Graph) -> Graph:
    """Replace a slice of a product by a product with fewer columns, and one of a pointwise value by a value of slices.

    A value that is also used whole stays, and is computed once: a slice of it is a part of its memory.
    """
    # Cells compute their gates as one product of 3H or 4H columns and cut it apart. A stage has one width: as products
    # of H columns each, all gates of a column are in registers at the same time, and so is what follows from them.
    only_sliced = _only_sliced(graph)
    sinker = _Sinker()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op == "slice":
            return sinker.sink(builder, (args[0], node.attrs["start"], node.attrs["stop"]), node.name)
        new = builder.add_like(node, args)
        sinker.allow(new, only_sliced[index])
        return new

    return rebuild(graph, rewrite)


def _only_sliced(graph: Graph) -> list[bool]:
    """Return, for each node, whether only slices of it are used, once the slices of its users have sunk."""
    users, outputs = _users(graph), _results(graph)
    only_sliced = [False] * len(graph.nodes)
    for index in range(len(graph.nodes) - 1, -1, -1):
        only_sliced[index] = (
            bool(users[index])
            and index not in outputs
            and all(
                graph[user].op == "slice" or (PRIMITIVES[graph[user].op].pointwise and only_sliced[user])
                for user in users[index]
            )
        )
    return only_sliced


def _results(graph: Graph) -> set[int]:
    """Return the outputs except saved values: that a value is saved must not change how, and to which bits, others are
    computed."""
    return {index for label, index in graph.outputs.items() if not label.startswith(SAVED)}


def _users(graph: Graph) -> list[list[int]]:
    """List, for each node, its users, except those that are computed only to be saved."""
    needed = graph.needed(_results(graph))
    return [[user for user in users if needed[user]] for users in graph.users()]


_Part = tuple[int, int, int]
"""A value, the first of its features, and the one after the last."""


class _Sinker:
    """Moves slices towards the inputs; each part of a value is added once, however many values it is a part of."""

    def __init__(self) -> None:
        self._allowed: dict[int, bool] = {}
        self._table: dict[_Part, int] = {}

    def allow(self, index: int, only_sliced: bool) -> None:
        """Record whether slices may sink through a value of the new graph: only if it has no other users.

        Several old nodes may become one new node; one that is used whole is enough to forbid it.
        """
        before = self._allowed.get(index, True)
        self._allowed[index] = before and only_sliced
        if before and not only_sliced:
            self._table.clear()  # entries were computed as if slices might sink through it

    def sink(self, builder: Builder, part: _Part, name: str) -> int:
        """Return the node for a slice."""
        return resolve(
            part, self._table, lambda each: self._needs(builder, each), lambda each: self._add(builder, each, name)
        )

    def _sinks(self, builder: Builder, index: int) -> bool:
        return PRIMITIVES[builder.nodes[index].op].pointwise and self._allowed.get(index, True)

    def _needs(self, builder: Builder, part: _Part) -> list[_Part]:
        """List the parts that a part is computed from: of all arguments, or of the one that it is itself a part of."""
        index, start, stop = part
        node = builder.nodes[index]
        if (start == 0 and stop == node.size) or node.op == "broadcast":
            return []
        if node.op == "slice":
            offset = node.attrs["start"]
            return [(node.args[0], offset + start, offset + stop)]
        if node.op == "concat":
            offset = 0
            for arg in node.args:
                if offset <= start and stop <= offset + builder.size(arg):
                    return [(arg, start - offset, stop - offset)]
                offset += builder.size(arg)
        if self._sinks(builder, index):
            return [(arg, start, stop) for arg in node.args if builder.size(arg) != 1]
        return []

    def _add(self, builder: Builder, part: _Part, name: str) -> int:
        """Return the node for a part, once those of `_needs` are in the table."""
        index, start, stop = part
        node = builder.nodes[index]
        if start == 0 and stop == node.size:
            return index
        if node.op == "broadcast":
            return builder.add("broadcast", *node.args, name=name, size=stop - start)
        if node.op == "product" and self._allowed.get(index, True):
            first = node.attrs["cols"][0]
            attrs = {**node.attrs, "cols": [first + start, first + stop]}
            return builder.add("product", *node.args, name=name, **attrs)
        needs = self._needs(builder, part)
        if node.op in ("slice", "concat") and needs:
            return self._table[needs[0]]
        if self._sinks(builder, index):
            args = [arg if builder.size(arg) == 1 else self._table[arg, start, stop] for arg in node.args]
            return builder.add(node.op, *args, name=name, **node.attrs)
        return builder.add("slice", index, name=name, start=start, stop=stop)


def gather_affines(graph: Graph) -> Graph:
    """Gather products and the values added to them in one accumulation: init + sum of products, in one fixed order.

    First the init, a weight or a value that needs x only; then the terms that need x only; then the rest as written. A
    kernel keeps the sums in registers from the init to the last term. The order gives results the same bits however the
    step was written, and lets `split_affines` take the terms of x off the front without changing any.

    An affine may take in more only while it is ``open_``: its only user is the addition that would take it in, and it
    is no output. For any other user it would have to be computed twice.
    """
    users, outputs = _users(graph), _results(graph)
    open_: dict[int, bool] = {}
    dependences = _Dependences()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        affine = -1
        if node.op == "product":
            affine = _affine(builder, None, [(args[0], args[1], node.attrs)], node.name)
        elif node.op == "add":
            affine = _merge(builder, args, node, open_, dependences)
        if affine < 0:
            return builder.add_like(node, args)
        # A node that is there already belongs to another place of the step as well.
        open_[affine] = affine not in open_ and len(users[index]) == 1 and index not in outputs
        return affine

    return rebuild(graph, rewrite)


def _merge(
    builder: Builder, args: tuple[int, ...], node: Node, open_: dict[int, bool], dependences: _Dependences
) -> int:
    """Add the affine that an addition becomes, if one of its arguments is an open affine; else return -1."""
    for base, other in (args, args[::-1]):
        if not open_.get(base, False) or builder.size(base) != node.size or builder.size(other) != node.size:
            continue
        init, terms = affine_parts(builder.nodes[base])
        inits = [] if init is None else [init]
        if open_.get(other, False):
            second, more = affine_parts(builder.nodes[other])
            inits += [] if second is None else [second]
            terms = terms + more
        elif dependences.can_start(builder, other):
            inits.append(other)
        else:
            continue
        # An accumulation starts from one value: two are added before, of weights once in a call, of x once in a chunk.
        if len(inits) == 2:
            inits = [builder.add("add", *inits, name=f"{node.name}.bias")]
        early = [term for term in terms if not dependences.on_state(builder, term[0])]
        late = [term for term in terms if dependences.on_state(builder, term[0])]
        return _affine(builder, inits[0] if inits else None, early + late, node.name)
    return -1


def split_affines(graph: Graph) -> Graph:
    """Split off the part of an accumulation that needs x only, as the init of the rest: it can leave the loop."""
    dependences = _Dependences()

    def rewrite(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        node = graph[index]
        if node.op != "affine":
            return builder.add_like(node, args)
        init, terms = affine_parts(Node(node.name, node.op, args, node.attrs, node.type))
        early = [term for term in terms if not dependences.on_state(builder, term[0])]
        late = [term for term in terms if dependences.on_state(builder, term[0])]
        if not early or not late:
            return builder.add_like(node, args)
        hoisted = _affine(builder, init, early, f"{node.name}.input")
        return _affine(builder, hoisted, late, node.name)

    return rebuild(graph, rewrite)


_HEAVY = frozenset(op for op, row in PRIMITIVES.items() if row.category == "product" or row.reduction or row.nest)


class _Dependences:
    """What the nodes of a growing builder depend on, computed once for each: arguments come before their users."""

    def __init__(self) -> None:
        self._on_state: list[bool] = []
        self._on_heavy: list[bool] = []

    def on_state(self, builder: Builder, index: int) -> bool:
        """Whether a value depends on a state."""
        return self._depends(self._on_state, builder, index, frozenset({"state"}))

    def on_heavy(self, builder: Builder, index: int) -> bool:
        """Whether a value depends on a product, a reduction or a nest."""
        return self._depends(self._on_heavy, builder, index, _HEAVY)

    @staticmethod
    def _depends(table: list[bool], builder: Builder, index: int, ops: frozenset[str]) -> bool:
        for node in builder.nodes[len(table) : index + 1]:
            table.append(node.op in ops or any(table[arg] for arg in node.args))
        return table[index]

    def can_start(self, builder: Builder, index: int) -> bool:
        """Whether an accumulation may start from a value: a weight, or one that is in memory before the loop anyway."""
        node = builder.nodes[index]
        if node.type.kind == "weight":
            return True
        return (
            node.type.kind == "row"
            and not self.on_state(builder, index)
            and (node.op == "input" or self.on_heavy(builder, index))
        )


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
