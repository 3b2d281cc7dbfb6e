"""Passes that move slices towards the inputs: what is cut apart is computed in parts."""

from __future__ import annotations

from itertools import pairwise

from fusecell.compiler.ir.graph import SAVED, Builder, Graph, rebuild
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.traversal import resolve
from fusecell.compiler.transforms.uses import results, users_of

__all__ = ["save_in_parts", "sink_slices"]


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
    users, outputs = users_of(graph), results(graph)
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
        if start == 0 and stop == node.size:
            return []
        if node.op == "broadcast":  # of one number, or of a weight's
            return [(arg, start, stop) for arg in node.args if builder.size(arg) != 1]
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
            args = [self._table[arg, start, stop] for arg, _, _ in self._needs(builder, part)] or node.args
            return builder.add("broadcast", *args, name=name, size=stop - start)
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
