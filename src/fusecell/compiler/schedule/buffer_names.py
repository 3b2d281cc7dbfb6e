"""Names of values as names of buffers: none may be what another buffer of the kernel is called."""

from __future__ import annotations

import re
from dataclasses import replace

from fusecell.compiler.ir.graph import Graph

__all__ = ["RESERVED", "with_own_buffer_names"]

RESERVED = re.compile(
    r"order|starts|packed\.a|(?:in|out|state|saved|partials|panel|at)\..*|.*\.(?:rows|packed|block|total|ptr|step|row)"
)
"""What buffers are called that are no value's own: of leaves, results, sums and panels, and of the order of rows."""


def with_own_buffer_names(graph: Graph) -> Graph:
    """The same graph with other names where a value, which may have to be kept in memory, has one of these.

    A variable of a user's step gives its value its name: ``order`` is one that the kernel has a buffer for already.
    """
    if not any(_is_reserved(node.op, node.name) for node in graph.nodes):
        return graph
    names = {node.name for node in graph.nodes}
    nodes = []
    for node in graph.nodes:
        if _is_reserved(node.op, node.name):
            stem, count = f"{node.name.replace('.', '_')}_value", 1
            name = stem
            while name in names:
                name, count = f"{stem}.{count}", count + 1
            names.add(name)
            node = replace(node, name=name)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _is_reserved(op: str, name: str) -> bool:
    return op not in ("input", "state", "weight") and RESERVED.fullmatch(name) is not None
