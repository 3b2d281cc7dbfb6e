"""Passes that make accumulations of products and sums, and split off the part that can leave the loop."""

from __future__ import annotations

from collections.abc import Sequence

from fusecell.compiler.ir.affine import Term, affine_parts
from fusecell.compiler.ir.graph import Builder, Graph, Node, rebuild
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.transforms.uses import results, users_of

__all__ = ["gather_affines", "split_affines"]


def gather_affines(graph: Graph) -> Graph:
    """Gather products and the values added to them in one accumulation: init + sum of products, in one fixed order.

    First the init, a weight or a value that needs x only; then the terms that need x only; then the rest as written. A
    kernel keeps the sums in registers from the init to the last term. The order gives results the same bits however the
    step was written, and lets `split_affines` take the terms of x off the front without changing any.

    An affine may take in more only while it is ``open_``: its only user is the addition that would take it in, and it
    is no output. For any other user it would have to be computed twice.
    """
    users, outputs = users_of(graph), results(graph)
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


def _affine(builder: Builder, init: int | None, terms: Sequence[Term], name: str) -> int:
    args = [] if init is None else [init]
    for row, weight, _ in terms:
        args += [row, weight]
    attrs = [{key: term[2][key] for key in ("transposed", "rows", "cols")} for term in terms]
    return builder.add("affine", *args, name=name, init=init is not None, terms=attrs)
