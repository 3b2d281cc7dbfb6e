"""A step as a few boxes: its inputs, states and named values, each with a formula of those that it is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.step_idioms import TRANSPARENT, idiom

__all__ = ["Box", "boxes_of"]

Kind = Literal["input", "state", "value", "new state", "output"]
_ROLES = ("pre", "input", "hidden", "bias")
"""What the compiler names the parts of a variable: see `ir.naming`."""
_LONG, _LONG_SUM = 44, 60
"""Characters of a formula, and of a sum, from which it is written once."""
_LONGEST_WEIGHT = 24
"""Characters of the name of a weight; those computed of others have long ones."""
_SUM, _PRODUCT, _TIGHT = 1, 2, 3
"""How tightly a formula binds: what is looser than its place gets parentheses."""


@dataclass(frozen=True)
class Box:
    """A value of a step.

    Attributes:
        name: the user's variable, or the argument; a new state has a prime, ``h'``.
        kind: what it is in the step.
        formula: how it is computed from other boxes and from weights; empty for an argument.
        sources: the names of the boxes in the formula, each once.
        size: its features.
    """

    name: str
    kind: Kind
    formula: str
    sources: tuple[str, ...]
    size: int


def boxes_of(graph: Graph) -> list[Box]:
    """Return the boxes of a step, sources before what is computed from them.

    Arguments:
        graph: of the step as traced, before any pass.
    """
    return _Boxes(graph).list()


class _Boxes:
    """The choice of the values that are boxes, and the formulas of the others between them."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._users = graph, graph.users()
        self._needed = graph.needed(
            [index for label, index in graph.outputs.items() if label == "output" or label.startswith("state.")]
        )
        self._names = self._chosen()
        self._inside = self._hidden()
        self._name_shared()

    def list(self) -> list[Box]:
        graph, boxes = self._graph, []
        after = {index: label for label, index in graph.outputs.items() if label.startswith("state.")}
        for index, name in self._names.items():
            node = graph[index]
            if node.op in ("input", "state"):
                boxes.append(Box(name, "state" if node.op == "state" else "input", "", (), node.size))
                continue
            sources: dict[str, None] = {}
            formula, _ = _Formula(graph, self._names, sources).inside(index)
            kind: Kind = "new state" if index in after else "output" if name == "output" else "value"
            boxes.append(Box(name, kind, formula, tuple(sources), node.size))
        for label, index in graph.outputs.items():  # a state that is handed on as it is, or is another one too
            if label.startswith("state.") and self._names[index] != f"{label[6:]}'":
                source = self._names[index]
                boxes.append(Box(f"{label[6:]}'", "new state", source, (source,), graph[index].size))
        output = graph.outputs["output"]
        if not any(box.name == "output" for box in boxes):
            source = self._names[output]
            boxes.append(Box("output", "output", source, (source,), graph[output].size))
        return boxes

    def _chosen(self) -> dict[int, str]:
        """Return the values that are boxes and their names, in the graph's order."""
        graph = self._graph
        names: dict[int, str] = {}
        ends = {index: f"{label[6:]}'" for label, index in graph.outputs.items() if label.startswith("state.")}
        ends = {index: name for index, name in ends.items() if not PRIMITIVES[graph[index].op].leaf}
        taken = set(ends.values())
        for index, node in graph:
            if not self._needed[index] or node.op in ("weight", "const"):
                continue
            if index in ends:
                names[index] = ends[index]
            elif node.op in ("input", "state") or self._is_variable(node) or index == graph.outputs["output"]:
                name = "output" if index == graph.outputs["output"] and not self._is_named(node) else node.name
                while name in taken:
                    name += "_"
                names[index] = name
                taken.add(name)
        return names

    def _name_shared(self) -> None:
        """Make boxes of further values: those that several formulas, or one twice, would spell out at length."""
        graph = self._graph
        for index, node in graph:
            plain = node.op in TRANSPARENT or node.op in ("weight", "const", "concat") or index in self._names
            if (
                plain
                or index in self._inside
                or not self._needed[index]
                or node.type.kind != "row"
                or len(self._readers(index)) < 2
            ):
                continue
            formula, _ = _Formula(graph, self._names, {}).inside(index)
            if len(formula) < (_LONG_SUM if node.op in ("add", "sub") else _LONG):
                continue
            stem = _FUNCTIONS.get(node.op, node.op if node.op not in _INFIX else "sum")
            taken, name, number = set(self._names.values()), stem, 1
            while name in taken:
                name, number = f"{stem}.{number}", number + 1
            self._names = dict(sorted({**self._names, index: name}.items()))

    def _hidden(self) -> set[int]:
        """Return the values inside of known formulas: between a function's result and what it is applied to."""
        graph, hidden = self._graph, set()
        for index, _ in graph:
            known = idiom(graph, index, self._names) if self._needed[index] else None
            if known is not None:
                above, below = graph.needed([index]), graph.reaches([known[1]])
                hidden |= {each for each in range(known[1] + 1, index) if above[each] and below[each]}
        return hidden

    def _readers(self, index: int) -> set[int]:
        """Return the values whose formulas have one, or a part of it."""
        readers: set[int] = set()
        for user in self._users[index]:
            if self._needed[user]:
                inner = user in self._inside or self._graph[user].op in TRANSPARENT
                readers |= self._readers(user) if inner and user not in self._names else {user}
        return readers

    def _is_variable(self, node: Node) -> bool:
        """Whether a value is one of the step's variables, and no weight that was computed."""
        return node.type.kind in ("row", "mask") and self._is_named(node)

    @staticmethod
    def _is_named(node: Node) -> bool:
        if PRIMITIVES[node.op].leaf:
            return node.op in ("input", "state")
        stem, _, last = node.name.rpartition(".")
        while last.isdigit() and stem:
            stem, _, last = stem.rpartition(".")
        names = {node.op, PRIMITIVES[node.op].label or node.op, "part", "p", "d", "c"}
        return last not in _ROLES and last not in PRIMITIVES and not (last in names and not stem)


class _Formula:
    """Writes how a value is computed.

    Arguments:
        names: of the boxes, at which a formula ends.
        sources: takes the names of those that it has met.
    """

    def __init__(self, graph: Graph, names: Mapping[int, str], sources: dict[str, None]) -> None:
        self._graph, self._names, self._sources = graph, names, sources

    def of(self, index: int) -> tuple[str, int]:
        """Return a value's name, or its formula, and how tightly that binds."""
        if index in self._names:
            self._sources[self._names[index]] = None
            return self._names[index], _TIGHT
        return self.inside(index)

    def inside(self, index: int) -> tuple[str, int]:
        """Return the formula of a value."""
        node = self._graph[index]
        if node.op == "const":
            return f"{node.attrs['value']:g}", _TIGHT
        if node.op == "weight":
            return node.name if len(node.name) <= _LONGEST_WEIGHT else f"{node.name[: _LONGEST_WEIGHT - 1]}…", _TIGHT
        known = idiom(self._graph, index, self._names)
        if known is not None:
            name, arg = known
            return (f"{name}({self.of(arg)[0]})", _TIGHT) if name else self.of(arg)
        if node.op in TRANSPARENT:
            return self.of(node.args[0])
        if node.op in _INFIX:
            sign, level = _INFIX[node.op]
            first, second = self._bound(node.args[0], level), self._bound(node.args[1], level + (sign in "−/"))
            return f"{first} {sign} {second}" if level == _SUM else f"{first}{sign}{second}", level
        if node.op == "product":
            return f"{self._bound(node.args[1], _TIGHT)} {self._bound(node.args[0], _TIGHT)}", _PRODUCT
        if node.op == "neg":
            return f"−{self._bound(node.args[0], _PRODUCT)}", _PRODUCT
        args = [self.of(arg)[0] for arg in node.args]
        if node.op == "concat":  # of parts of one value that value
            parts = list(dict.fromkeys(args))
            return (f"[{', '.join(parts)}]" if len(parts) > 1 else parts[0]), _TIGHT
        function = node.attrs["op"] if node.op == "reduce" else node.op
        return f"{_FUNCTIONS.get(function, function)}({', '.join(args)})", _TIGHT

    def _bound(self, index: int, level: int) -> str:
        text, own = self.of(index)
        return text if own >= level else f"({text})"


_INFIX: Mapping[str, tuple[str, int]] = {
    "add": ("+", _SUM),
    "sub": ("−", _SUM),
    "mul": ("·", _PRODUCT),
    "div": ("/", _PRODUCT),
    **{op: (sign, _SUM) for op, sign in zip(("lt", "le", "gt", "ge", "eq", "ne"), "<≤>≥=≠", strict=True)},
}
_FUNCTIONS: Mapping[str, str] = {"sigmoid": "σ", "maximum": "max", "minimum": "min", "amax": "max", "amin": "min"}
