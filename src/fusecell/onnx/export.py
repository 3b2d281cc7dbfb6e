"""``onnx.export``: a layer as an ONNX model, with any number of steps and rows, compared with the layer itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

import fusecell
from fusecell.cell import Cell
from fusecell.module_snapshot import preserved
from fusecell.onnx.model import BOOL, ModelGraph, cells_of, is_batch_first
from fusecell.onnx.verify import can_verify, verify_model
from fusecell.onnx.writer import INT64, Writer
from fusecell.shapes import Shape, Size, feature_shape, features_of, is_size, output_shapes
from fusecell.validation import weights_dtype

__all__ = ["export"]

_OLDEST_OPSET = 18
_IR_VERSION = 10
_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


def export(
    module: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = 20,
    step: bool = False,
    states: bool = True,
    lengths: bool = False,
    resets: bool = False,
    input_dtype: torch.dtype | None = None,
    input_shapes: Sequence[Size] | None = None,
    verify: bool | None = None,
) -> onnx.ModelProto:
    """Write a layer as an ONNX model; any number of steps T and rows N.

    A GRU, LSTM or RNN of float32 becomes the node of that name, one a layer; any other cell a ``Scan`` whose body is
    the cell's step, in standard operators. Weights are constants of the model. Random operations of training are
    left out, as in ``eval()``.

    Example:
        >>> import torch, fusecell as fc
        >>> model = fc.onnx.export(fc.Sequential(fc.Recurrent(fc.cells.MGUCell(5, 10)), torch.nn.Linear(10, 2)))
        >>> [value.name for value in model.graph.input], [value.name for value in model.graph.output]
        (['x', 'h'], ['y', 'h_out'])

    Arguments:
        module: a cell; ``Recurrent``, ``Bidirectional``, ``GRU``, ``LSTM``, ``RNN``; or a ``Sequential`` of these, with
            modules that are applied to each step, such as a readout, between and behind them.
        path: the file to write; None writes none.
        opset: the version of ONNX's operators, 18 or newer.
        step: one step, x (N, features), for a caller that keeps the states.
        states: each state is an input, (N, features), named as in the cell, and an output, ``<name>_out``; of several
            cells they are named ``0.h``, ``1.h``. False: sequences begin with the cells' own first states.
        lengths: an input ``lengths``, int64 (N,): the valid steps of each row, as in :func:`fusecell.scan`.
        resets: an input ``resets``, bool (T, N), as in :func:`fusecell.scan`.
        input_dtype: of x, where it is not that of the weights: ``torch.int64`` for token ids.
        input_shapes: of a cell that takes several inputs, the shape of each without time and batch.
        verify: run the model on random sequences of two lengths, and compare the results with the layer's: by ONNX
            Runtime if it is installed, else by onnx's reference. None: where one of them can, as the reference has GRU,
            LSTM and RNN in part.

    Returns:
        The model. Inputs ``x`` (T, N, features), or (N, T, features) with ``batch_first``, those that the cell takes
        besides or draws, and the states; outputs
        ``y`` and the states' last values. A cell of several outputs has one for each, ``y.<name>``. Where a state is
        called y, the output is ``output``.

    Raises:
        NotCompilable: where the step has no graph, with the reasons.
        ExportError: for an operation that ONNX has none of, and where the model's results are not the layer's.
        TypeError: for a module that has no cells, or is of other types than these.

    Source: https://onnx.ai/onnx/operators/onnx__Scan.html.
    """
    if opset < _OLDEST_OPSET:
        raise ValueError(f"onnx.export: opset {opset} is too old, at least {_OLDEST_OPSET} is needed.")
    if step and (lengths or resets):
        raise ValueError("onnx.export: lengths and resets are of sequences; with step=True the caller has each step.")
    cells = cells_of(module)
    if not cells:
        raise TypeError(
            "onnx.export takes a cell or a layer of fusecell, or a Sequential that begins with one, got "
            f"{type(module).__name__}."
        )
    dtype = _dtype_of(module)
    given = None if input_shapes is None else [feature_shape(size) for size in input_shapes]
    with preserved(module), _evaluation(module), torch.no_grad():
        shapes = _with_drawn(cells, given)
        model = _model(module, cells, dtype, opset, step, states, lengths, resets, input_dtype, shapes)
        onnx.checker.check_model(model, full_check=True)
        if verify or (verify is None and can_verify(model)):
            verify_model(model, module, cells, dtype, step=step, input_dtype=input_dtype, shapes=shapes)
    if path is not None:
        onnx.save(model, Path(path))
    return model


def _dtype_of(module: nn.Module) -> torch.dtype:
    dtype = weights_dtype(module) or torch.get_default_dtype()
    if dtype not in _DTYPES:
        raise TypeError(
            f"onnx.export writes float32 and float64, the module computes in {dtype}; convert it with .float()."
        )
    return dtype


def _with_drawn(cells: Sequence[Cell], shapes: Sequence[Shape] | None) -> Sequence[Shape] | None:
    """Return the shapes of a cell's inputs and, behind them, of what it draws, which the model's caller draws."""
    drawn = [tuple(value.shape[2:]) for value in cells[0].draw(1, 1)]
    if not any(cell.draw(1, 1) for cell in cells):
        return shapes
    if len(cells) > 1:
        names = {type(cell).__name__ for cell in cells if cell.draw(1, 1)}
        raise TypeError(f"onnx.export: {', '.join(names)} draws random inputs; export the cell by itself.")
    return [*(shapes or [feature_shape(cells[0].input_size)]), *drawn]


class _evaluation:
    """Put a module into evaluation mode for a block."""

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(part, part.training) for part in module.modules()]

    def __enter__(self) -> None:
        for part, _ in self._modes:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, mode in self._modes:
            part.training = mode


def _model(
    module: nn.Module,
    cells: Sequence[Cell],
    dtype: torch.dtype,
    opset: int,
    step: bool,
    states: bool,
    lengths: bool,
    resets: bool,
    input_dtype: torch.dtype | None,
    input_shapes: Sequence[Shape] | None,
) -> onnx.ModelProto:
    w = Writer(_DTYPES[dtype])
    batch_first = not step and is_batch_first(module)
    lead = ["N"] if step else ["N", "T"] if batch_first else ["T", "N"]
    element = w.element if input_dtype is None else helper.np_dtype_to_tensor_dtype(_numpy_dtype(input_dtype))
    graph = ModelGraph(w, dtype, step, states, len(cells), input_dtype=input_dtype, input_shapes=input_shapes)
    names, values = cells[0].inputs if input_shapes is not None else ("x",), []
    for name, shape in zip(names, input_shapes or [feature_shape(cells[0].input_size)], strict=True):
        graph.inputs.append(helper.make_tensor_value_info(w.reserve(name), element, [*lead, *shape]))
        value = name
        if batch_first:
            value = w.node("Transpose", value, perm=[1, 0, *range(2, 2 + len(shape))])
        if len(shape) != 1:
            value = w.reshape(value, *[0] * len(lead), features_of(shape))
        values.append(value if element == w.element else w.cast(value))
    value, graph.more_inputs = values[0], values[1:]
    if lengths:
        graph.lengths = w.reserve("lengths")
        graph.inputs.append(helper.make_tensor_value_info(graph.lengths, INT64, ["N"]))
    if resets:
        graph.resets = w.reserve("resets")
        graph.inputs.append(helper.make_tensor_value_info(graph.resets, BOOL, ["T", "N"]))
    outputs = graph.outputs
    graph.outputs = []
    result, result_size = graph.module(module, value, None)
    after, graph.outputs = graph.outputs, outputs
    if batch_first:
        result = w.node("Transpose", result, perm=[1, 0, 2])
    parts = output_shapes(result_size)
    y = "output" if any(value.name in ("y", "y_out") for value in (*graph.inputs, *after)) else "y"
    outputs_named = [y] if is_size(result_size) else [f"{y}.{key}" for key in _keys(result_size)]
    values = [result]
    if len(parts) > 1:
        widths = w.integers([features_of(part) for part in parts.values()], "widths")
        values = w.several("Split", [result, widths], [f"{name}_flat" for name in outputs_named], axis=-1)
    for name, part, flat in zip(outputs_named, parts.values(), values, strict=True):
        graph.output(name, flat, lead, part)
    graph.outputs += after
    body = helper.make_graph(w.nodes, type(module).__name__, graph.inputs, graph.outputs, w.constants)
    model: onnx.ModelProto = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=_IR_VERSION,
        producer_name="fusecell",
        producer_version=fusecell.__version__,
    )
    return model


def _keys(size: Any) -> list[str]:
    return [str(key) for key in (size if isinstance(size, dict) else range(len(size)))]


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
