"""``Stream``: one step at a time, at the cost of the kernel and little more."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusecell.cell import Cell, weights_dtype
from fusecell.compiler.kernel import Kernel
from fusecell.compiler.program import Program, compile_step
from fusecell.compiler.trace import Refusal
from fusecell.drop_in import GRU, LSTM, RNN
from fusecell.errors import NotCompilable
from fusecell.layers import Recurrent, Sequential, Stack

__all__ = ["Stream"]

Array = np.ndarray[Any, Any]

_MOST_STEPS = 64
"""Steps of a chunk that is pushed; more go chunk by chunk."""


class _PerStep(Cell):
    """A module between or behind cells, such as a readout, as a cell that remembers nothing."""

    states = ()

    def __init__(self, module: nn.Module, input_size: int) -> None:
        super().__init__(input_size, input_size)
        self.module = module
        like = torch.zeros(1, input_size, dtype=weights_dtype(module))
        with torch.no_grad():
            self.output_size = module(like).shape[-1]

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.module(x), ()


class Stream:
    r"""A layer run step by step, without gradient: its weights packed once, its state held.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1})

    Steps and chunks give the bits that the layer gives over the whole sequence. A stream belongs to one thread.

    Example:
        >>> import numpy as np, torch, fusecell as fc
        >>> layer = fc.GRU(5, 10, num_layers=2)
        >>> stream = fc.Stream(layer)
        >>> x = np.random.randn(7, 5).astype(np.float32)
        >>> live = np.stack([stream.step(x_t) for x_t in x])
        >>> bool((torch.from_numpy(live) == layer(torch.from_numpy(x))[0]).all())
        True

    Arguments:
        module: a cell, Stack, Recurrent, GRU, LSTM or RNN that runs forward; or a Sequential of such and of modules
            that work step by step, such as a readout.
        batch_size: rows that run side by side, each with a state of its own.

    Attributes:
        input_size, output_size: features of a step.
        dtype: of inputs, outputs and states.

    Raises:
        TypeError: for any other module, a cell with several inputs, or one that draws noise (``eval()`` it).
        ValueError: for a layer with two directions or a reversed one, whose first output needs the last input.
        NotCompilable: if the step of a cell can't be compiled.
    """

    def __init__(self, module: nn.Module, batch_size: int = 1) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream takes a batch_size of 1 or more, got {batch_size!r}.")
        cells = list(_cells(module, None))
        for cell in cells:
            _check(cell, batch_size)
        self._module, self._rows = module, batch_size
        self.input_size, self.output_size = cells[0].input_size, cells[-1].output_size
        kinds = {dtype for cell in cells if (dtype := _dtype(cell)) is not None} or {torch.get_default_dtype()}
        if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
            raise TypeError(
                f"Stream computes in float32 or float64, the same in all cells, got {sorted(map(str, kinds))}."
            )
        torch_dtype = kinds.pop()
        self.dtype: np.dtype[Any] = np.dtype(str(torch_dtype).removeprefix("torch."))
        self._links: list[_Link] = []
        source = np.zeros((batch_size, self.input_size), self.dtype)
        for cell in cells:
            self._links.append(_Link(cell, batch_size, torch_dtype, source))
            source = self._links[-1].output
        self._input, self._output = self._links[0].input, source
        self._calls: list[tuple[Callable[[int], None], int]] = [(link.run, link.address) for link in self._links]
        self._order = np.arange(batch_size, dtype=np.int64)
        self._count = np.array([batch_size], dtype=np.int64)
        self._one = (self.input_size,)

    def step(self, x: Array | Tensor, *, rows: Array | Tensor | None = None, out: Array | None = None) -> Array:
        """One step.

        Arguments:
            x: (batch_size, input_size), or (input_size,) where there is one row; NumPy or a tensor.
            rows: (batch_size,) bool, the rows that take part. The others keep their state, and their output is 0.
            out: where the output goes, in place of a new array.

        Returns:
            The output, in the form of ``x``.

        Raises:
            ValueError: where a shape doesn't fit.
        """
        if type(x) is not np.ndarray:
            x = _array(x)
        alone = x.shape == self._one and self._rows == 1
        if not alone and x.shape != self._input.shape:
            raise ValueError(f"Stream.step expected an input of shape {self._input.shape}, got {x.shape}.")
        self._input[...] = x
        if rows is None:
            for run, address in self._calls:
                run(address)
        else:
            self._step_some(_array(rows))
        found = self._output[0] if alone else self._output
        if out is None:
            return found.copy()
        np.copyto(out, found)
        return out

    def _step_some(self, rows: Array) -> None:
        if rows.dtype != np.bool_ or rows.shape != (self._rows,):
            raise ValueError(f"rows must be bool of shape ({self._rows},), got {rows.dtype} of shape {rows.shape}.")
        chosen = np.flatnonzero(rows)
        self._order[: len(chosen)] = chosen
        self._order[len(chosen) :] = np.flatnonzero(~rows)
        self._count[0] = len(chosen)
        for link in self._links:
            link.output[~rows] = 0
            link.run_some(self._order, self._count)

    def push(self, chunk: Array | Tensor) -> Array:
        """Several steps at once.

        Arguments:
            chunk: (T, batch_size, input_size), or (T, input_size) where there is one row.

        Returns:
            The outputs, in the form of ``chunk``.

        Raises:
            ValueError: where a shape doesn't fit.
        """
        given = np.asarray(_array(chunk), dtype=self.dtype)
        alone = given.ndim == 2 and self._rows == 1
        x = given[:, None] if alone else given
        if x.ndim != 3 or x.shape[1:] != self._input.shape:
            raise ValueError(f"Stream.push expected a chunk of shape (T, *{self._input.shape}), got {given.shape}.")
        parts = [self._push(np.ascontiguousarray(part)) for part in _parts(x)]
        y = np.concatenate(parts) if parts else np.empty((0, *self._output.shape), self.dtype)
        return y[:, 0] if alone else y

    def _push(self, x: Array) -> Array:
        for link in self._links:
            x = link.run_chunk(x)
        return x

    def reset(self, rows: Array | Tensor | list[int] | int | None = None) -> None:
        """Back to the initial state: all rows, or those of an index or a mask."""
        chosen: Any = slice(None) if rows is None else _array(rows)
        for link in self._links:
            for value, start in zip(link.state, link.start, strict=True):
                value[chosen] = start[chosen]

    def reorder(self, index: Array | Tensor | list[int]) -> None:
        """Row n goes on from the state of row ``index[n]``, as a beam search needs it."""
        chosen = _array(index)
        if chosen.shape != (self._rows,):
            raise ValueError(f"Stream.reorder takes an index of shape ({self._rows},), got {chosen.shape}.")
        for link in self._links:
            for value in link.state:
                value[...] = value[chosen]

    @property
    def state(self) -> tuple[Array, ...]:
        """Copies of the states, (batch_size, size) each, cell by cell from the bottom; settable."""
        return tuple([value.copy() for link in self._links for value in link.state])

    @state.setter
    def state(self, state: tuple[Array | Tensor, ...] | Array | Tensor) -> None:
        held = [value for link in self._links for value in link.state]
        given = (state,) if isinstance(state, np.ndarray | Tensor) else tuple(state)
        found = [_array(value) for value in given]
        shapes = [value.shape for value in held]
        if [value.shape for value in found] != shapes:
            raise ValueError(
                f"Stream.state expected arrays of shapes {shapes}, got {[value.shape for value in found]}."
            )
        for value, new in zip(held, found, strict=True):
            value[...] = new

    def snapshot(self) -> tuple[Array, ...]:
        """The state, to :meth:`restore` later."""
        return self.state

    def restore(self, snapshot: tuple[Array, ...]) -> None:
        """Go on from where :meth:`snapshot` was taken."""
        self.state = snapshot

    def refresh(self) -> None:
        """Take the module's weights as they are now; the state stays."""
        state = self.state
        vars(self).update(vars(Stream(self._module, self._rows)))
        self.state = state


class _Link:
    """One cell of a stream: its kernel, its argument block with weights packed, and its state."""

    def __init__(self, cell: Cell, rows: int, dtype: torch.dtype, source: Array) -> None:
        with torch.inference_mode(False), torch.no_grad():
            program = compile_step(cell, [(cell.input_size,)], dtype)
            if isinstance(program, Refusal):
                raise NotCompilable(type(cell).__name__, program.reasons)
            start = cell.initial_state(rows, dtype=dtype, device="cpu")
            self._bind(cell, program, rows, tuple(value.detach() for value in start), source)

    def _bind(self, cell: Cell, program: Program, rows: int, start: tuple[Tensor, ...], source: Array) -> None:
        kernel: Kernel = program.kernel
        self._kernel, self._rows = kernel, rows
        self.start = [np.array(value.numpy(), order="C") for value in start]
        self.state = [value.copy() for value in self.start]
        self.input, self.output = source, np.zeros((rows, cell.output_size), source.dtype)
        block, words = kernel.block(), kernel.words
        self._weights = [value.detach().clone() for value in program.traced.weights.values(cell)]
        kernel.give_matrices(block, words.weights.values(), self._weights)
        tensors = [torch.from_numpy(value) for value in self.state]
        kernel.give_states(block, words.first, tensors)
        kernel.give_states(block, words.last, tensors)
        self._give(block, self.input[None], self.output[None])
        chunk = kernel.chunk(_MOST_STEPS, rows)
        self._scratch = torch.empty(kernel.emitted.scratch.bytes(rows, chunk) + 64, dtype=torch.uint8, device="cpu")
        kernel.fill(block, 1, rows, False, self._scratch.data_ptr(), chunk)
        self._block: array[int] = block
        self.address = block.buffer_info()[0]
        # The first run packs; the state that it moves on is put back.
        kernel.short(self.address)
        block[words.positions["packed"]] = 1
        for value, first in zip(self.state, self.start, strict=True):
            value[...] = first
        # For less than a millisecond Python's lock is not worth letting go.
        self.run = kernel.short if kernel.macs * rows < _SHORT_STEP else kernel.long

    def _give(self, block: array[int], x: Array, y: Array) -> None:
        """Inputs and outputs, (T, N, size)."""
        words = self._kernel.words
        self._kernel.give_sequences(block, words.inputs.values(), [torch.from_numpy(x)] * len(words.inputs))
        self._kernel.give_sequences(block, words.outputs.values(), [torch.from_numpy(y)])

    def run_some(self, order: Array, count: Array) -> None:
        """A step of the first ``count`` rows of an order."""
        block = self._block[:]
        offsets = np.zeros(1, np.int64)
        for place, value in zip(self._kernel.words.ragged, (order, count, offsets), strict=True):
            block[place] = value.ctypes.data
        self.run(block.buffer_info()[0])

    def run_chunk(self, x: Array) -> Array:
        """Several steps."""
        y = np.empty((x.shape[0], *self.output.shape), x.dtype)
        block = self._block[:]
        self._give(block, x, y)
        block[self._kernel.words.sizes[0]] = x.shape[0]
        self._kernel.long(block.buffer_info()[0])
        return y


_SHORT_STEP = 10_000_000


def _cells(module: nn.Module, width: int | None) -> Iterator[Cell]:
    """The cells of a module, bottom first."""
    if isinstance(module, Stack):
        if module.residual:
            raise TypeError("Stream takes no Stack with residual connections.")
        for cell in module.layers:
            yield from _cells(cell, None)
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
            for cell in _cells(part, width):
                width = cell.output_size
                yield cell
    elif width is not None and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield _PerStep(module, width)
    else:
        raise TypeError(
            "Stream takes a cell or a layer of fusecell, or a Sequential that begins with one, "
            f"got {type(module).__name__}."
        )


def _dtype(cell: Cell) -> torch.dtype | None:
    """The dtype of a cell's weights, parameters or a drop-in layer's."""
    views = (value.dtype for value in vars(cell).values() if isinstance(value, Tensor) and value.is_floating_point())
    return weights_dtype(cell) or next(views, None)


def _check(cell: Cell, rows: int) -> None:
    name = type(cell).__name__
    if cell.draw(1, rows):
        raise TypeError(f"Stream: {name} draws random inputs; eval() it first.")
    if len(cell.inputs) > 1:
        raise TypeError(f"Stream takes cells with one input, {name} has {len(cell.inputs)}: {', '.join(cell.inputs)}.")


def _array(value: Any) -> Array:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _parts(x: Array) -> Iterator[Array]:
    """A chunk in pieces that packed weights have room beside."""
    for start in range(0, x.shape[0], _MOST_STEPS):
        yield x[start : start + _MOST_STEPS]
