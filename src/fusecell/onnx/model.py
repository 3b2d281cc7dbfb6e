"""The graph of a whole model: cells over sequences, one after the other, with their states as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from fusecell.cell import Cell
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import ExportError
from fusecell.layers import Bidirectional, Recurrent, Sequential
from fusecell.onnx.body import Step, trace_step
from fusecell.onnx.recurrent_nodes import attributes_of, node_kind, packed_weights
from fusecell.onnx.writer import INT64, Array, Writer
from fusecell.shapes import OutputSize, Shape, feature_shape, features_of, is_size, output_shape, output_shapes
from fusecell.streaming.build import PerStep
from fusecell.validation import first_state

__all__ = ["Form", "ModelGraph", "cells_of", "first_state_of", "is_batch_first"]

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


@dataclass(frozen=True)
class Form:
    """What a model takes.

    Arguments:
        dtype: of weights and states.
        input_dtypes: of all inputs.
        input_shapes: of all inputs, without time and batch, of a cell that takes several; else of one.
        step: one step, without a dimension of time.
        states: the states are inputs; else they begin with the cells' own.
        lengths, resets: these are inputs, too.
        batch_first: its inputs and its output are (N, T, features).
    """

    dtype: torch.dtype
    input_dtypes: Sequence[torch.dtype]
    input_shapes: Sequence[Shape]
    step: bool = False
    states: bool = True
    lengths: bool = False
    resets: bool = False
    batch_first: bool = False

    @property
    def lead(self) -> list[str]:
        """The dimensions of inputs and outputs before their features."""
        return ["N"] if self.step else ["N", "T"] if self.batch_first else ["T", "N"]


class ModelGraph:
    """Writer of a model's graph; values between its parts are (T, N, features), or (N, features) for one step.

    Arguments:
        w: the writer of the model's own graph.
        form: of the model.
        cells: of several each state is named after its cell's place, ``0.h``.

    Attributes:
        inputs, outputs: the model's, as far as they are written.
    """

    def __init__(self, w: Writer, form: Form, cells: Sequence[Cell]) -> None:
        self.w, self.form, self._cells = w, form, cells
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._state_outputs: list[list[str]] = []
        """The names of the new states of each cell that was begun."""
        self._after: list[onnx.ValueInfoProto] = []
        names = cells[0].inputs if len(form.input_shapes) > 1 else ("x",)
        inputs = zip(names, form.input_shapes, form.input_dtypes, strict=True)
        self._x = [self._input(name, shape, dtype) for name, shape, dtype in inputs]
        # Values inside of the graph must not take the names of its outputs.
        self._y = w.name("output" if "y" in {*names, *(name for cell in cells for name in cell.states)} else "y")
        self._lengths = self._option("lengths", INT64, ["N"]) if form.lengths else ""
        self._resets = self._option("resets", BOOL, form.lead) if form.resets else ""
        if self._resets and form.batch_first:
            self._resets = w.node("Transpose", self._resets, perm=[1, 0])

    def _input(self, name: str, shape: Shape, dtype: torch.dtype) -> str:
        """Add an input; return its value flat in its features, (T, N, features), and of the graph's dtype."""
        w, form = self.w, self.form
        element = helper.np_dtype_to_tensor_dtype(_numpy(dtype))
        value = w.name(name)
        self.inputs.append(helper.make_tensor_value_info(value, element, [*form.lead, *shape]))
        if form.batch_first:
            value = w.node("Transpose", value, perm=[1, 0, *range(2, 2 + len(shape))])
        if len(shape) != 1:
            value = w.reshape(value, *[0] * len(form.lead), features_of(shape))
        return value if element == w.element else w.cast(value)

    def _option(self, name: str, element: int, shape: Sequence[str]) -> str:
        value = self.w.name(name)
        self.inputs.append(helper.make_tensor_value_info(value, element, list(shape)))
        return value

    def write(self, module: nn.Module) -> onnx.GraphProto:
        """Write a whole module, and return the graph."""
        w = self.w
        result, size = self._module(module, self._x[0], None)
        if self.form.batch_first:
            result = w.node("Transpose", result, perm=[1, 0, 2])
        parts = output_shapes(size)
        values, labels = [result], [self._y]
        if not is_size(size):
            keys = size if isinstance(size, dict) else range(len(parts))
            labels = [w.name(f"{self._y}.{key}") for key in keys]
        if len(parts) > 1:
            widths = w.integers([features_of(part) for part in parts.values()], "widths")
            values = w.several("Split", [result, widths], [f"{name}_flat" for name in labels], axis=-1)
        for name, part, value in zip(labels, parts.values(), values, strict=True):
            self._output(name, value, self.form.lead, part, self.outputs)
        self.outputs += self._after
        return helper.make_graph(w.nodes, type(module).__name__, self.inputs, self.outputs, w.constants)

    def _module(self, module: nn.Module, value: str, size: OutputSize | None) -> tuple[str, OutputSize]:
        """Write a module; return its result, flat in its features, and their shape."""
        if isinstance(module, Cell):
            return self._directions([module], value, (False,))
        if isinstance(module, Recurrent):
            return self._directions([module.cell], value, (module.reverse,))
        if isinstance(module, Bidirectional):
            if not is_size(module.output_size):
                raise ExportError("onnx.export: a Bidirectional of a cell with several outputs has no model.")
            cells = [module.forward_layer.cell, module.backward_layer.cell]
            return self._directions(cells, value, (False, True))[0], module.output_size
        if isinstance(module, GRU | LSTM | RNN):
            directions = (False, True) if module.bidirectional else (False,)
            cells = [cell for *_, cell in module.leaf_cells()]
            result: OutputSize = module.input_size
            for first in range(0, len(cells), len(directions)):
                value, result = self._directions(cells[first : first + len(directions)], value, directions)
            return value, result
        if isinstance(module, Sequential | nn.Sequential):
            for part in module:
                value, size = self._module(part, value, size)
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
        step = trace_step(cell, self.form.dtype)
        rows = value if self.form.step else w.reshape(value, -1, features_of(size))
        result, _ = step.write(w, [rows], [])
        if not self.form.step:
            width = w.integers([_width(cell)], "width")
            sizes = w.node("Concat", w.node("Shape", value, start=0, end=2), width, axis=0)
            result = w.node("Reshape", result, sizes)
        return result, cell.output_size

    def _directions(self, cells: Sequence[Cell], value: str, reverse: Sequence[bool]) -> tuple[str, OutputSize]:
        """Write one cell, or one for each direction, over the same input."""
        begun = len(self._state_outputs)
        places = range(begun, begun + len(cells))
        starts = [self._start(cell, value) for cell in cells]
        kinds = {node_kind(cell) for cell in cells}
        kind = kinds.pop() if len(kinds) == 1 else None
        # ONNX Runtime doesn't compute these nodes in doubles.
        one_node = self.form.dtype == torch.float32 and not self._resets and not self.form.step
        if kind is not None and one_node:
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
        w, place, starts = self.w, len(self._state_outputs), []
        self._state_outputs.append([])
        rows = w.node("Shape", value, start=0 if self.form.step else 1, end=1 if self.form.step else 2)
        for name, size, start in zip(cell.states, cell.state_sizes, first_state_of(cell, self.form.dtype), strict=True):
            if self.form.states:
                shape = feature_shape(size)
                state = w.name(name if len(self._cells) == 1 else f"{place}.{name}")
                self._state_outputs[place].append(w.name(f"{state}_out"))
                self.inputs.append(helper.make_tensor_value_info(state, w.element, ["N", *shape]))
                starts.append(state if len(shape) == 1 else w.reshape(state, 0, features_of(size)))
            else:
                sizes = w.node("Concat", rows, w.integers([1], "ones"), axis=0)
                starts.append(w.node("Expand", w.constant(start, f"{name}_start"), sizes))
        return starts

    def _finish(self, place: int, cell: Cell, after: Sequence[str]) -> None:
        """Make the new states of a cell outputs of the model."""
        if not self.form.states:
            return
        for name, size, value in zip(self._state_outputs[place], cell.state_sizes, after, strict=True):
            self._output(name, value, ["N"], feature_shape(size), self._after)

    def _output(
        self, name: str, value: str, lead: Sequence[str], shape: Shape, outputs: list[onnx.ValueInfoProto]
    ) -> None:
        """Make a value, flat in its features, an output of the model, by a name that is no other value's."""
        w, op, inputs = self.w, "Identity", [value]
        if len(shape) != 1:
            op, inputs = "Reshape", [value, w.integers([*[0] * len(lead), *shape], "shape")]
        w.nodes.append(helper.make_node(op, inputs, [name], name=name))
        outputs.append(helper.make_tensor_value_info(name, w.element, [*lead, *shape]))

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
        lengths = w.cast(self._lengths, TensorProto.INT32) if self._lengths else ""
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
        for at, (place, cell, start) in enumerate(zip(places, cells, starts, strict=True)):
            after = [w.node("Gather", last, w.integers(at, "direction"), axis=0) for last in results[1:]]
            if self._lengths:
                # A row without steps ends as it began; ONNX Runtime writes nothing for it, or zeros.
                after = [w.node("Where", self._empty(), *pair) for pair in zip(start, after, strict=True)]
            self._finish(place, cell, after)
        # (T, directions, N, H)
        outputs = w.reshape(w.node("Transpose", results[0], perm=[0, 2, 1, 3]), 0, 0, -1)
        return w.node("Where", self._empty(), w.constant(0.0, "zero"), outputs) if self._lengths else outputs

    def _empty(self) -> str:
        """Return which rows have no steps, (N, 1)."""
        w = self.w
        return w.node("Unsqueeze", w.node("Equal", self._lengths, w.integers(0, "zero")), w.integers([1], "axes"))

    # any cell

    def _cell(self, place: int, cell: Cell, value: str, start: Sequence[str], reverse: bool) -> str:
        """Write a cell by its graph: as the body of a Scan, or once."""
        # What stands behind another cell takes that one's output.
        form, reads_x = self.form, value == self._x[0]
        step = trace_step(
            cell, form.dtype, form.input_dtypes if reads_x else None, form.input_shapes if reads_x else None
        )
        more = self._x[1:] if reads_x else []
        if self.form.step:
            result, after = step.write(self.w, [value, *more], start)
            self._finish(place, cell, after)
            return result
        w = self.w
        sequences = [value, *more, *self._masks(value)]
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
        if self._lengths:
            steps = w.node("Squeeze", w.node("Shape", value, start=0, end=1), w.integers([0], "axes"))
            times = w.node("Range", w.integers(0, "zero"), steps, w.integers(1, "one"))
            times = w.node("Unsqueeze", times, w.integers([1], "axes"))
            masks.append(w.node("Unsqueeze", w.node("Less", times, self._lengths), last))
        if self._resets:
            masks.append(w.node("Unsqueeze", self._resets, last))
        return masks

    def _body(self, step: Step) -> onnx.GraphProto:
        """Return the graph of one step of a Scan: states, then x and masks, to new states and the output."""
        w, cell = Writer(self.w.dtype, self.w), step.cell
        before = [w.name(name) for name in cell.states]
        x = [w.name(name) for name in step.inputs]
        valid, reset = w.name("valid") if self._lengths else "", w.name("reset") if self._resets else ""
        widths = [features_of(size) for size in cell.state_sizes]
        inputs = [
            *(_info(name, w.element, width) for name, width in zip(before, widths, strict=True)),
            *(_info(name, w.element, width) for name, width in zip(x, step.input_widths, strict=True)),
            *(_info(mask, BOOL, 1) for mask in (valid, reset) if mask),
        ]
        states = before
        if reset:
            starts = [w.constant(start, "start") for start in first_state_of(cell, self.form.dtype)]
            states = [w.node("Where", reset, *pair) for pair in zip(starts, before, strict=True)]
        result, after = step.write(w, x, states)
        if valid:
            after = [w.node("Where", valid, *pair) for pair in zip(after, before, strict=True)]
            result = w.node("Where", valid, result, w.constant(0.0, "zero"))
        # A value may be an input, or be returned twice: outputs of a graph have names of their own.
        names = [w.node("Identity", value, name=f"{name}_next") for name, value in zip(cell.states, after, strict=True)]
        names.append(w.node("Identity", result, name="y"))
        outputs = [_info(name, w.element, width) for name, width in zip(names, (*widths, _width(cell)), strict=True)]
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


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
