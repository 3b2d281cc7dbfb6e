"""Compile the cells of a module, bottom first, for a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product

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
from fusecell.shapes import OutputSize, Size, feature_shape, is_size, output_shapes, size_text
from fusecell.streaming.bound_step import Part, RowShapes
from fusecell.streaming.row_layout import RowLayout, shape_list
from fusecell.validation import first_state, weights_dtype
from fusecell.wrappers import Residual

__all__ = ["PerStep", "part_of", "parts_of"]

_MOST_IDS = 2**16
"""Ids that the tables of streamed cells have, if not more: a step that is exact for fewer is not streamed."""


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


def parts_of(module: nn.Module, rows: int, input_sizes: Sequence[Size] | None = None) -> list[Part]:
    """Compile the cells of a module, bottom first, with copies of their present weights.

    Arguments:
        module, input_sizes: as :class:`fusecell.Stream` takes them.
        rows: the number of rows.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does.
    """
    return _parts(list(_cells(module, None)), rows, "Stream", input_sizes)


def part_of(cell: Cell, rows: int, caller: str, input_sizes: Sequence[Size] | None = None) -> Part:
    """Compile a cell as one, with copies of its present weights, be it a Stack of several.

    Arguments:
        caller: the function that errors name.
        input_sizes: as :class:`fusecell.Stream` takes them.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does.
    """
    return _parts([cell], rows, caller, input_sizes)[0]


def _parts(cells: Sequence[Cell], rows: int, caller: str, input_sizes: Sequence[Size] | None) -> list[Part]:
    for place, cell in enumerate(cells):
        _check(cell, rows, caller, gets_noise=place == 0 and input_sizes is not None)
    _check_chain(cells, caller)
    bottom = _input_layout(cells[0], input_sizes, caller)
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
        inputs = [bottom, *(feature_shape(cell.input_size) for cell in cells[1:])]
        return [_part(cell, rows, dtype, layout) for cell, layout in zip(cells, inputs, strict=True)]


def _part(cell: Cell, rows: int, dtype: torch.dtype, inputs: RowLayout) -> Part:
    """Compile one cell."""
    shapes = RowShapes(inputs, _output_layout(cell.output_size), tuple(map(feature_shape, cell.state_sizes)))
    start = first_state(cell, rows, dtype=dtype, device="cpu")
    program = compile_step(cell, shape_list(inputs), dtype, draws=False)
    if isinstance(program, Refusal):
        zeros = [torch.zeros((rows, *shape), dtype=dtype) for shape in shape_list(inputs)]
        dtypes = _dtypes_with_integers(cell, start, zeros)
        if dtypes is not None:
            program = compile_step(cell, shape_list(inputs), dtype, dtypes, draws=False)
    if isinstance(program, Refusal):
        raise NotCompilable(type(cell).__name__, program.reasons)
    _check_ids(cell, program.traced.largest_integer)
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


def _check_ids(cell: Cell, largest: int | None) -> None:
    """Refuse a step that is exact for few ids only, the largest of which is given: a stream doesn't look at ids."""
    if largest is not None and largest < _MOST_IDS:
        reason = (
            f"Of ids above {largest:,} the step computes integers that a kernel, which has them as floating-point "
            "numbers, has not exactly, and a stream does not look. Convert the cell with .double(), or compute them "
            "outside."
        )
        raise NotCompilable(type(cell).__name__, (reason,))


def _dtypes_with_integers(cell: Cell, start: State, zeros: Sequence[Tensor]) -> tuple[torch.dtype, ...] | None:
    """Return the dtypes of the inputs of a step that takes ids or masks, as one does that looks them up in a table.

    Returns:
        Those with as few integers and bools as there can be; None if it takes none, or nothing.
    """

    def is_taken(dtypes: Sequence[torch.dtype]) -> bool:
        inputs = [value.to(kind) for value, kind in zip(zeros, dtypes, strict=True)]
        try:
            with preserved(cell):
                cell.step(inputs[0] if len(inputs) == 1 else tuple(inputs), start)
        except Exception:  # the step's own, whatever it is: the compiler says what is wrong with it
            return False
        return True

    numbers = zeros[0].dtype
    choices = product((numbers, torch.int64, torch.bool), repeat=len(zeros))
    for dtypes in sorted(choices, key=lambda each: len(each) - each.count(numbers)):
        if is_taken(dtypes):
            return None if dtypes.count(numbers) == len(dtypes) else dtypes
    return None


def _input_layout(cell: Cell, sizes: Sequence[Size] | None, caller: str) -> RowLayout:
    """Return the shape of a row of the bottom cell's input, or of each of its inputs.

    Raises:
        TypeError, ValueError: unless there is a size for each of several inputs.
    """
    names = ", ".join(cell.inputs)
    if sizes is None:
        if len(cell.inputs) == 1:
            return feature_shape(cell.input_size)
        raise TypeError(
            f"{caller}: {type(cell).__name__} takes {len(cell.inputs)} inputs ({names}), whose sizes it doesn't say: "
            f"pass {caller}(..., input_sizes=(...)), the features or shape of each."
        )
    if len(sizes) != len(cell.inputs):
        raise ValueError(
            f"{caller}: {type(cell).__name__} takes {len(cell.inputs)} inputs ({names}), got {len(sizes)} input_sizes: "
            "pass one for each."
        )
    shapes = tuple(map(feature_shape, sizes))
    return shapes if len(shapes) > 1 else shapes[0]


def _output_layout(size: OutputSize) -> RowLayout:
    """Return the shape of a row of an output, or of each of several."""
    if is_size(size):
        return feature_shape(size)
    shapes = tuple(output_shapes(size).values())
    return dict(zip(size, shapes, strict=True)) if isinstance(size, Mapping) else shapes


def _cells(module: nn.Module, width: OutputSize | None) -> Iterator[Cell]:
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
        if not is_size(width):
            raise TypeError(
                f"Stream: {type(module).__name__} above a cell of several outputs ({', '.join(output_shapes(width))}) "
                "would be handed all of them; make it a part of the cell's step."
            )
        yield PerStep(module, width)
    else:
        raise TypeError(
            "Stream takes a cell or a layer of fusecell, or a Sequential that begins with one, "
            f"got {type(module).__name__}."
        )


def _check(cell: Cell, rows: int, caller: str, *, gets_noise: bool) -> None:
    """Raise TypeError for a cell that doesn't run step by step as it is.

    Arguments:
        gets_noise: whether steps are handed what a layer would draw.
    """
    name = type(cell).__name__
    if isinstance(cell, KernelCell):
        raise TypeError(
            f"{caller} takes the model before fusecell.quantize, and the format of its weights: "
            "Stream(model, weights='int8')."
        )
    if not gets_noise and (count := len(cell.draw(1, rows))):
        raise TypeError(
            f"{caller}: {name} draws random inputs, {', '.join(cell.inputs[-count:])}; eval() it first. One that draws "
            f"in eval mode too takes them as inputs: {caller}(..., input_sizes=(...)), the sizes of all "
            f"{len(cell.inputs)}."
        )
    if isinstance(cell.output_size, Mapping) and not all(isinstance(key, str) for key in cell.output_size):
        raise TypeError(
            f"{caller}: the outputs of {name} are to have names that are text, got {list(cell.output_size)}."
        )


def _check_chain(cells: Sequence[Cell], caller: str) -> None:
    """Raise unless each cell takes rows of the shape that the one below gives; kernels see flat rows."""
    for below, above in pairwise(cells):
        if len(above.inputs) > 1 or not is_size(below.output_size):
            raise TypeError(
                f"{caller}: {type(below).__name__} and {type(above).__name__} above it hand one tensor from one to the "
                "other; only the bottom cell may have several inputs, and only the top one several outputs."
            )
        if feature_shape(below.output_size) != feature_shape(above.input_size):
            raise ValueError(
                f"{caller}: {type(below).__name__} gives rows of {size_text(below.output_size)} and "
                f"{type(above).__name__} above it takes {size_text(above.input_size)}; they must agree."
            )
