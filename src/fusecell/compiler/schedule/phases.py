"""Choose the phase in which each value is computed: once, hoisted out of the loop, in the loop, or after it.

once      values that need weights only: one row, once per call.
hoisted   values that need x but no state, and contain a product, reduction or nest: all rows of a chunk at once,
          before the loop. Compilers call this loop-invariant code motion.
loop      the chain from state to state: the rows of one step.
post      values that nothing in the loop waits for: outputs that are products of a state, the gradients of weights.

Products leave the loop because as one product over a chunk's rows they run at the rate of the multiply-adds, where a
step of few rows is bound by reading the weights again each time.

Values without a phase are cheap functions of x and numbers. Every stage that reads one computes it itself, which costs
less than a load, unless it has to be in memory for another reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.schedule.plan import PHASES, Phase

__all__ = ["Phases", "choose_phases", "row_outputs", "states_of"]


@dataclass(frozen=True)
class Phases:
    """The phases of a graph's values.

    Attributes:
        of: the phase of every value that has one.
        readers: for each node, the phases that read it, directly, in slices, or through values without a phase.
    """

    of: Mapping[int, Phase]
    readers: Sequence[frozenset[Phase]]


def states_of(graph: Graph) -> dict[str, tuple[int, int]]:
    """Pair each state's leaf with its new value, by name."""
    names = {graph[index].name: index for index in graph.leaves("state")}
    return {name: (index, graph.outputs[f"state.{name}"]) for name, index in names.items()}


def row_outputs(graph: Graph) -> dict[str, int]:
    """List the outputs that have a value per row, new states included."""
    return {label: index for label, index in graph.outputs.items() if graph[index].type.kind in ("row", "mask")}


def choose_phases(graph: Graph) -> Phases:
    """Choose a phase for each value, first for those that are costly or depend on a state, then for cheap ones."""
    phases = _phases_of_costly_values(graph)
    readers = _add_cheap_values(graph, phases)
    for index, node in graph:
        if PRIMITIVES[node.op].in_place and index not in phases and node.args[0] in phases:
            phases[index] = phases[node.args[0]]
    return Phases(phases, readers)


def _phases_of_costly_values(graph: Graph) -> dict[int, Phase]:
    phases: dict[int, Phase] = {}
    depends_on_state = graph.reaches(graph.leaves("state"))
    needed_by_state = graph.needed(new for _, new in states_of(graph).values())
    costly = graph.reaches(
        index
        for index, node in graph
        if node.op == "affine" or PRIMITIVES[node.op].reduction or PRIMITIVES[node.op].nest
    )
    for index, node in graph:
        if PRIMITIVES[node.op].leaf or node.type.kind == "sum":
            continue
        if node.type.kind == "weight":
            phases[index] = "once"
        elif depends_on_state[index]:
            # Pointwise values that no state needs stay in the loop, where their arguments are in registers.
            is_product = node.op == "affine" or any(phases.get(arg) == "post" for arg in node.args)
            phases[index] = "post" if is_product and not needed_by_state[index] else "loop"
        elif costly[index]:
            phases[index] = "hoisted"
    return phases


def _add_cheap_values(graph: Graph, phases: dict[int, Phase]) -> list[frozenset[Phase]]:
    """Give a cheap value that must be in memory the phase of the first of its readers.

    Backwards through the graph, so that the phases of all users of a value are known before its own.

    Returns:
        For each node, the phases that read it.
    """
    outputs, users = set(row_outputs(graph).values()), graph.users()
    readers: list[frozenset[Phase]] = [frozenset()] * len(graph.nodes)
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph[index]
        readers[index] = _readers(graph, phases, readers, users[index])
        if index in phases or PRIMITIVES[node.op].leaf or node.type.kind == "sum":
            continue
        # An output is stored step by step, unless a stage before the loop reads the value from memory, too.
        candidates: set[Phase] = {"loop"} if index in outputs else set()
        candidates |= readers[index]
        in_memory = node.op == "concat" or index in outputs or _is_read_whole(graph, users[index], index)
        if candidates and in_memory:
            phases[index] = min(candidates, key=PHASES.index)
    return readers


def _readers(
    graph: Graph, phases: Mapping[int, Phase], readers: Sequence[frozenset[Phase]], users: Sequence[int]
) -> frozenset[Phase]:
    reading: set[Phase] = set()
    for user in users:
        op = graph[user].op
        # Gradients of weights are summed over the rows of a chunk, after its steps.
        if PRIMITIVES[op].reads_rows:
            reading.add("post")
        elif user in phases and not PRIMITIVES[op].in_place:
            reading.add(phases[user])
        else:
            reading |= readers[user]
    return frozenset(reading)


def _is_read_whole(graph: Graph, users: Sequence[int], index: int) -> bool:
    """Whether some user reads a value from memory, though it is cheap: as an operand of a product, or in slices."""
    for user in users:
        node = graph[user]
        if PRIMITIVES[node.op].in_place or PRIMITIVES[node.op].is_whole:
            return True
        if node.op == "affine" and index in [row for row, _, _ in affine_parts(node)[1]]:
            return True
    return False
