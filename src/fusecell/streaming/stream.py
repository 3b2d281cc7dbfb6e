"""``Stream``: run a layer one step at a time, with little overhead above its kernels.

Nothing here imports torch: a stream that was saved runs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.streaming.bound_step import MOST_STEPS, Array, BoundStep, Part
from fusecell.streaming.row_layout import is_one_shape, joined_row, public_size, split_row
from fusecell.streaming.small_weights import StoredWeight, check_format, stored_weights, with_small_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["Stream"]


class Stream:
    r"""Run a layer step by step without gradients; its weights are packed once, its state is kept between steps.

    .. math:: (y_t, s_t) = \mathrm{step}(x_t, s_{t-1})

    Steps and chunks give the same bits as the layer over the whole sequence. Use a stream in one thread only: its
    buffers are shared by all its calls. A copy, ``copy.copy(stream)``, goes on by itself from the present state; a
    pickled one is compiled anew where it is read.

    Example:
        >>> import numpy as np, torch, fusecell as fc
        >>> layer = fc.GRU(5, 10, num_layers=2)
        >>> stream = fc.Stream(layer)
        >>> x = np.random.randn(7, 5).astype(np.float32)
        >>> y = np.stack([stream.step(x_t) for x_t in x])
        >>> bool((torch.from_numpy(y) == layer(torch.from_numpy(x))[0]).all())
        True

    Arguments:
        module: a cell, Stack, Recurrent, GRU, LSTM or RNN that runs forward; or a Sequential of these and of modules
            that apply to each step independently, such as a readout.
        batch_size: the number of rows, each with its own state.
        weights: how the matrices of products are stored: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"``
            with a scale for each output. All arithmetic is float32; what is not float32 is rounded once, here.
            ``"int8-dynamic"`` also rounds what they multiply to int8, at each step, and sums are of whole numbers.
        keep: names of weights that stay float32, as :attr:`weights` lists them, such as ``"0.weight_hh"``, or
            ``"weight_hh"`` of all cells.
        input_sizes: the features or shape of each input, for a cell that takes several; steps then take a tuple. What
            a cell draws at random is an input too, its last ones: a stream is handed its noise.

    Attributes:
        input_size, output_size: features of a step, or the shape of a row; of several inputs or outputs a tuple of
            shapes, or the dict of sizes that the cell has.
        dtype: NumPy's, of inputs, outputs and states.

    Raises:
        TypeError: for any other module, a cell with several inputs without ``input_sizes``, or one that draws random
            inputs (call ``eval()``).
        ValueError: for a bidirectional or reversed layer, whose first output needs the last input; for a batch_size
            below 1; for an unknown format, or one that this CPU can't read; for names in ``keep`` that no weight has.
        NotCompilable: if the step of a cell can't be compiled.
    """

    _sizes: Sequence[int | tuple[int, ...]] | None

    def __init__(
        self,
        module: nn.Module,
        batch_size: int = 1,
        *,
        weights: str = "float32",
        keep: Collection[str] = (),
        input_sizes: Sequence[int | tuple[int, ...]] | None = None,
    ) -> None:
        try:
            from fusecell.streaming.build import parts_of
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Stream compiles a module of torch's, and {error.name} is not installed: pip install fusecell. "
                "A stream that was saved needs neither: load_stream reads it."
            ) from error
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream takes a batch_size of 1 or more, got {batch_size!r}.")
        parts = parts_of(module, batch_size, input_sizes)
        check_format(weights, keep, parts[0].dtype)
        self._bind(with_small_weights(parts, weights, keep), batch_size, module)
        self._format, self._keep, self._sizes = weights, tuple(keep), input_sizes

    @classmethod
    def of_parts(cls, parts: Sequence[Part], batch_size: int) -> Stream:
        """Create a stream without a module, as when it is loaded.

        Arguments:
            parts: bottom first; each takes the output of the one below.
            batch_size: the number of rows.
        """
        stream = cls.__new__(cls)  # past __init__, which imports torch
        stream._bind(parts, batch_size, None)
        return stream

    def _bind(self, parts: Sequence[Part], rows: int, module: nn.Module | None) -> None:
        self._module = module
        self._format, self._keep = "float32", ()
        self._sizes = None
        self._rows = rows
        self.dtype = parts[0].dtype
        self._inputs, self._outputs = parts[0].row_shapes.input, parts[-1].row_shapes.output
        self._one_input, self._one_output = is_one_shape(self._inputs), is_one_shape(self._outputs)
        self.input_size, self.output_size = public_size(self._inputs), public_size(self._outputs)
        # Several are side by side.
        self._one: Any = self._inputs if self._one_input else (parts[0].input_size,)
        self._cells: list[BoundStep] = []
        source = np.zeros((rows, parts[0].input_size), self.dtype)
        for part in parts:
            self._cells.append(BoundStep(part, source))
            source = self._cells[-1].output
        # Views of the kernels' buffers in the users' shapes.
        self._input = self._cells[0].input.reshape(rows, *self._one)
        self._output = source.reshape(rows, *(self._outputs if self._one_output else (-1,)))
        self._calls: list[tuple[Callable[[int], None], int]] = [(cell.run, cell.address) for cell in self._cells]
        self._order = np.arange(rows, dtype=np.int64)
        self._count = np.array([rows], dtype=np.int64)

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self._rows

    @property
    def parts(self) -> tuple[Part, ...]:
        """The compiled cells of the stream, bottom first."""
        return tuple(cell.part for cell in self._cells)

    @property
    def weights(self) -> list[StoredWeight]:
        """How each weight is stored: its name, shape, format, bytes, and why it stayed as it was if it did.

        Example:
            >>> import fusecell as fc
            >>> for weight in fc.Stream(fc.GRUCell(5, 10), weights="int8").weights:
            ...     print(weight.name, weight.format, weight.bytes, weight.reason or "-")
            0.weight_ih int8 270 -
            0.bias_ih float32 120 not a matrix
            0.weight_hh int8 420 -
            0.bias_hh float32 120 not a matrix
        """
        return stored_weights(self.parts, self._format, self._keep)

    def save(self, path: str | Path, *, code_for: Sequence[str] = ()) -> None:
        """Write the stream to a safetensors file, for :func:`fusecell.load_stream`.

        It contains weights, initial states and the graph of each cell's step as text, which is checked when it is
        loaded; not the present state, for which there is :meth:`snapshot`; no code, unless ``code_for`` asks for it.

        Example:
            >>> import tempfile, pathlib, fusecell as fc
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.fusecell"
            >>> fc.Stream(fc.GRU(5, 10)).save(path)
            >>> fc.load_stream(path)
            Stream(5 -> 10, float32, batch_size=1: GRUCell)

        Arguments:
            path: the file.
            code_for: CPUs to add machine code for, which ``load_stream(path, trusted=True)`` runs without compiling:
                ``"x86-64-v3"`` (AVX2 and FMA), ``"x86-64-v4"`` (AVX-512), each also with ``-vnni`` behind it (byte
                products, for ``"int8-dynamic"``), and ``"host"``, the highest of these that this machine has. It runs
                on Linux; other machines compile the graph, which the file has in any case.

        Raises:
            OSError: if the file can't be written.
            ValueError: for another name in ``code_for``, or ``"host"`` on another machine.
            CompilerError: if a step's code can't be linked.
        """
        from fusecell.streaming.file import write

        write(self.parts, path, code_for)

    def step(self, x: Any, *, rows: Array | Tensor | None = None, out: Any = None) -> Any:
        """Run one step.

        Arguments:
            x: (batch_size, input_size), or (input_size,) if there is one row; an array or a tensor. An ``input_size``
                that is a shape stands for as many dimensions. Of a cell that takes several inputs a tuple of such, or
                one array that has the features of all of them side by side.
            rows: (batch_size,) bool, True for rows that take part. The others keep their state, and their output is 0.
            out: an array for the output, in place of a new one; a tuple or a dict where there are several.

        Returns:
            The output, in the form of ``x``; a tuple or a dict of outputs if the cell's step returns one.

        Raises:
            TypeError: for complex numbers or other objects.
            ValueError: where a shape doesn't fit.
        """
        if type(x) is not np.ndarray:
            x = self._row(x, "Stream.step takes")
        if x.dtype is not self._input.dtype:  # identity holds nearly always, and == takes longer
            x = self._real("input", x)
        unbatched = x.shape == self._one and self._rows == 1
        if not unbatched and x.shape != self._input.shape:
            raise ValueError(f"Stream.step expected {self._expected(*self._input.shape)}, got {x.shape}.")
        self._input[...] = x
        if rows is None:
            for run, address in self._calls:
                run(address)
        else:
            self._step_some(_array(rows))
        output = self._output[0] if unbatched else self._output
        if not self._one_output:
            return self._several(output, out)
        if out is None:
            return output.copy()  # the next step overwrites the buffer
        np.copyto(out, output)
        return out

    def _row(self, x: Any, what: str) -> Array:
        """Return an input as an array, and several of them as one that has them side by side."""
        if self._one_input or isinstance(x, np.ndarray) or hasattr(x, "detach"):
            return _array(x)
        return joined_row(x, self._inputs, lambda value: self._real("input", _array(value)), what)

    def _expected(self, *shape: object) -> str:
        """Say what a step or a chunk is to be."""
        text = f"an array of shape ({', '.join(map(str, shape))})"
        return text if self._one_input else f"a tuple of {len(self._inputs)} inputs, or {text}"

    def _several(self, row: Array, out: Any) -> Any:
        """Return the outputs that lie side by side in rows, or copy each to where it is to go."""
        values = split_row(row, self._outputs)
        if out is None:
            return values
        for place in values if isinstance(values, dict) else range(len(values)):
            np.copyto(out[place], values[place])
        return out

    def _step_some(self, rows: Array) -> None:
        """Run one step of the rows whose flag is set."""
        if rows.dtype != np.bool_ or rows.shape != (self._rows,):
            raise ValueError(f"rows must be bool of shape ({self._rows},), got {rows.dtype} of shape {rows.shape}.")
        # The kernel for rows of different lengths, here 1 or 0, wants the longer ones first.
        active = np.flatnonzero(rows)
        self._order[: len(active)] = active
        self._order[len(active) :] = np.flatnonzero(~rows)
        self._count[0] = len(active)
        for cell in self._cells:
            cell.output[~rows] = 0
            cell.run_some(self._order, self._count)

    def push(self, chunk: Any) -> Any:
        """Run several steps at once.

        Arguments:
            chunk: (T, batch_size, input_size), or (T, input_size) if there is one row; a tuple of such where there are
                several inputs.

        Returns:
            The outputs, in the form of ``chunk``.

        Raises:
            TypeError: for complex numbers or other objects.
            ValueError: where a shape doesn't fit.
        """
        x = np.asarray(self._real("chunk", self._row(chunk, "Stream.push takes")), dtype=self.dtype)
        shape, unbatched = x.shape, x.shape[1:] == self._one and self._rows == 1
        x = x[:, None] if unbatched else x
        if x.shape[1:] != self._input.shape or x.ndim != self._input.ndim + 1:
            raise ValueError(f"Stream.push expected {self._expected('T', *self._input.shape)}, got {shape}.")
        flat = x.reshape(len(x), self._rows, -1) if len(x) else x
        outputs = [self._push(np.ascontiguousarray(piece)) for piece in _pieces(flat)]
        y = np.concatenate(outputs) if outputs else np.empty((0, *self._output.shape), self.dtype)
        y = y.reshape(len(x), *self._output.shape)
        y = y[:, 0] if unbatched else y
        return y if self._one_output else split_row(y, self._outputs)

    def _real(self, name: str, value: Array) -> Array:
        """Return ``value``, or raise TypeError if it can't be converted to real numbers without losing a part."""
        if not np.can_cast(value.dtype, self.dtype, "same_kind"):
            raise TypeError(f"A stream takes real numbers for its {name}, got {value.dtype}.")
        return value

    def _push(self, x: Array) -> Array:
        for cell in self._cells:
            x = cell.run_chunk(x)
        return x

    def reset(self, rows: Array | Tensor | list[int] | int | None = None) -> None:
        """Put rows back to the initial state.

        Arguments:
            rows: an index, several, or a bool mask (batch_size,); all rows if left out.
        """
        index: Any = slice(None) if rows is None else _array(rows)
        for cell in self._cells:
            for value, start in zip(cell.state, cell.start, strict=True):
                value[index] = start[index]

    def reorder(self, index: Array | Tensor | list[int]) -> None:
        """Give row n the state of row ``index[n]``, as a beam search needs it.

        Arguments:
            index: integers (batch_size,).

        Raises:
            ValueError: for an index of another shape.
        """
        order = _array(index)
        if order.shape != (self._rows,):
            raise ValueError(f"Stream.reorder takes an index of shape ({self._rows},), got {order.shape}.")
        for cell in self._cells:
            for value in cell.state:
                value[...] = value[order]

    @property
    def state(self) -> tuple[Array, ...]:
        """Copies of the states, (batch_size, size) or (batch_size, d1, ..., dk), bottom first; can be assigned."""
        return tuple([value.copy() for cell in self._cells for value in cell.shaped_state])

    @state.setter
    def state(self, state: tuple[Array | Tensor, ...] | Array | Tensor) -> None:
        buffers = [value for cell in self._cells for value in cell.shaped_state]
        values = (state,) if hasattr(state, "shape") else tuple(state)
        arrays = [self._real("state", _array(value)) for value in values]
        shapes = [buffer.shape for buffer in buffers]
        if [array.shape for array in arrays] != shapes:
            raise ValueError(
                f"Stream.state expected arrays of shapes {shapes}, got {[array.shape for array in arrays]}."
            )
        for buffer, array in zip(buffers, arrays, strict=True):
            buffer[...] = array  # in place: the kernels have the buffers' addresses

    def snapshot(self) -> tuple[Array, ...]:
        """Return a copy of the state, for :meth:`restore`."""
        return self.state

    def restore(self, snapshot: tuple[Array, ...]) -> None:
        """Set the state to what :meth:`snapshot` returned."""
        self.state = snapshot

    def refresh(self) -> None:
        """Read the module's weights again, for example after an update; the state stays.

        Raises:
            ValueError: for a stream that was loaded, which has no module.
        """
        if self._module is None:
            raise ValueError(
                "A stream that was loaded has no module to take weights from. Make a new Stream of the module and "
                "save it."
            )
        state = self.state
        # Built anew: packed weights can't be updated in part, and parametrized ones are computed.
        options: dict[str, Any] = {"weights": self._format, "keep": self._keep, "input_sizes": self._sizes}
        vars(self).update(vars(Stream(self._module, self._rows, **options)))
        self.state = state

    def __copy__(self) -> Stream:
        """Return a stream of the same module, with a state of its own from here on; nothing is compiled or packed."""
        return self._with_module(self._module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        """Return what a copy is, with a copy of the module for :meth:`refresh`."""
        return self._with_module(deepcopy(self._module, memo))

    def _with_module(self, module: nn.Module | None) -> Stream:
        twin = type(self).of_parts(self.parts, self._rows)
        twin._module, twin._format, twin._keep, twin._sizes = module, self._format, self._keep, self._sizes
        twin.restore(self.snapshot())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what :meth:`save` writes, without code, and the present state: another process compiles it anew."""
        from fusecell.streaming.pickled import from_bytes, to_bytes

        return from_bytes, (to_bytes(self.parts), self._rows, self.snapshot())

    def __repr__(self) -> str:
        kinds = ", ".join(part.kind for part in self.parts)
        return f"Stream({self.input_size} -> {self.output_size}, {self.dtype}, batch_size={self._rows}: {kinds})"


def _array(value: Any) -> Array:
    """Return an array, a list or a tensor as a NumPy array, without a copy if possible."""
    # Tensors are known by detach(), as torch isn't imported here.
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def _pieces(x: Array) -> Iterator[Array]:
    """Split a chunk into pieces for which a bound step has scratch memory."""
    for start in range(0, x.shape[0], MOST_STEPS):
        yield x[start : start + MOST_STEPS]
