"""Values of a step that depend on weights alone, computed by the compiled step, so that their bits are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusecell.compiler.ir.graph import Builder, Graph, rebuild
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.streaming.bound_step import Array, Part
from fusecell.streaming.stream import Stream

__all__ = ["constant_values"]


def constant_values(part: Part, graph: Graph, indices: Sequence[int]) -> dict[int, Array]:
    """Compute values that depend on weights alone.

    Arguments:
        graph: of the part, after the compiler's passes.
        indices: of nodes of ``graph``.
    """
    if not indices:
        return {}

    def copied(builder: Builder, index: int, args: tuple[int, ...]) -> int:
        return builder.add_like(graph[index], args)

    labels = {f"constant.{index}": index for index in indices}
    step = rebuild(replace(graph, outputs=labels), copied)
    builder = Builder(graph.title, graph.dtype)
    for node in step.nodes:
        builder.append(node.op, node.args, node.attrs, node.name)
    rows = [_as_row(builder, step.outputs[label]) for label in labels]
    result = builder.add("concat", *rows) if len(rows) > 1 else rows[0]
    states = {f"state.{step[index].name}": index for index in step.leaves("state")}
    constant = Graph(builder.title, builder.dtype, tuple(builder.nodes), {"output": result, **states})
    kernel = compile_graph(constant)
    start = [np.zeros((1, step[index].size), part.dtype) for index in step.leaves("state")]
    constants = Part(part.kind, constant, kernel, part.weights, start)
    values = Stream.of_parts([constants], 1).step(np.zeros(constants.input_size, part.dtype))
    sizes = [graph[index].size for index in indices]
    return dict(zip(indices, np.split(values, np.cumsum(sizes)[:-1]), strict=True))


def _as_row(builder: Builder, index: int) -> int:
    """Return a value as numbers of a row: truth values are 1 and 0."""
    node = builder.nodes[index]
    if node.type.kind == "mask":
        index = builder.add("where", index, builder.const(1.0), builder.const(0.0))
    return builder.add("broadcast", index, size=node.size)
