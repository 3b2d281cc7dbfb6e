"""The graph of a whole model: cells over sequences, one after the other, with their states as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.layers import Bidirectional, Recurrent, Sequential
from fusecell.onnx.body import Step, trace_step
from fusecell.onnx.recurrent_nodes import attributes_of, node_kind, packed_weights
from fusecell.onnx.writer import Array, Writer
from fusecell.shapes import OutputSize, Shape, feature_shape, features_of, is_size, output_shape
from fusecell.streaming.build import PerStep
from fusecell.validation import first_state

__all__ = ["BOOL", "ModelGraph", "cells_of", "is_batch_first"]

BOOL = TensorProto.BOOL


def cells_of(module: nn.Module) -> list[Cell]:
    """List the cells of a module that have states, in the order of their states in a model."""
    if isinstance(module, Cell):
        return [module]
    if isinstance(module, Recurrent):
        return [module.cell]
    if isinstance(module, Bidirectional):
        return [module.forward_layer.cell, module.backward_layer.cell]
    if isinstance(module, GRU | LSTM | RNN):
        return [cell for *_, cell in module.leaf_cells()]
    if isinstance(module, Sequential | nn.Sequential):
        return [cell for part in module for cell in cells_of(part)]
    return []


def is_batch_first(module: nn.Module) -> bool:
    """Whether a module takes (N, T, features).

    Raises:
        ValueError: where parts of a Sequential disagree.
    """
    if not isinstance(module, nn.Sequential):
        return bool(getattr(module, "batch_first", False))
    kinds = {is_batch_first(part) for part in module if cells_of(part)}
    if len(kinds) > 1:
        raise ValueError("onnx.export: the layers of a Sequential disagree in batch_first.")
    return kinds == {True}


@dataclass
class ModelGraph:
    """Writer of a model's graph; values between its parts are (T, N, features), or (N, features) for one step.

    Arguments:
        w: the writer of the model's own graph.
        dtype: of weights and states.
        step: for one step, without a dimension of time.
        states: the states are inputs; else they begin with the cells' own.
        count: how many cells there are; of several each state is named after its cell's place, ``0.h``.
        lengths, resets: the names of these inputs, where the model has them.
        more_inputs: of a cell that takes several inputs those behind x, flat in their features.
        input_shapes: of all inputs of such a cell, without time and batch.
        input_dtype: of the model's input, where it is of integers.
    """

    w: Writer
    dtype: torch.dtype
    step: bool
    states: bool
    count: int
    lengths: str = ""
    resets: str = ""
    input_dtype: torch.dtype | None = None
    more_inputs: Sequence[str] = ()
    input_shapes: Sequence[Shape] | None = None
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    state_cells: list[Cell] = field(default_factory=list)

    def module(self, module: nn.Module, value: str, size: OutputSize | None) -> tuple[str, OutputSize]:
        """Write a module; return its result, flat in its features, and their shape."""
        if isinstance(module, Cell):
            return self._cells([module], value, (False,))
        if isinstance(module, Recurrent):
            return self._cells([module.cell], value, (module.reverse,))
        if isinstance(module, Bidirectional):
            return self._cells([module.forward_layer.cell, module.backward_layer.cell], value, (False, True))
        if isinstance(module, GRU | LSTM | RNN):
            directions = (False, True) if module.bidirectional else (False,)
            cells: list[Cell] = [cell for *_, cell in module.leaf_cells()]
            result: OutputSize = module.input_size
            for first in range(0, len(cells), len(directions)):
                value, result = self._cells(cells[first : first + len(directions)], value, directions)
            return value, result
        if isinstance(module, Sequential | nn.Sequential):
            for part in module:
                value, size = self.module(part, value, size)
            assert size is not None
            return value, size
        if size is None:
            raise TypeError(
                "onnx.export takes a cell or a layer of fusecell, or a Sequential that begins with one, got "
                f"{type(module).__name__}."
            )
        return self._per_step(module, value, size)

    def _per_step(self, module: nn.Module, value: str, size: OutputSize) -> tuple[str, OutputSize]:
        """Write a module between or behind layers, which is applied to each step by itself."""
        if not is_size(size):
            raise TypeError(f"onnx.export: {type(module).__name__} follows a cell of several outputs.")
        w, cell = self.w, PerStep(module, size)
        step = trace_step(cell, self.dtype)
        rows = value if self.step else w.reshape(value, -1, features_of(size))
        result = step.write(w, {step.inputs[0]: rows})["output"]
        if not self.step:
            width = w.integers([_width(cell)], "width")
            sizes = w.node("Concat", w.node("Shape", value, start=0, end=2), width, axis=0)
            result = w.node("Reshape", result, sizes)
        return result, cell.output_size

    def _cells(self, cells: Sequence[Cell], value: str, reverse: Sequence[bool]) -> tuple[str, OutputSize]:
        """Write one cell, or one for each direction, over the same input."""
        places = range(len(self.state_cells), len(self.state_cells) + len(cells))
        starts = [self._start(cell, value) for cell in cells]
        kinds = {node_kind(cell) for cell in cells}
        kind = kinds.pop() if len(kinds) == 1 else None
        # ONNX Runtime doesn't compute these nodes in doubles.
        if kind is not None and self.dtype == torch.float32 and not self.resets and not self.step:
            result = self._recurrent_node(kind, cells, places, value, reverse, starts)
        else:
            results = []
            for place, cell, start, backwards in zip(places, cells, starts, reverse, strict=True):
                results.append(self._cell(place, cell, value, start, backwards))
            result = results[0] if len(results) == 1 else self.w.node("Concat", *results, axis=-1)
        if len(cells) == 1:
            return result, cells[0].output_size
        return result, sum(_width(cell) for cell in cells)

    # states

    def _start(self, cell: Cell, value: str) -> list[str]:
        """Return the first states of a cell, (N, features): inputs of the model, or what the cell begins with."""
        w, starts = self.w, []
        self.state_cells.append(cell)
        rows = w.node("Shape", value, start=0 if self.step else 1, end=1 if self.step else 2)
        for name, size, start in zip(cell.states, cell.state_sizes, first_state_of(cell, self.dtype), strict=True):
            if self.states:
                shape = feature_shape(size)
                info = w.reserve(self._state_name(len(self.state_cells) - 1, name))
                self.inputs.append(helper.make_tensor_value_info(info, w.element, ["N", *shape]))
                starts.append(info if len(shape) == 1 else w.reshape(info, 0, features_of(size)))
            else:
                sizes = w.node("Concat", rows, w.integers([1], "ones"), axis=0)
                starts.append(w.node("Expand", w.constant(start, f"{name}_start"), sizes))
        return starts

    def _state_name(self, place: int, name: str) -> str:
        return name if self.count == 1 else f"{place}.{name}"

    def _finish(self, place: int, cell: Cell, after: Sequence[str]) -> None:
        """Make the new states of a cell outputs of the model."""
        if not self.states:
            return
        for name, size, value in zip(cell.states, cell.state_sizes, after, strict=True):
            self.output(f"{self._state_name(place, name)}_out", value, ["N"], feature_shape(size))

    def output(self, name: str, value: str, lead: Sequence[str], shape: Shape) -> None:
        """Make a value, flat in its features, an output of the model."""
        w, op, inputs = self.w, "Identity", [value]
        if len(shape) != 1:
            op, inputs = "Reshape", [value, w.integers([*[0] * len(lead), *shape], "shape")]
        w.nodes.append(helper.make_node(op, inputs, [w.reserve(name)], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, w.element, [*lead, *shape]))

    # a node of ONNX's own

    def _recurrent_node(
        self,
        kind: str,
        cells: Sequence[Cell],
        places: Sequence[int],
        value: str,
        reverse: Sequence[bool],
        starts: Sequence[Sequence[str]],
    ) -> str:
        w = self.w
        weights = [w.constant(each, name) for each, name in zip(packed_weights(kind, cells), "WRB", strict=True)]
        lengths = w.cast(self.lengths, TensorProto.INT32) if self.lengths else ""
        axis = w.integers([0], "axes")
        first = [
            w.node("Concat", *(w.node("Unsqueeze", start[state], axis) for start in starts), axis=0)
            for state in range(len(cells[0].states))
        ]
        direction = "bidirectional" if len(cells) == 2 else "reverse" if reverse[0] else "forward"
        results = w.several(
            kind,
            [value, *weights, lengths, *first],
            [kind.lower(), *(f"{name}_last" for name in cells[0].states)],
            hidden_size=cells[0].hidden_size,
            direction=direction,
            **attributes_of(kind, cells),
        )
        for at, (place, cell) in enumerate(zip(places, cells, strict=True)):
            after = [w.node("Gather", last, w.integers(at, "direction"), axis=0) for last in results[1:]]
            self._finish(place, cell, after)
        # (T, directions, N, H)
        return w.reshape(w.node("Transpose", results[0], perm=[0, 2, 1, 3]), 0, 0, -1)

    # any cell

    def _cell(self, place: int, cell: Cell, value: str, start: Sequence[str], reverse: bool) -> str:
        """Write a cell by its graph: as the body of a Scan, or once."""
        first = len(self.state_cells) <= 1
        step = trace_step(cell, self.dtype, self.input_dtype if first else None, self.input_shapes)
        if self.step:
            values = dict(zip((*step.inputs, *cell.states), (value, *self.more_inputs, *start), strict=True))
            results = step.write(self.w, values)
            self._finish(place, cell, [results[name] for name in cell.states])
            return results["output"]
        w = self.w
        sequences = [value, *self.more_inputs, *self._masks(value)]
        if reverse:
            sequences = [w.flipped(each, 0) for each in sequences]
        body = self._body(step)
        last = w.several(
            "Scan",
            [*start, *sequences],
            [*(f"{name}_last" for name in cell.states), "y"],
            body=body,
            num_scan_inputs=len(sequences),
        )
        self._finish(place, cell, last[:-1])
        return w.flipped(last[-1], 0) if reverse else last[-1]

    def _masks(self, value: str) -> list[str]:
        """Return which steps are valid and which are reset, (T, N, 1) each, of those that the model has."""
        w, masks, last = self.w, [], self.w.integers([2], "axes")
        if self.lengths:
            steps = w.node("Squeeze", w.node("Shape", value, start=0, end=1), w.integers([0], "axes"))
            times = w.node("Range", w.integers(0, "zero"), steps, w.integers(1, "one"))
            times = w.node("Unsqueeze", times, w.integers([1], "axes"))
            masks.append(w.node("Unsqueeze", w.node("Less", times, self.lengths), last))
        if self.resets:
            masks.append(w.node("Unsqueeze", self.resets, last))
        return masks

    def _body(self, step: Step) -> onnx.GraphProto:
        """Return the graph of one step of a Scan: states, then x and masks, to new states and the output."""
        w, cell = Writer(self.w.dtype, self.w), step.cell
        names = [w.name(name) for name in cell.states]
        states = dict(zip(cell.states, names, strict=True))
        x = [w.name(name) for name in step.inputs]
        valid, reset = w.name("valid") if self.lengths else "", w.name("reset") if self.resets else ""
        widths = [features_of(size) for size in cell.state_sizes]
        inputs = [
            *(_info(name, w.element, width) for name, width in zip(names, widths, strict=True)),
            *(_info(name, w.element, width) for name, width in zip(x, step.input_widths, strict=True)),
            *(_info(mask, BOOL, 1) for mask in (valid, reset) if mask),
        ]
        before = dict(states)
        if reset:
            for name, start in zip(cell.states, first_state_of(cell, self.dtype), strict=True):
                states[name] = w.node("Where", reset, w.constant(start, f"{name}_start"), states[name])
        results = step.write(w, {**dict(zip(step.inputs, x, strict=True)), **states})
        if valid:
            for name in cell.states:
                results[name] = w.node("Where", valid, results[name], before[name])
            results["output"] = w.node("Where", valid, results["output"], w.constant(0.0, "zero"))
        outputs = []
        for label, width in zip((*cell.states, "output"), (*widths, _width(cell)), strict=True):
            # A value may be an input, or be returned twice: outputs of a graph have names of their own.
            result = w.node("Identity", results[label], name=f"{label}_next" if label != "output" else "y")
            outputs.append(_info(result, w.element, width))
        return helper.make_graph(w.nodes, type(cell).__name__, inputs, outputs, w.constants)


def first_state_of(cell: Cell, dtype: torch.dtype) -> list[Array]:
    """Return what a cell begins with, (1, features) each."""
    with torch.no_grad():
        start = first_state(cell, 1, dtype=dtype, device=torch.device("cpu"))
        return [value.reshape(1, -1).numpy() for value in start]


def _width(cell: Cell) -> int:
    return features_of(output_shape(cell.output_size))


def _info(name: str, element: int, width: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, ["N", width])
