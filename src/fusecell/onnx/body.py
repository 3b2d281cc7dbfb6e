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

_ALONG_AXES = {"view", "gather", "interleave", "reduce", "scan", "contract", "take", "scatter_add", "argsort"}


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

    def write(self, w: Writer, inputs: Sequence[str], states: Sequence[str]) -> tuple[str, list[str]]:
        """Write the step's nodes.

        Arguments:
            inputs, states: the names of their values, (N, features), in the order of the cell's.

        Returns:
            The names of the output and of the states' new values: (N, features).
        """
        values = {("input", name): value for name, value in zip(self.inputs, inputs, strict=True)}
        values |= {("state", name): value for name, value in zip(self.cell.states, states, strict=True)}
        rows = next(iter(values.values()))
        constants, varies = self._constants(w), _varying(self.graph)
        written: dict[int, str] = {}
        needed = self.graph.needed(self.graph.outputs.values())
        for index, node in self.graph:
            if not needed[index] or node.op == "weight" or index in constants:
                continue
            if node.op in ("input", "state"):
                written[index] = values[node.op, node.name]
            elif node.op == "product":
                written[index] = self._product(w, node, written, constants)
            else:
                args = [written.get(arg) or self._constant(w, constants[arg]) for arg in node.args]
                if node.op in ("concat", "interleave") and varies[index]:
                    args = [self._full(w, arg, varies[at], rows) for arg, at in zip(args, node.args, strict=True)]
                written[index] = RULES[node.op](w, args, node.attrs)

        def result(label: str) -> str:
            index = self.graph.outputs[label]
            value = written.get(index) or self._constant(w, constants[index])
            if self.graph[index].type.kind == "mask":
                value = w.cast(value)
            return self._full(w, value, varies[index], rows)

        return result("output"), [result(f"state.{name}") for name in self.cell.states]

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
        # Along axes a weight, of whatever shape, is one row.
        args = [value.reshape(1, -1) if node.op in _ALONG_AXES else value for value in args]
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
    input_dtypes: Sequence[torch.dtype] | None = None,
    input_shapes: Sequence[Shape] | None = None,
) -> Step:
    """Trace a cell's step for an export.

    Arguments:
        input_dtypes: of all inputs, where some are not of that dtype.
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
    traced = trace(cell, shapes, dtype, gradients=False, dtypes=input_dtypes, leftovers=True)
    if isinstance(traced, Refusal):
        raise NotCompilable(type(cell).__name__, traced.reasons)
    return Step(cell, traced)
