"""A cell's step in ONNX operators: its own graph, node by node, with its present weights as constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.ir.graph import Graph, Node
from fusecell.compiler.ir.interpreter import EVALUATE
from fusecell.compiler.programs.inference import without_notes
from fusecell.compiler.refusal import Refusal
from fusecell.errors import NotCompilable
from fusecell.onnx.primitives import RULES
from fusecell.onnx.writer import Writer
from fusecell.shapes import Shape, feature_shape

__all__ = ["Step", "trace_step"]


class Step:
    """A cell's step, traced, with its weights.

    Attributes:
        cell: the cell.
        inputs: the names of the graph's inputs, in the order of the cell's.
        input_widths: the number of features of each.
    """

    def __init__(self, cell: Cell, traced: Traced) -> None:
        self.cell = cell
        self.graph = without_notes(traced.graph)
        self._weights = [value.detach() for value in traced.weights.values(cell)]
        leaves = [self.graph[index] for index in self.graph.leaves("input")]
        self.inputs = [node.name for node in leaves]
        self.input_widths = [node.size for node in leaves]

    def write(self, w: Writer, values: Mapping[str, str]) -> dict[str, str]:
        """Write the step's nodes.

        Arguments:
            values: by the name of each input and state, the name of its value, (N, features).

        Returns:
            The names of the output, under "output", and of each state's new value, under its name: (N, features).
        """
        constants = self._constants(w)
        written: dict[int, str] = {}
        rows = values[(*self.inputs, *self.cell.states)[0]]
        needed = self.graph.needed(self.graph.outputs.values())
        varies = _varying(self.graph)
        for index, node in self.graph:
            if not needed[index] or (node.op == "weight" and index not in constants):
                continue
            if index in constants:
                continue
            if node.op in ("input", "state"):
                written[index] = values[node.name]
            elif node.op == "product":
                written[index] = self._product(w, node, written, constants)
            else:
                args = [written.get(arg) or self._constant(w, constants[arg]) for arg in node.args]
                if node.op in ("concat", "interleave") and varies[index]:
                    args = [self._full(w, arg, varies[at], rows) for arg, at in zip(args, node.args, strict=True)]
                written[index] = RULES[node.op](w, args, node.attrs)
        results = {}
        for label, index in self.graph.outputs.items():
            value = written.get(index) or self._constant(w, constants[index])
            if self.graph[index].type.kind == "mask":
                value = w.cast(value)
            results[label.removeprefix("state.")] = self._full(w, value, varies[index], rows)
        return results

    def _constants(self, w: Writer) -> dict[int, Tensor]:
        """Return the value of each node that no input and no state changes."""
        dtype = torch.float64 if w.dtype == np.float64 else torch.float32
        weights = dict(zip(self.graph.leaves("weight"), self._weights, strict=True))
        constants: dict[int, Tensor] = {}
        for index, node in self.graph:
            if index in weights:
                constants[index] = weights[index]
            elif node.op == "const":
                constants[index] = torch.tensor([[node.attrs["value"]]], dtype=torch.float64).to(dtype)
            elif node.op not in ("input", "state") and all(arg in constants for arg in node.args):
                constants[index] = self._folded(node, [constants[arg] for arg in node.args])
        return constants

    def _folded(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        flat = node.op in (
            "view",
            "gather",
            "interleave",
            "reduce",
            "scan",
            "contract",
            "take",
            "scatter_add",
            "argsort",
        )
        # Along axes a weight, of whatever shape, is one row.
        args = [value.reshape(1, -1) if flat else value for value in args]
        value = EVALUATE[node.op](args, node.attrs)
        return value.reshape(node.type.shape) if node.type.kind == "weight" else value

    def _constant(self, w: Writer, value: Tensor) -> str:
        flat = value.reshape(1, -1).numpy()
        return w.raw(flat, "mask") if value.dtype == torch.bool else w.constant(flat, "weight")

    def _product(self, w: Writer, node: Node, written: Mapping[int, str], constants: Mapping[int, Tensor]) -> str:
        row, weight = node.args
        matrix = constants[weight].T if node.attrs["transposed"] else constants[weight]
        (k0, k1), (f0, f1) = node.attrs["rows"], node.attrs["cols"]
        value = written.get(row) or self._constant(w, constants[row])
        return w.node("MatMul", value, w.constant(matrix[k0:k1, f0:f1].numpy(), self.graph[weight].name))

    @staticmethod
    def _full(w: Writer, value: str, varies: bool, rows: str) -> str:
        """Return a value as (N, features), where it has one row for all."""
        if varies:
            return value
        count = w.node("Shape", rows, start=0, end=1)
        return w.node("Expand", value, w.node("Concat", count, w.integers([1], "ones"), axis=0))


def _varying(graph: Graph) -> list[bool]:
    """Return for each node whether it has a value for each row."""
    varies: list[bool] = []
    for _, node in graph:
        varies.append(node.op in ("input", "state") or any(varies[arg] for arg in node.args))
    return varies


def trace_step(
    cell: Cell,
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
    input_shapes: Sequence[Shape] | None = None,
) -> Step:
    """Trace a cell's step for an export.

    Arguments:
        input_dtype: of the inputs, where they are integers.
        input_shapes: of all inputs, without time and batch, of a cell that has several.

    Raises:
        NotCompilable: with the reasons, where the step has no graph.
    """
    shapes = [feature_shape(cell.input_size)] if input_shapes is None else list(input_shapes)
    if len(shapes) != len(cell.inputs):
        raise TypeError(
            f"onnx.export: {type(cell).__name__} takes {len(cell.inputs)} inputs, {', '.join(cell.inputs)}; pass the "
            "shape of each, without time and batch, as input_shapes."
        )
    dtypes = None if input_dtype is None else [input_dtype] * len(shapes)
    traced = trace(cell, shapes, dtype, gradients=False, dtypes=dtypes, leftovers=True)
    if isinstance(traced, Refusal):
        raise NotCompilable(type(cell).__name__, traced.reasons)
    return Step(cell, traced)
