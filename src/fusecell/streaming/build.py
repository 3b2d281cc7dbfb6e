"""Compile the cells of a module, bottom first, for a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.programs.inference import compile_step, without_notes
from fusecell.compiler.programs.prepacked import KernelCell
from fusecell.compiler.refusal import Refusal
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import NotCompilable
from fusecell.execution.options import State
from fusecell.layers import Recurrent, Sequential, Stack
from fusecell.module_snapshot import preserved
from fusecell.shapes import Size, feature_shape, is_size, output_shapes, size_text
from fusecell.streaming.bound_step import Part, RowShapes
from fusecell.validation import first_state, weights_dtype
from fusecell.wrappers import Residual

__all__ = ["PerStep", "part_of", "parts_of"]


class PerStep(Cell):
    """A module between or after cells, such as a readout, as a cell without states.

    Arguments:
        module: maps (N, ...) to (N, ...).
        input_size: features of its input.
    """

    states = ()

    def __init__(self, module: nn.Module, input_size: Size) -> None:
        super().__init__(input_size, input_size)
        self.module = module
        like = torch.zeros((1, *feature_shape(input_size)), dtype=weights_dtype(module))
        with torch.no_grad(), preserved(module):
            shape = tuple(module(like).shape[1:])
        self.output_size = shape[0] if len(shape) == 1 else shape

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.module(x), ()


def parts_of(module: nn.Module, rows: int) -> list[Part]:
    """Compile the cells of a module, bottom first, with copies of their present weights.

    Arguments:
        module: as :class:`fusecell.Stream` takes it.
        rows: the number of rows.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does.
    """
    return _parts(list(_cells(module, None)), rows, "Stream")


def part_of(cell: Cell, rows: int, caller: str) -> Part:
    """Compile a cell as one, with copies of its present weights, be it a Stack of several.

    Arguments:
        caller: the function that errors name.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does.
    """
    return _parts([cell], rows, caller)[0]


def _parts(cells: Sequence[Cell], rows: int, caller: str) -> list[Part]:
    for cell in cells:
        _check(cell, rows, caller)
    _check_chain(cells)
    kinds = {dtype.to_real() for cell in cells if (dtype := weights_dtype(cell)) is not None} or {
        torch.get_default_dtype()
    }
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(map(str, kinds)))
        raise TypeError(
            f"{caller} computes in float32 or float64, the same in all cells, got {names}. "
            "Convert the module with .float() or .double()."
        )
    (dtype,) = kinds
    with torch.inference_mode(False), torch.no_grad():
        return [_part(cell, rows, dtype) for cell in cells]


def _part(cell: Cell, rows: int, dtype: torch.dtype) -> Part:
    """Compile one cell."""
    shapes = RowShapes(
        feature_shape(cell.input_size), feature_shape(cell.output_size), tuple(map(feature_shape, cell.state_sizes))
    )
    start = first_state(cell, rows, dtype=dtype, device="cpu")
    program = compile_step(cell, [shapes.input], dtype, draws=False)
    if isinstance(program, Refusal) and _takes_ids(cell, start, torch.zeros((rows, *shapes.input), dtype=dtype)):
        program = compile_step(cell, [shapes.input], dtype, (torch.int64,), draws=False)
    if isinstance(program, Refusal):
        raise NotCompilable(type(cell).__name__, program.reasons)
    # Copies: training may go on with the module while the stream runs.
    weights = [np.array(value.numpy(), order="C") for value in program.traced.weights.values(cell)]
    return Part(
        type(cell).__name__,
        without_notes(program.traced.graph),
        program.kernel,
        weights,
        [np.array(value.to(dtype).numpy(), order="C").reshape(rows, -1) for value in start],
        None if shapes.is_flat else shapes,
    )


def _takes_ids(cell: Cell, start: State, zeros: Tensor) -> bool:
    """Whether a step takes integers alone, as one does that looks them up in a table."""

    def is_taken(x: Tensor) -> bool:
        try:
            with preserved(cell):
                cell.step(x, start)
        except Exception:  # the step's own, whatever it is: the compiler says what is wrong with it
            return False
        return True

    return not is_taken(zeros) and is_taken(zeros.long())


def _cells(module: nn.Module, width: Size | None) -> Iterator[Cell]:
    """Iterate over the cells of a module, bottom first.

    Not ``iter_cells``: the order is that of execution, and what can't run step by step is refused.

    Arguments:
        module: a part of the module that was passed to Stream.
        width: features that come from the part below; None at the bottom, where only a cell can tell its input's.
    """
    if isinstance(module, Stack):
        if module.skip:
            raise TypeError(
                "Stream runs one cell after the other, and can't take a Stack with skip=True, whose "
                "cells also read the stack's input."
            )
        for cell in module.layers:
            skips = module.residual and cell.input_size == cell.output_size
            yield from _cells(Residual(cell) if skips else cell, None)
    elif isinstance(module, Cell):
        yield module
    elif isinstance(module, Recurrent):
        if module.reverse:
            raise ValueError("Stream can't run a reversed layer: its first output needs the last input.")
        yield from _cells(module.cell, None)
    elif isinstance(module, GRU | LSTM | RNN):
        if module.bidirectional:
            raise ValueError("Stream can't run a layer of two directions: its first output needs the last input.")
        yield from (cell for *_, cell in module.leaf_cells())
    elif isinstance(module, Sequential | nn.Sequential):
        for part in module:
            # Each part's input is as wide as the output of the cell before it, which a readout can't tell itself.
            for cell in _cells(part, width):
                width = cell.output_size
                yield cell
    elif width is not None and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield PerStep(module, width)
    else:
        raise TypeError(
            "Stream takes a cell or a layer of fusecell, or a Sequential that begins with one, "
            f"got {type(module).__name__}."
        )


def _check(cell: Cell, rows: int, caller: str) -> None:
    """Raise TypeError for a cell that needs more than one input in a step."""
    name = type(cell).__name__
    if not is_size(cell.output_size):
        raise TypeError(
            f"{caller} takes cells with one output, {name} has several ({', '.join(output_shapes(cell.output_size))}). "
            "Return those that you need concatenated, or use fusecell.step."
        )
    if isinstance(cell, KernelCell):
        raise TypeError(
            f"{caller} takes the model before fusecell.quantize, and the format of its weights: "
            "Stream(model, weights='int8')."
        )
    if cell.draw(1, rows):
        raise TypeError(f"{caller}: {name} draws random inputs; eval() it first.")
    if len(cell.inputs) > 1:
        raise TypeError(
            f"{caller} takes cells with one input, {name} has {len(cell.inputs)}: {', '.join(cell.inputs)}."
        )


def _check_chain(cells: Sequence[Cell]) -> None:
    """Raise ValueError unless each cell takes rows of the shape that the one below gives; kernels see flat rows."""
    for below, above in pairwise(cells):
        if feature_shape(below.output_size) != feature_shape(above.input_size):
            raise ValueError(
                f"Stream: {type(below).__name__} gives rows of {size_text(below.output_size)} and "
                f"{type(above).__name__} above it takes {size_text(above.input_size)}; they must agree."
            )
