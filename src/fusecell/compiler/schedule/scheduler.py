"""Schedule a graph: decide when each value is computed, in which stage, and where it is in memory."""

from __future__ import annotations

from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.schedule.buffers import assign_buffers
from fusecell.compiler.schedule.operands import locate_operands
from fusecell.compiler.schedule.phases import choose_phases
from fusecell.compiler.schedule.plan import Plan
from fusecell.compiler.schedule.stages import make_stages

__all__ = ["plan"]


def plan(graph: Graph, *, backward: bool = False) -> Plan:
    """Schedule a graph whose passes have run; ``backward`` if it is the gradient's."""
    phases = choose_phases(graph)
    stages = make_stages(graph, phases)
    buffers = assign_buffers(graph, phases, stages)
    return locate_operands(graph, buffers, backward=backward)
