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
from fusecell.onnx.model import Form, ModelGraph, cells_of, is_batch_first
from fusecell.onnx.verify import can_verify, verify_model
from fusecell.onnx.writer import Writer
from fusecell.shapes import Shape, Size, feature_shape
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
    input_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
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
        resets: an input ``resets``, bool (T, N), or (N, T) with ``batch_first``, as in :func:`fusecell.scan`.
        input_dtype: of x, where it is not that of the weights: ``torch.int64`` for token ids. Of a cell that takes
            several inputs, that of each, such as ``(torch.int64, torch.float32)``, or one for all.
        input_shapes: of a cell that takes several inputs, the shape of each without time and batch.
        verify: run the model on random sequences of two lengths and two batches, and compare the results with the
            layer's: by ONNX Runtime if it is installed, in float64 and else by onnx's reference. None: where one of
            them can, as the reference has GRU, LSTM and RNN in part.

    Returns:
        The model. Inputs: ``x`` (T, N, features), or (N, T, features) with ``batch_first``, those that the cell takes
        besides or draws, and the states. Outputs: ``y`` and the states' last values; a cell of several outputs has one
        for each, ``y.<name>``. Where a state is called y, the output is ``output``; a state that is called like an
        input has a number behind its name.

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
    shapes = [feature_shape(size) for size in (input_shapes or [cells[0].input_size])]
    batch_first = not step and is_batch_first(module)
    with preserved(module), _evaluation(module), torch.no_grad():
        drawn = _drawn_shapes(cells)
        dtypes = [*_input_dtypes(input_dtype, dtype, len(shapes)), *[dtype] * len(drawn)]
        shapes += drawn
        form = Form(dtype, dtypes, shapes, step, states, lengths, resets, batch_first)
        model = _as_model(ModelGraph(Writer(_DTYPES[dtype]), form, cells).write(module), opset)
        onnx.checker.check_model(model, full_check=True)
        if verify or (verify is None and can_verify(model)):
            verify_model(model, module, cells, form)
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


def _input_dtypes(
    input_dtype: torch.dtype | Sequence[torch.dtype] | None, dtype: torch.dtype, count: int
) -> Sequence[torch.dtype]:
    """Return the dtype of each of ``count`` inputs, which is that of the weights if none is given."""
    if input_dtype is None or isinstance(input_dtype, torch.dtype):
        return [input_dtype or dtype] * count
    if len(input_dtype) != count or not all(isinstance(each, torch.dtype) for each in input_dtype):
        raise TypeError(
            f"onnx.export: input_dtype is a torch.dtype, or a list of one for each of the {count} inputs, got "
            f"{input_dtype!r}."
        )
    return input_dtype


def _drawn_shapes(cells: Sequence[Cell]) -> list[Shape]:
    """Return the shapes of what a cell draws, which the model's caller draws."""
    drawing = [cell for cell in cells if cell.draw(1, 1)]
    if drawing and len(cells) > 1:
        names = {type(cell).__name__ for cell in drawing}
        raise TypeError(f"onnx.export: {', '.join(names)} draws random inputs; export the cell by itself.")
    return [tuple(value.shape[2:]) for cell in drawing for value in cell.draw(1, 1)]


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


def _as_model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    model: onnx.ModelProto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=_IR_VERSION,
        producer_name="fusecell",
        producer_version=fusecell.__version__,
    )
    return model
