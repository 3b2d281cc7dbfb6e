"""Partition a joint graph into forward and backward, and choose the values that the forward saves for the backward.

It saves the smallest set, in numbers per row and step, from which the backward can compute all it needs without
computing a product, a reduction or a transcendental function twice: a minimum cut of the joint graph.

To save less and recompute the rest is the idea of Chen et al., "Training deep nets with sublinear memory cost"
(arXiv:1604.06174), who choose by hand. To choose by a minimum cut, in which cheap operations are free, is that of
functorch's ``min_cut_rematerialization_partition``. Here memory is all that counts: the backward reads saved values
from L3 or from memory, and recomputes a cheap one in a register.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from fusecell.compiler.ir.graph import SAVED, Builder, Graph, Node
from fusecell.compiler.ir.graph_contract import gradient_leaf
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import padded
from fusecell.compiler.ir.storage import Storage

__all__ = ["ForwardBackward", "partition"]

_MANY = 2.0**20
"""More than all features of a step together: the unit of what decides only between equal widths. A power of two, so
that sums of widths are exact."""


@dataclass(frozen=True)
class ForwardBackward:
    """Forward graph, with outputs ``saved.<name>``, and backward graph, with inputs of the same names.

    The backward runs from the last step to the first. Its states are ``grad.<state>``, its other inputs ``grad.output``
    and those of the forward's that it reads; its outputs ``grad.input.<name>`` and ``grad.weight.<leaf>``.
    """

    forward: Graph
    backward: Graph
    saved: tuple[tuple[str, int], ...]
    """Each saved value's name and features."""


def partition(joint: Graph, gradients: Collection[str], *, recompute: bool = False) -> ForwardBackward:
    """Partition a graph traced with gradients into the step and its gradient.

    Arguments:
        joint: the step and its gradient, before any pass.
        gradients: the outputs of the backward, ``grad.input.<name>`` and ``grad.weight.<leaf>``.
        recompute: save the states alone; the backward recomputes everything else.
    """
    # Before any pass, what the step and its gradient both compute is one node. Afterwards each graph has passes of its
    # own, so that what is saved changes no bit of the forward.
    after = {label: index for label, index in joint.outputs.items() if label.startswith("state.")}
    forward = {"output": joint.outputs["output"], **after}
    backward = {
        label: index for label, index in joint.outputs.items() if label in gradients or label.startswith("grad.state.")
    }
    late = joint.reaches(index for index in joint.leaves("input") if joint[index].name.startswith("grad."))
    demanded = _demanded(joint, backward.values(), late)
    first = joint.needed(forward.values())
    if recompute:
        reached = joint.needed(demanded)
        nodes = [index for index in joint.leaves("state") if reached[index]]
    else:
        nodes = _MinCut(joint, first, demanded).values_to_save()
    saved = {f"{SAVED}{joint[index].name}": index for index in nodes}
    return ForwardBackward(
        _copied(joint, {**forward, **saved}, {}, "step", keep_states=True),
        _backward(joint, backward, {index: name for name, index in saved.items()}),
        tuple((name, joint[index].size) for name, index in saved.items()),
    )


def _demanded(joint: Graph, results: Collection[int], late: list[bool]) -> list[int]:
    """List the values independent of the incoming gradient that the gradient's own computations read."""
    needed = joint.needed(results)
    operands: dict[int, None] = {}
    for index, node in joint:
        if needed[index] and (late[index] or node.type.kind == "sum"):
            operands.update(dict.fromkeys(arg for arg in node.args if not late[arg]))
    operands.update(dict.fromkeys(index for index in results if not late[index]))
    return [index for index in operands if joint[index].type.kind != "sum"]


def _free(node: Node) -> bool:
    """Whether a value costs nothing to have in the backward: an input, a number, or a function of the weights."""
    return node.op in ("input", "const") or node.type.kind == "weight"


class _MinCut:
    """Minimum cut between the values that are expensive to compute and those that the backward reads.

    The network has an edge for each value i, from node ``2i`` to node ``2i + 1``, whose capacity is the memory that
    saving it would take. The source leads to values that are expensive, or states; values that the backward reads lead
    to the sink. Edges from a value to its users have infinite capacity, so that a cut goes through values only. By the
    max-flow min-cut theorem the maximum flow is the capacity of the smallest cut, and the full edges that the source
    still reaches are one.

    Attributes:
        capacity: the residual capacity of each edge, by its two ends.
    """

    def __init__(self, joint: Graph, first: list[bool], demanded: Collection[int]) -> None:
        self.source, self.sink = -1, -2
        self.capacity: dict[int, dict[int, float]] = {}
        reached = joint.needed(demanded)
        unfinished = _unfinished(joint, first)
        for index, node in joint:
            if not reached[index] or _free(node):
                continue
            # Memory is in whole vectors. Of cuts of equal memory the one with fewer numbers is taken, and of these one
            # of values that the forward computes anyway, not of parts of a sum that it would have to finish apart.
            width = padded(node.size) + (node.size + 0.5 * unfinished[index]) / _MANY
            # Masks are never saved: the comparison is one instruction, and its operands are numbers.
            self._edge(2 * index, 2 * index + 1, float("inf") if node.type.kind == "mask" else width)
            # The state before a step exists in the forward alone: to have it again means to run all steps again.
            if node.op == "state" or (first[index] and not PRIMITIVES[node.op].cheap):
                self._edge(self.source, 2 * index, float("inf"))
            for arg in node.args:
                if not _free(joint[arg]):
                    self._edge(2 * arg + 1, 2 * index, float("inf"))
        for index in demanded:
            if not _free(joint[index]):
                self._edge(2 * index + 1, self.sink, float("inf"))

    def _edge(self, start: int, stop: int, width: float) -> None:
        self.capacity.setdefault(start, {})[stop] = width
        self.capacity.setdefault(stop, {}).setdefault(start, 0.0)

    def values_to_save(self) -> list[int]:
        """List the values to save, in the order of the graph: of all smallest cuts the one nearest to the source."""
        # Dinic's algorithm (1970): each turn sends flow along all shortest paths at once, as steps may have thousands
        # of values.
        while self.sink in (distances := self._distances()):
            self._send_flow(distances)
        reached = distances
        return sorted(node // 2 for node in reached if node >= 0 and node % 2 == 0 and node + 1 not in reached)

    def _distances(self) -> dict[int, int]:
        """Return the distance from the source, in edges, of every node that flow can still reach."""
        distances, queue = {self.source: 0}, deque([self.source])
        while queue:
            start = queue.popleft()
            for stop, residual in self.capacity.get(start, {}).items():
                if residual > 0 and stop not in distances:
                    distances[stop] = distances[start] + 1
                    queue.append(stop)
        return distances

    def _send_flow(self, distances: dict[int, int]) -> None:
        """Send flow along shortest paths until each has a full edge: Dinic's blocking flow.

        Each edge of a path leads one further from the source; a dead end is not entered again.
        """
        onward = {
            node: iter([stop for stop in self.capacity[node] if distances.get(stop) == distance + 1])
            for node, distance in distances.items()
            if node in self.capacity
        }
        heads: dict[int, int | None] = {}
        path = [self.source]
        while path:
            node = path[-1]
            if node == self.sink:
                path = path[: self._push(path) + 1]
                continue
            if node not in heads:
                heads[node] = next(onward[node], None)
            stop = heads[node]
            if stop is None:
                path.pop()
                if path:
                    heads[path[-1]] = next(onward[path[-1]], None)
            elif self.capacity[node][stop] > 0:
                path.append(stop)
            else:
                heads[node] = next(onward[node], None)

    def _push(self, path: list[int]) -> int:
        """Send as much flow as a path can take; return the position of its first edge that is full now."""
        edges = list(pairwise(path))
        flow = min(self.capacity[start][stop] for start, stop in edges)
        for start, stop in edges:
            self.capacity[start][stop] -= flow
            self.capacity[stop][start] += flow
        return next(position for position, (start, stop) in enumerate(edges) if self.capacity[start][stop] <= 0)


def _unfinished(joint: Graph, first: list[bool]) -> list[bool]:
    """Return, for each node, whether it is a product that the step only adds to others: just the sum is computed."""
    users = joint.users()
    unfinished = [False] * len(joint.nodes)
    accumulates = [False] * len(joint.nodes)
    for index, node in joint:
        accumulates[index] = node.op == "product" or (node.op == "add" and any(accumulates[arg] for arg in node.args))
        adding = [user for user in users[index] if first[user]]
        unfinished[index] = accumulates[index] and len(adding) == 1 and joint[adding[0]].op == "add"
    return unfinished


def _copied(
    graph: Graph, outputs: dict[str, int], leaves: dict[int, tuple[str, str]], title: str, *, keep_states: bool
) -> Graph:
    """Copy the part of a graph that ``outputs`` need, with some values replaced by leaves: (primitive, name)."""
    builder = Builder(title, graph.dtype)
    needed, narrow = _needed_before(graph, outputs.values(), leaves), _sums_of_narrow_weights(graph, outputs)
    new: dict[int, int] = {}
    for index, node in graph:
        if not needed[index] and not (keep_states and node.op == "state"):
            continue
        if index in leaves:
            op, name = leaves[index]
            new[index] = builder.append(op, (), {"shape": [node.size]}, name)
        elif index in narrow:
            attrs = {**node.attrs, "numbers": Storage.BF16.value}
            new[index] = builder.append(node.op, [new[arg] for arg in node.args], attrs, node.name)
        else:
            new[index] = builder.add_like(node, [new[arg] for arg in node.args])
    return Graph(title, graph.dtype, tuple(builder.nodes), {label: new[index] for label, index in outputs.items()})


def _sums_of_narrow_weights(graph: Graph, outputs: dict[str, int]) -> set[int]:
    """Return the products of two rows that are summed for weights of bfloat16 numbers alone."""
    names = {f"grad.weight.{graph[index].name}" for index in graph.leaves("weight") if "numbers" in graph[index].attrs}
    narrow, wide = (
        graph.needed(index for label, index in outputs.items() if label.startswith("grad.weight.") and part(label))
        for part in (names.__contains__, lambda label: label not in names)
    )
    return {index for index, node in graph if node.op == "outer" and narrow[index] and not wide[index]}


def _needed_before(graph: Graph, results: Collection[int], leaves: Collection[int]) -> list[bool]:
    """Return, for each node, whether ``results`` need it if ``leaves`` have no arguments."""
    needed = [False] * len(graph.nodes)
    for index in results:
        needed[index] = True
    for index in range(len(needed) - 1, -1, -1):
        if needed[index] and index not in leaves:
            for arg in graph[index].args:
                needed[arg] = True
    return needed


def _backward(joint: Graph, outputs: dict[str, int], saved: dict[int, str]) -> Graph:
    """Return the backward as a step of its own, whose states are the gradients of the states."""
    names = {joint[index].name: index for index in joint.leaves("input")}
    states = [joint[index].name for index in joint.leaves("state")]
    leaves = {index: ("input", name) for index, name in saved.items()}
    leaves |= {names[gradient_leaf(state)]: ("state", gradient_leaf(state)) for state in states}
    results = {label: index for label, index in outputs.items() if not label.startswith("grad.state.")}
    carried = {f"state.{gradient_leaf(state)}": outputs.get(f"grad.state.{state}") for state in states}
    results |= {label: index for label, index in carried.items() if index is not None}
    gradient = _copied(joint, results, leaves, "gradient", keep_states=False)
    return _with_all_states(gradient, joint, carried)


def _with_all_states(gradient: Graph, joint: Graph, carried: dict[str, int | None]) -> Graph:
    """Give a gradient every state, in the cell's order; the new value of one that no gradient reaches is zeros."""
    builder = Builder(gradient.title, gradient.dtype)
    states = [joint[index] for index in joint.leaves("state")]
    leaves = {
        name: builder.append("state", (), {"shape": [node.size]}, name)
        for node, name in zip(states, map(gradient_leaf, (node.name for node in states)), strict=True)
    }
    new: dict[int, int] = {}
    for index, node in gradient:
        if node.op == "state":
            new[index] = leaves[node.name]
        else:
            new[index] = builder.append(node.op, [new[arg] for arg in node.args], node.attrs, node.name)
    outputs = {label: new[index] for label, index in gradient.outputs.items()}
    for node in states:
        label = f"state.{gradient_leaf(node.name)}"
        if carried[label] is None:
            zeros = builder.add("broadcast", builder.const(0.0), size=node.size)
            outputs[label] = zeros
    return Graph(gradient.title, gradient.dtype, tuple(builder.nodes), outputs)
