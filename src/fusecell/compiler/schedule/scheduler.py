"""Schedule a graph: decide when each value is computed, in which stage, and in which memory it is."""

from __future__ import annotations

from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.schedule.buffer_names import with_own_buffer_names
from fusecell.compiler.schedule.buffers import assign_buffers
from fusecell.compiler.schedule.phases import choose_phases
from fusecell.compiler.schedule.plan import Plan
from fusecell.compiler.schedule.stages import make_stages

__all__ = ["plan"]


def plan(graph: Graph, *, backward: bool = False) -> Plan:
    """Schedule a graph whose passes have run; ``backward`` if it is the gradient's."""
    graph = with_own_buffer_names(graph)
    phases = choose_phases(graph)
    stages = make_stages(graph, phases)
    return assign_buffers(graph, phases, stages, backward=backward)
