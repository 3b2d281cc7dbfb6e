"""Name values after the user's variables: ``z``, and what ``z`` is computed from ``z.pre``, ``z.input``, ``z.bias``.

A value that the step assigns to a variable, or notes, has that name. Others are named after the one variable that they
are a part of, by their role in it:

=======  ===================================================================================
new      the new value of a state: ``h.new``
pre      what an activation is applied to: ``r = sigmoid(r.pre)``
input    a part of it that is a product, or a sum of products, with x and no state
hidden   a part of it that is a product, or a sum of products, with a state
bias     a vector of weights that an accumulation starts from
=======  ===================================================================================

A part of a vector of weights has the weight's name first, ``bias_ih.z``, and a function of a variable the variable's,
``c.new.tanh``. A value that is no such part, or a part of several variables, is called by its primitive: ``mul``,
``mul.1``. Names are unique and for people only: no pass or kernel depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from fusecell.compiler.ir.graph import Graph, copy, rebuild
from fusecell.compiler.ir.primitives import PRIMITIVES

__all__ = ["name_values", "restore_names"]

_SUFFIXES = ("new", "pre", "input", "hidden", "bias")
_GRADIENT = "grad."
# A graph's names have up to 256 characters: the rest is for the suffixes that passes and numbering append.
_LONGEST_VARIABLE, _LONGEST = 120, 200


def name_values(graph: Graph, variables: Mapping[int, str]) -> Graph:
    """Name a traced graph's values after variables, and the parts of variables after them; drop values without users.

    Arguments:
        variables: the names of some nodes; leaves keep their own.
    """
    names = {index: node.name for index, node in graph if PRIMITIVES[node.op].leaf}
    unique = _UniqueNames(names.values())
    for index, name in variables.items():
        if index not in names:
            names[index] = unique.like(re.sub(r"[^\w.]", "_", name)[:_LONGEST_VARIABLE])
    others = (index for index, _ in graph if index not in names)
    for index in others:
        names[index] = unique.like(graph[index].name)
    of_variables = {names[index] for index in variables}
    graph = replace(graph, nodes=tuple(replace(node, name=names[index]) for index, node in graph))
    graph = rebuild(graph, copy(graph))
    fixed = {index: node.name for index, node in graph if PRIMITIVES[node.op].leaf or node.name in of_variables}
    return _named(graph, fixed, {index: node.name for index, node in graph})


def restore_names(graph: Graph, traced: Graph) -> Graph:
    """Give the values of a graph whose passes have run the names that they had when they were traced.

    Passes take values apart and call the pieces ``z.pre``, ``z.pre.1`` and so on. The last of them is the value
    itself, as a value comes after its arguments.
    """
    names = {node.name for node in traced.nodes}
    stems = {index: _stem(node.name, names) for index, node in graph}
    last = {stems[index]: index for index, node in graph if node.type.kind != "weight"}
    fixed = {index: node.name for index, node in graph if PRIMITIVES[node.op].leaf}
    leaves = set(fixed.values())
    fixed |= {index: stem for stem, index in last.items() if stem and stem not in leaves}
    return _named(graph, fixed, {index: stems[index] or node.op for index, node in graph})


def _stem(name: str, names: Collection[str]) -> str:
    """Return the longest beginning of a name, part by part, that is one of ``names``."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name


def _named(graph: Graph, fixed: Mapping[int, str], otherwise: Mapping[int, str]) -> Graph:
    """Name each value that isn't ``fixed`` by its role in a variable, or by ``otherwise``."""
    # Backwards: the name of a value follows from those of its users.
    names, unique = dict(fixed), _UniqueNames(fixed.values())
    users, parts = graph.users(), _Parts(graph, fixed)
    for index in range(len(graph.nodes) - 1, -1, -1):
        name = parts.name(index, users[index])
        if index not in names and 0 < len(name) <= _LONGEST and name not in unique:
            names[index] = unique.like(name)
    for index, _ in graph:
        if index not in names:
            names[index] = unique.like(otherwise[index])
    return replace(graph, nodes=tuple(replace(node, name=names[index]) for index, node in graph))


class _UniqueNames:
    """Set of names in use, with the next free number for each."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._next = dict.fromkeys(taken, 1)

    def __contains__(self, name: str) -> bool:
        return name in self._next

    def like(self, name: str) -> str:
        """Take a name, with the first free number behind it if it is taken already.

        Numbers are not tried again from 1: that would be quadratic in a step of a thousand sums.
        """
        free = name
        while free in self._next:
            free = f"{name}.{self._next[name]}"
            self._next[name] += 1
        self._next[free] = 1
        return free


class _Parts:
    """Names of values that are a part of one variable, by their role in it.

    Attributes:
        variables: the variable that each value belongs to; empty where it belongs to none, or to several.
    """

    def __init__(self, graph: Graph, fixed: Mapping[int, str]) -> None:
        self.graph, self.fixed = graph, fixed
        self.depends_on_state = graph.reaches(graph.leaves("state"))
        self.accumulates = _accumulations(graph)
        self.variables: dict[int, str] = {}

    def name(self, index: int, users: Sequence[int]) -> str:
        """Return a name for a value whose users have been named; empty where it is no part of one variable."""
        node = self.graph[index]
        if index in self.fixed:
            self.variables[index] = _variable(self.fixed[index])
            return ""
        variables = {self.variables[user] for user in users if self.variables[user]}
        # A value of the step that the gradient reads as well is still the step's.
        variables = {each for each in variables if not each.startswith(_GRADIENT)} or variables
        variable = self.variables[index] = variables.pop() if len(variables) == 1 else ""
        source = self.graph[node.args[0]] if node.args else None
        if node.type.kind == "weight" and variable:
            is_part = node.op == "slice" and source is not None and source.op == "weight"
            return f"{source.name}.{variable}" if is_part and source is not None else f"{variable}.bias"
        if variable and node.type.kind == "row" and not variable.startswith(_GRADIENT):
            if any(self._is_function(user) for user in users):
                return f"{variable}.pre"
            if self.accumulates[index]:
                return f"{variable}.{'hidden' if self.depends_on_state[index] else 'input'}"
        if self._is_function(index, of_variable=True):
            return f"{self.fixed[node.args[0]]}.{node.op}"
        return ""

    def _is_function(self, index: int, *, of_variable: bool = False) -> bool:
        """Whether a value is a function of one other: of any for a variable, or of a variable."""
        node = self.graph[index]
        primitive = PRIMITIVES[node.op]
        if not primitive.pointwise or primitive.arity != 1:
            return False
        return primitive.expensive and node.args[0] in self.fixed if of_variable else index in self.fixed


def _variable(name: str) -> str:
    """Return the variable that a name belongs to: ``z`` of ``z.pre``."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix in _SUFFIXES else name


def _accumulations(graph: Graph) -> list[bool]:
    """Tell of each node whether it is a product, or a sum or a slice of products."""
    accumulates = [False] * len(graph.nodes)
    for index, node in graph:
        passes_on = node.op in ("add", "slice") and any(accumulates[arg] for arg in node.args)
        accumulates[index] = PRIMITIVES[node.op].category == "product" or passes_on
    return accumulates
