"""A step and its gradient as two graphs, and the values that the first keeps for the second.

What is kept is the smallest set, in numbers per row and step, from which the backward can work out all it needs
without computing a product, a reduction or a transcendental function twice: a minimum cut of the joint graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from fusecell.compiler.ir.graph import SAVED, Builder, Graph, Node
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import padded

__all__ = ["ForwardBackward", "partition"]

_MANY = 2.0**20
"""More than all features of a step together; a power of two, so that sums of widths are exact."""


@dataclass(frozen=True)
class ForwardBackward:
    """The forward, with outputs ``saved.<name>``, and the backward, with inputs of the same names.

    The backward runs from the last step to the first. Its states are ``grad.<state>``, its other inputs ``grad.output``
    and those of the forward's that it reads; its outputs ``grad.input.<name>`` and ``grad.weight.<leaf>``.
    """

    forward: Graph
    backward: Graph
    saved: tuple[tuple[str, int], ...]
    """Each kept value's name and features."""


def partition(joint: Graph, wanted: Collection[str], *, recompute: bool = False) -> ForwardBackward:
    """Part a graph traced with gradients.

    Arguments:
        joint: the step and its gradient, before any pass.
        wanted: the gradients that are asked for, ``grad.input.<name>`` and ``grad.weight.<leaf>``.
        recompute: keep the states alone; the backward computes everything else again.
    """
    after = {label: index for label, index in joint.outputs.items() if label.startswith("state.")}
    forward = {"output": joint.outputs["output"], **after}
    backward = {
        label: index for label, index in joint.outputs.items() if label in wanted or label.startswith("grad.state.")
    }
    late = joint.reaches(index for index in joint.leaves("input") if joint[index].name.startswith("grad."))
    demanded = _demanded(joint, backward.values(), late)
    first = joint.needed(forward.values())
    if recompute:
        reached = joint.needed(demanded)
        kept = [index for index in joint.leaves("state") if reached[index]]
    else:
        kept = _MinCut(joint, first, demanded).smallest()
    saved = {f"{SAVED}{joint[index].name}": index for index in kept}
    return ForwardBackward(
        _copied(joint, {**forward, **saved}, {}, "step", keep_states=True),
        _backward(joint, backward, {index: name for name, index in saved.items()}),
        tuple((name, joint[index].size) for name, index in saved.items()),
    )


def _demanded(joint: Graph, results: Collection[int], late: list[bool]) -> list[int]:
    """The values independent of the incoming gradient that the gradient's own computations read."""
    needed = joint.needed(results)
    found: dict[int, None] = {}
    for index, node in joint:
        if needed[index] and (late[index] or node.type.kind == "sum"):
            found.update(dict.fromkeys(arg for arg in node.args if not late[arg]))
    found.update(dict.fromkeys(index for index in results if not late[index]))
    return [index for index in found if joint[index].type.kind != "sum"]


def _free(node: Node) -> bool:
    """What the backward has at hand: inputs, numbers, and whatever needs weights alone."""
    return node.op in ("input", "const") or node.type.kind == "weight"


class _MinCut:
    """The smallest set of values that separates what is dear to compute from what the backward reads.

    Each value is an edge from its ``2i`` to its ``2i + 1``, as wide as the memory it would take; flow that can pass
    is what would have to be kept.
    """

    def __init__(self, joint: Graph, first: list[bool], demanded: Collection[int]) -> None:
        self.joint = joint
        self.source, self.sink = -1, -2
        self.room: dict[int, dict[int, float]] = {}
        reached = joint.needed(demanded)
        unfinished = _unfinished(joint, first)
        for index, node in joint:
            if not reached[index] or _free(node):
                continue
            # Whole vectors count; among sets of as many, numbers do, and then whether they are at hand.
            width = padded(node.size) + (node.size + 0.5 * unfinished[index]) / _MANY
            # A truth value is worked out again from numbers.
            self._edge(2 * index, 2 * index + 1, float("inf") if node.type.kind == "mask" else width)
            if node.op == "state" or (first[index] and not PRIMITIVES[node.op].cheap):
                self._edge(self.source, 2 * index, float("inf"))
            for arg in node.args:
                if not _free(joint[arg]):
                    self._edge(2 * arg + 1, 2 * index, float("inf"))
        for index in demanded:
            if not _free(joint[index]):
                self._edge(2 * index + 1, self.sink, float("inf"))

    def _edge(self, start: int, stop: int, width: float) -> None:
        self.room.setdefault(start, {})[stop] = width
        self.room.setdefault(stop, {}).setdefault(start, 0.0)

    def smallest(self) -> list[int]:
        """The values to keep, in the order of the graph: of all smallest cuts the one nearest to the source."""
        while self.sink in (distances := self._distances()):
            self._block(distances)
        near = distances
        return sorted(node // 2 for node in near if node >= 0 and node % 2 == 0 and node + 1 not in near)

    def _distances(self) -> dict[int, int]:
        """Every node that flow can still reach, and over how many edges at least."""
        found, queue = {self.source: 0}, deque([self.source])
        while queue:
            here = queue.popleft()
            for there, room in self.room.get(here, {}).items():
                if room > 0 and there not in found:
                    found[there] = found[here] + 1
                    queue.append(there)
        return found

    def _block(self, distances: dict[int, int]) -> None:
        """Send flow along shortest ways until each has a full edge: Dinic's blocking flow.

        Each edge of a way leads one further from the source; one that leads nowhere is left out from then on.
        """
        onward = {
            node: iter([there for there in self.room[node] if distances.get(there) == distance + 1])
            for node, distance in distances.items()
            if node in self.room
        }
        heads: dict[int, int | None] = {}
        path = [self.source]
        while path:
            here = path[-1]
            if here == self.sink:
                path = path[: self._push(path) + 1]
                continue
            if here not in heads:
                heads[here] = next(onward[here], None)
            there = heads[here]
            if there is None:
                path.pop()
                if path:
                    heads[path[-1]] = next(onward[path[-1]], None)
            elif self.room[here][there] > 0:
                path.append(there)
            else:
                heads[here] = next(onward[here], None)

    def _push(self, path: list[int]) -> int:
        """Send what a way can take along it; returns the position of its first edge that is full now."""
        edges = list(pairwise(path))
        least = min(self.room[start][stop] for start, stop in edges)
        for start, stop in edges:
            self.room[start][stop] -= least
            self.room[stop][start] += least
        return next(place for place, (start, stop) in enumerate(edges) if self.room[start][stop] <= 0)


def _unfinished(joint: Graph, first: list[bool]) -> list[bool]:
    """For each node, whether it is a product to which the step adds more: only the sum is ever at hand."""
    users = joint.users()
    found = [False] * len(joint.nodes)
    accumulates = [False] * len(joint.nodes)
    for index, node in joint:
        accumulates[index] = node.op == "product" or (node.op == "add" and any(accumulates[arg] for arg in node.args))
        adding = [user for user in users[index] if first[user]]
        found[index] = accumulates[index] and len(adding) == 1 and joint[adding[0]].op == "add"
    return found


def _copied(
    graph: Graph, outputs: dict[str, int], leaves: dict[int, tuple[str, str]], title: str, *, keep_states: bool
) -> Graph:
    """The part of a graph that ``outputs`` need, with some values turned into leaves: (primitive, name)."""
    builder = Builder(title, graph.dtype)
    needed = _needed_before(graph, outputs.values(), leaves)
    new: dict[int, int] = {}
    for index, node in graph:
        if not needed[index] and not (keep_states and node.op == "state"):
            continue
        if index in leaves:
            op, name = leaves[index]
            new[index] = builder.append(op, (), {"shape": [node.size]}, name)
        else:
            new[index] = builder.add_like(node, [new[arg] for arg in node.args])
    return Graph(title, graph.dtype, tuple(builder.nodes), {label: new[index] for label, index in outputs.items()})


def _needed_before(graph: Graph, results: Collection[int], leaves: Collection[int]) -> list[bool]:
    """For each node, whether ``results`` need it once the arguments of ``leaves`` need nothing."""
    found = [False] * len(graph.nodes)
    for index in results:
        found[index] = True
    for index in range(len(found) - 1, -1, -1):
        if found[index] and index not in leaves:
            for arg in graph[index].args:
                found[arg] = True
    return found


def _backward(joint: Graph, outputs: dict[str, int], saved: dict[int, str]) -> Graph:
    names = {joint[index].name: index for index in joint.leaves("input")}
    states = [joint[index].name for index in joint.leaves("state")]
    leaves = {index: ("input", name) for index, name in saved.items()}
    leaves |= {names[f"grad.{state}"]: ("state", f"grad.{state}") for state in states}
    results = {label: index for label, index in outputs.items() if not label.startswith("grad.state.")}
    carried = {f"state.grad.{state}": outputs.get(f"grad.state.{state}") for state in states}
    results |= {label: index for label, index in carried.items() if index is not None}
    made = _copied(joint, results, leaves, "gradient", keep_states=False)
    return _with_all_states(made, joint, carried)


def _with_all_states(made: Graph, joint: Graph, carried: dict[str, int | None]) -> Graph:
    """Every state in the cell's order; one that no gradient flows back through goes on with zeros."""
    builder = Builder(made.title, made.dtype)
    states = [joint[index] for index in joint.leaves("state")]
    leaves = {
        f"grad.{node.name}": builder.append("state", (), {"shape": [node.size]}, f"grad.{node.name}") for node in states
    }
    new: dict[int, int] = {}
    for index, node in made:
        if node.op == "state":
            new[index] = leaves[node.name]
        else:
            new[index] = builder.append(node.op, [new[arg] for arg in node.args], node.attrs, node.name)
    outputs = {label: new[index] for label, index in made.outputs.items()}
    for node in states:
        if carried[f"state.grad.{node.name}"] is None:
            zeros = builder.add("broadcast", builder.const(0.0), size=node.size)
            outputs[f"state.grad.{node.name}"] = zeros
    return Graph(made.title, made.dtype, tuple(builder.nodes), outputs)
