"""Check a graph as a whole before anything is compiled from it.

Generated code checks no bounds as it runs: it reads and writes as much as its graph says. So every graph is checked
here first, whether it was traced in this process, read from a file, or given to the torch operator. A kernel of a graph
that passes stays within the memory that its types describe.

========  ====================================================================================================
role      its results, by label
========  ====================================================================================================
step      ``output``; ``state.<name>`` for each state, of the state's own type; and any of ``note.<name>``,
          ``after.<name>`` and ``saved.<name>``, all of them rows
joint     those of a step; and ``grad.input.<name>`` and ``grad.state.<name>`` of the leaf's type, and
          ``grad.weight.<name>``, a sum of the leaf's shape. Its last inputs are ``grad.output`` and
          ``grad.<state>``, of the types of what they are the gradients of; see :func:`gradient_leaf`
gradient  ``state.grad.<name>`` for each of its states, ``grad.input.<name>`` and ``grad.weight.<name>``
========  ====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusecell.compiler.ir.axes import AXIS_PRIMITIVES, work_of
from fusecell.compiler.ir.graph import MOST_LABEL, NAME, Graph
from fusecell.compiler.ir.primitives import PRIMITIVES, Type
from fusecell.compiler.ir.storage import Storage
from fusecell.errors import CompilerError, quoted

__all__ = ["GraphLimits", "Role", "check_graph", "gradient_leaf"]

Role = Literal["step", "joint", "gradient"]
_LEAVES = ("input", "state", "weight")
_STEP_LABELS = ("note.", "after.", "saved.")


def gradient_leaf(state: str) -> str:
    """Name the gradient of a state among the leaves of a graph.

    That of the output is ``grad.output``, so a state of this name has another, and one of that other name too.
    """
    return f"grad.{'state.' if state == 'output' or state.startswith('state.') else ''}{state}"


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Limits of a graph's size.

    Arguments:
        nodes: values of a graph, arguments of one of them, and results.
        features: numbers per row of all its values together.
        elements: of its weights, and of the gradients of weights, together.
        work: elements that its primitives of axes combine for a row, together.
    """

    nodes: int = 1 << 20
    features: int = 1 << 40
    elements: int = 1 << 40
    work: int = 1 << 40


_OWN_STEP = GraphLimits()
"""Limits for a user's own step: far below what overflows addresses of 64 bits."""


def check_graph(graph: Graph, role: Role = "step", limits: GraphLimits = _OWN_STEP) -> None:
    """Check a graph against its contract.

    Arguments:
        role: ``step`` without a gradient, ``joint`` with its gradient, or ``gradient`` alone.
        limits: what it must not exceed; narrower for graphs of files.

    Raises:
        CompilerError: where it breaks the contract, with the value or result that does.
    """
    if not NAME.fullmatch(graph.title) or graph.dtype not in ("f32", "f64"):
        raise CompilerError(f"a graph has a title and computes in f32 or f64, got {quoted(graph.title)}, {graph.dtype}")
    leaves = _check_nodes(graph, limits)
    _check_size(graph, limits)
    _check_stored(graph)
    types: dict[str, Type] = {}
    for label, index in graph.outputs.items():
        if type(index) is not int or not 0 <= index < len(graph.nodes):
            raise CompilerError(f"the result {quoted(label)} is none of the graph's values")
        if not label.isprintable() or len(label) > MOST_LABEL:
            raise CompilerError(
                f"a result is called {quoted(label)}, expected up to {MOST_LABEL} characters that print"
            )
        types[label] = graph[index].type
    _check_states(types, leaves["state"])
    if role != "gradient" and "output" not in types:
        raise CompilerError("the result 'output' is missing")
    for label, type_ in types.items():
        _check_result(label, type_, leaves, role)
    if role == "joint":
        _check_incoming(types["output"], leaves)


def _check_nodes(graph: Graph, limits: GraphLimits) -> dict[str, dict[str, Type]]:
    """Check each value; return the leaves' types by primitive and name."""
    if max(len(graph.nodes), len(graph.outputs)) > limits.nodes:
        raise CompilerError(f"{len(graph.nodes)} values and {len(graph.outputs)} results are more than {limits.nodes}")
    leaves: dict[str, dict[str, Type]] = {op: {} for op in _LEAVES}
    names: set[str] = set()
    for index, node in graph:
        primitive = PRIMITIVES.get(node.op)
        if primitive is None:
            raise CompilerError(f"no primitive is called {quoted(node.op)}")
        if not NAME.fullmatch(node.name) or node.name in names:
            raise CompilerError(f"the name {quoted(node.name)} is taken, or none of up to 256 letters, digits, _ and .")
        if len(node.args) > limits.nodes or not all(0 <= arg < index for arg in node.args):
            raise CompilerError(f"{node.name} has too many arguments, or takes what is not computed before it")
        result = primitive.result(node.op, [graph[arg].type for arg in node.args], node.attrs)
        if result != node.type:
            raise CompilerError(f"{node.name} is {result}, not {node.type}")
        names.add(node.name)
        if node.op in leaves:
            leaves[node.op][node.name] = node.type
    return leaves


def _check_size(graph: Graph, limits: GraphLimits) -> None:
    # A chunk has memory for some of the values, row by row, and a gradient for each weight: the sums bound both.
    features = sum(node.type.shape[0] for _, node in graph if node.type.kind in ("row", "mask"))
    elements = sum(math.prod(node.type.shape) for _, node in graph if node.type.kind in ("weight", "sum"))
    if features > limits.features:
        raise CompilerError(f"its values have {features:,} features together, more than {limits.features:,}")
    if elements > limits.elements:
        raise CompilerError(f"its weights have {elements:,} elements together, more than {limits.elements:,}")
    # Of few features a contraction can have any number of terms.
    combined = sum(
        work_of(node.op, [graph[arg].type for arg in node.args], node.attrs)
        for _, node in graph
        if node.op in AXIS_PRIMITIVES
    )
    if combined > limits.work:
        raise CompilerError(f"its nests combine {combined:,} elements for each row, more than {limits.work:,}")


def _check_stored(graph: Graph) -> None:
    """Check that weights of another format are float32 ones of products: nothing else can read them."""
    for index, users in enumerate(graph.users()):
        node = graph[index]
        if "stored" not in node.attrs:
            continue
        if Storage(node.attrs["stored"]).multiplies_pairs:
            raise CompilerError(f"{node.name} is stored as {node.attrs['stored']}, which the compiler alone decides")
        if graph.dtype != "f32":
            raise CompilerError(f"{node.name} is stored as {node.attrs['stored']} in a graph of {graph.dtype}")
        for user in users:
            if graph[user].op not in ("product", "affine"):
                raise CompilerError(f"{graph[user].name} reads {node.name}, which is stored for products alone")


def _check_states(types: Mapping[str, Type], states: Mapping[str, Type]) -> None:
    """Check that each state has one new value, of the state's own type: it is written to the memory of the state."""
    for name, state in states.items():
        after = types.get(f"state.{name}")
        if after is None:
            raise CompilerError(f"the result 'state.{name}', the state's new value, is missing")
        if after != state:
            raise CompilerError(f"the new value of state {name} is {after}, expected {state}")


def _check_result(label: str, result: Type, leaves: Mapping[str, Mapping[str, Type]], role: Role) -> None:
    for prefix, op in (("grad.input.", "input"), ("grad.state.", "state"), ("grad.weight.", "weight")):
        if label.startswith(prefix) and role != "step" and (role == "joint" or op != "state"):
            leaf = leaves[op].get(label.removeprefix(prefix))
            # The gradient with respect to a leaf need not read the leaf.
            if leaf is None and role == "joint":
                raise CompilerError(f"the result {quoted(label)} is the gradient of no {op}")
            if result.kind != ("sum" if op == "weight" else "row") or (leaf is not None and result.shape != leaf.shape):
                raise CompilerError(f"the result {quoted(label)} is {result}, the gradient of {leaf or op}")
            return
    if label.startswith("state."):
        if label.removeprefix("state.") not in leaves["state"]:
            raise CompilerError(f"the result {quoted(label)} is the new value of no state")
    elif role == "gradient" or not (label == "output" or label.startswith(_STEP_LABELS)):
        raise CompilerError(f"a {role} has no result {quoted(label)}")
    if result.kind != "row":
        raise CompilerError(f"the result {quoted(label)} is {result}, expected a row")


def _check_incoming(output: Type, leaves: Mapping[str, Mapping[str, Type]]) -> None:
    """Check the inputs of a joint graph that are gradients."""
    expected = {"grad.output": output, **{gradient_leaf(name): state for name, state in leaves["state"].items()}}
    for name, like in expected.items():
        leaf = leaves["input"].get(name)
        if leaf != like:
            raise CompilerError(f"its input {name} is {leaf or 'missing'}, expected {like}")
