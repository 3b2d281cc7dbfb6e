"""Represent a step as a graph of primitives with one canonical text.

The text is what people read, the key of the cache, the payload of a saved stream and the argument of the torch
operator. Parsing checks every line and executes nothing; `ir.contract` checks a graph as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecell.compiler.ir.primitives import ARGUMENTS, PRIMITIVES, Type
from fusecell.compiler.ir.sizes import DType
from fusecell.errors import CompilerError, quoted
from fusecell.strict_json import parse_json

__all__ = ["MOST_LABEL", "NAME", "SAVED", "Builder", "Graph", "Node"]

SAVED = "saved."
"""Prefix of the names of values saved for the backward: outputs of the forward, inputs of the backward."""
NAME = re.compile(r"[\w.]{1,256}")
"""Names of values: up to 256 letters, digits, underscores and points."""
MOST_LABEL = 512
"""Characters of the label of a result, at the most."""
# No part of it can match in more than one way, so that no line, of whatever file, takes more than linear time.
_VALUE = re.compile(r"(?P<name>[\w.]+) = (?P<op>\w+)\((?P<args>[\w., ]*)\)(?: (?P<attrs>\{.*\}))?")
_ATTRIBUTE_DEPTH = 4
"""Nesting of attributes, at the most: those of an affine are a dict of lists of dicts of lists."""


@dataclass(frozen=True, slots=True)
class Node:
    """One value: a primitive, its arguments as indices of earlier nodes, its static attributes, its type."""

    name: str
    op: str
    args: tuple[int, ...]
    attrs: Mapping[str, Any]
    type: Type

    @property
    def size(self) -> int:
        return self.type.size


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed, and the named results among them."""

    title: str
    dtype: DType
    nodes: tuple[Node, ...]
    outputs: Mapping[str, int]

    def __iter__(self) -> Iterator[tuple[int, Node]]:
        return iter(enumerate(self.nodes))

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def leaves(self, op: str) -> list[int]:
        """List the nodes of a leaf primitive, ``input``, ``state`` or ``weight``, in order."""
        return [index for index, node in self if node.op == op]

    def users(self) -> list[list[int]]:
        """List for each node the nodes that take it as an argument."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in self:
            for arg in node.args:
                users[arg].append(index)
        return users

    def reaches(self, start: Iterable[int]) -> list[bool]:
        """Return, for each node, whether it is or depends on one of ``start``."""
        reached = [False] * len(self.nodes)
        sources = set(start)
        for index, node in self:
            reached[index] = index in sources or any(reached[arg] for arg in node.args)
        return reached

    def needed(self, results: Iterable[int]) -> list[bool]:
        """Return, for each node, whether one of ``results`` is it or depends on it."""
        needed = [False] * len(self.nodes)
        for index in results:
            needed[index] = True
        # Arguments come before their users: one pass from the end visits a node after all that may need it.
        for index in range(len(self.nodes) - 1, -1, -1):
            if needed[index]:
                for arg in self.nodes[index].args:
                    needed[arg] = True
        return needed

    @property
    def text(self) -> str:
        """The canonical text; equal graphs have equal texts."""
        lines = [f"graph {self.title} {self.dtype}"]
        lines += [_line(self.nodes, index) for index in range(len(self.nodes))]
        lines += [f"return {label} = {self.nodes[index].name}" for label, index in self.outputs.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Graph:
        """Parse the canonical text of a graph.

        Raises:
            CompilerError: naming the line, if it is not the text of a valid graph.
        """
        lines = text.split("\n")
        head = re.fullmatch(r"graph (\w{1,256}) (f32|f64)", lines[0])
        if head is None:
            raise CompilerError("not a graph: the first line must be 'graph <title> <f32 or f64>'")
        if lines.pop():
            raise CompilerError("not a graph: it ends in the middle of a line")
        builder = Builder(head[1], DType(head[2]))
        names: dict[str, int] = {}
        outputs: dict[str, int] = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                if line.startswith("return "):
                    _parse_return(names, outputs, line)
                elif outputs:
                    raise CompilerError("a value after a return: values come first")
                else:
                    _parse_line(builder, names, line)
            except (CompilerError, ValueError) as error:
                raise CompilerError(f"line {number} of the graph, {quoted(line, 120)}: {error}") from error
        return builder.build(outputs, keep_all=True)


def _parse_return(names: Mapping[str, int], outputs: dict[str, int], line: str) -> None:
    # A label is free text, as a cell may note a value under any name that prints; so the value is split off at the end.
    label, equals, name = line.removeprefix("return ").rpartition(" = ")
    if not equals or not label or not label.isprintable() or len(label) > MOST_LABEL:
        raise CompilerError("expected return label = name, and a label that prints")
    if label in outputs:
        raise CompilerError("the label is taken")
    outputs[label] = _index(names, name)


def _index(names: Mapping[str, int], name: str) -> int:
    if name not in names:
        raise CompilerError(f"there is no value {quoted(name)} before it")
    return names[name]


def _parse_line(builder: Builder, names: dict[str, int], line: str) -> None:
    value, _, type_ = line.rpartition(" : ")
    match = _VALUE.fullmatch(value)
    if match is None or not NAME.fullmatch(match["name"]):
        raise CompilerError("expected name = op(arguments) {attributes} : type, and names of up to 256 characters")
    if match["name"] in names:
        raise CompilerError("the name is taken")
    args = [_index(names, name) for name in match["args"].split(", ")] if match["args"] else []
    attrs = parse_json(match["attrs"], _ATTRIBUTE_DEPTH) if match["attrs"] else {}
    index = builder.append(match["op"], args, attrs, match["name"])
    if str(builder.nodes[index].type) != type_:
        raise CompilerError(f"the type is {builder.nodes[index].type}")
    # One spelling for each graph: its text is the key of caches.
    if _line(builder.nodes, index) != line:
        raise CompilerError(f"expected it spelled as {quoted(_line(builder.nodes, index), 120)}")
    names[match["name"]] = index


def _line(nodes: Sequence[Node], index: int) -> str:
    """Return a node's line of the text."""
    node = nodes[index]
    args = ", ".join([nodes[arg].name for arg in node.args])
    attrs = " " + json.dumps(node.attrs, sort_keys=True) if node.attrs else ""
    return f"{node.name} = {node.op}({args}){attrs} : {node.type}"


@dataclass
class Builder:
    """Builder of a graph, node by node; the same primitive of the same arguments is one node (hash-consing)."""

    title: str
    dtype: DType
    nodes: list[Node] = field(default_factory=list)
    _computed: dict[object, int] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)

    def add(self, op: str, /, *args: int, name: str | None = None, **attrs: Any) -> int:
        """Return the node for ``op`` of ``args``, added if it isn't there yet."""
        # Arguments that may change places are sorted: a + b and b + a are one node, and one text.
        if PRIMITIVES[op].commutes:
            args = tuple(sorted(args))
        key = (op, args, _frozen(attrs))
        # Two inputs of one shape, or two weights, are two values.
        node = None if op in ARGUMENTS else self._computed.get(key)
        if node is None:
            node = self._computed[key] = self.append(op, args, attrs, name)
        return node

    def add_like(self, node: Node, args: Sequence[int]) -> int:
        """Add the same primitive as ``node``, of other arguments."""
        return self.add(node.op, *args, name=node.name, **node.attrs)

    def append(self, op: str, args: Sequence[int], attrs: Mapping[str, Any], name: str | None) -> int:
        """Add a new node and check it."""
        primitive = PRIMITIVES.get(op)
        if primitive is None:
            raise CompilerError(f"no primitive is called {quoted(op)}")
        kind = primitive.result(op, [self.nodes[arg].type for arg in args], attrs)
        self.nodes.append(Node(self._unique(name or primitive.label or op), op, tuple(args), dict(attrs), kind))
        return len(self.nodes) - 1

    def const(self, value: float) -> int:
        """Add a number."""
        return self.add("const", value=float(value), name=_const_name(value))

    def size(self, index: int) -> int:
        return self.nodes[index].size

    def build(self, outputs: Mapping[str, int], *, keep_all: bool = False) -> Graph:
        """Return the graph that ``outputs`` need; inputs, states and weights stay even if unused."""
        graph = Graph(self.title, self.dtype, tuple(self.nodes), dict(outputs))
        return graph if keep_all else rebuild(graph, copy(graph))

    def _unique(self, name: str) -> str:
        name = re.sub(r"[^\w.]", "_", name)
        if not NAME.fullmatch(name):  # longer than a name may be; there is room for a number behind it
            name = name[:200]
        # Each name remembers its next number: to try them from 1 again would be quadratic.
        while (count := self._names.get(name)) is not None:
            self._names[name] = count + 1
            name = f"{name}.{count}"
        self._names[name] = 1
        return name


Rewrite = Callable[[Builder, int, tuple[int, ...]], int]


def rebuild(graph: Graph, rewrite: Rewrite) -> Graph:
    """Build a graph anew by ``rewrite(builder, old_index, new_arguments) -> new_index``, without dead nodes."""
    builder = Builder(graph.title, graph.dtype)
    needed = graph.needed(graph.outputs.values())
    new: list[int] = []
    for index, node in graph:
        if needed[index] or node.op in ARGUMENTS:
            new.append(rewrite(builder, index, tuple(new[arg] for arg in node.args)))
        else:
            new.append(-1)
    outputs = {label: new[index] for label, index in graph.outputs.items()}
    result = Graph(builder.title, builder.dtype, tuple(builder.nodes), outputs)
    # The rewrite itself may leave nodes behind that nothing needs any more.
    used = result.needed(outputs.values())
    if all(used[index] or node.op in ARGUMENTS for index, node in result):
        return result
    return rebuild(result, copy(result))


def copy(graph: Graph) -> Rewrite:
    """Return the rewrite that changes nothing."""
    return lambda builder, index, args: builder.add_like(graph[index], args)


def _frozen(value: Any) -> object:
    """Return attributes as a key; numbers by their text, as 0.0 and -0.0 are equal and NaN differs from itself."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return (type(value).__name__, repr(value)) if isinstance(value, float) else value


def _const_name(value: float) -> str:
    return "c" + f"{value:g}".replace("-", "m").replace("+", "")
