"""``Stream``: one step at a time, at the cost of the kernel and little more.

A stream that was saved runs without torch, so nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusecell.streaming.bound_step import MOST_STEPS, Array, Link, Part

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Stream"]


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
        try:
            from fusecell.streaming.build import parts_of
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Stream compiles a module of torch's, and {error.name} is not installed: pip install fusecell. "
                "A stream that was saved needs neither: load_stream reads it."
            ) from error
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream takes a batch_size of 1 or more, got {batch_size!r}.")
        self._bind(parts_of(module, batch_size), batch_size, module)

    @classmethod
    def of_parts(cls, parts: Sequence[Part], batch_size: int) -> Stream:
        """A stream without a module, of parts that fit one another."""
        stream = cls.__new__(cls)
        stream._bind(parts, batch_size, None)
        return stream

    def _bind(self, parts: Sequence[Part], rows: int, module: nn.Module | None) -> None:
        self._module = module
        self._rows = rows
        self.input_size, self.output_size, self.dtype = parts[0].input_size, parts[-1].output_size, parts[0].dtype
        self._links: list[Link] = []
        source = np.zeros((rows, self.input_size), self.dtype)
        for part in parts:
            self._links.append(Link(part, source))
            source = self._links[-1].output
        self._input, self._output = self._links[0].input, source
        self._calls: list[tuple[Callable[[int], None], int]] = [(link.run, link.address) for link in self._links]
        self._order = np.arange(rows, dtype=np.int64)
        self._count = np.array([rows], dtype=np.int64)
        self._one = (self.input_size,)

    @property
    def batch_size(self) -> int:
        """Rows that run side by side."""
        return self._rows

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the stream is made of, bottom first."""
        return tuple(link.part for link in self._links)

    def save(self, path: str | Path) -> None:
        """Write the stream to a safetensors file, for :func:`fusecell.load_stream`.

        It holds weights, first states and, as checked text, the graph of each cell's step: no code, and not the state
        that the stream has come to, which is :meth:`snapshot`'s.

        Example:
            >>> import tempfile, pathlib, fusecell as fc
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.fusecell"
            >>> fc.Stream(fc.GRU(5, 10)).save(path)
            >>> fc.load_stream(path)
            Stream(5 -> 10, float32, batch_size=1: GRUCell)

        Raises:
            OSError: if it can't be written.
        """
        from fusecell.streaming.file import write

        write(self.parts, path)

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
        if x.dtype is not self._input.dtype:
            x = self._numbers("input", x)
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
        given = np.asarray(self._numbers("chunk", _array(chunk)), dtype=self.dtype)
        alone = given.ndim == 2 and self._rows == 1
        x = given[:, None] if alone else given
        if x.ndim != 3 or x.shape[1:] != self._input.shape:
            raise ValueError(f"Stream.push expected a chunk of shape (T, *{self._input.shape}), got {given.shape}.")
        parts = [self._push(np.ascontiguousarray(part)) for part in _parts(x)]
        y = np.concatenate(parts) if parts else np.empty((0, *self._output.shape), self.dtype)
        return y[:, 0] if alone else y

    def _numbers(self, name: str, value: Array) -> Array:
        """Raise TypeError for what NumPy would make numbers of by leaving something out."""
        if not np.can_cast(value.dtype, self.dtype, "same_kind"):
            raise TypeError(f"A stream takes real numbers for its {name}, got {value.dtype}.")
        return value

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
        given = (state,) if hasattr(state, "shape") else tuple(state)
        found = [self._numbers("state", _array(value)) for value in given]
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
        """Take the module's weights as they are now; the state stays.

        Raises:
            ValueError: for a stream that was loaded: it has no module.
        """
        if self._module is None:
            raise ValueError("A stream that was loaded has no module to take weights from; make it anew and save it.")
        state = self.state
        vars(self).update(vars(Stream(self._module, self._rows)))
        self.state = state

    def __repr__(self) -> str:
        kinds = ", ".join(part.kind for part in self.parts)
        return f"Stream({self.input_size} -> {self.output_size}, {self.dtype}, batch_size={self._rows}: {kinds})"


def _array(value: Any) -> Array:
    """A NumPy array of an array, a list or a tensor."""
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def _parts(x: Array) -> Iterator[Array]:
    """A chunk in pieces that packed weights have room beside."""
    for start in range(0, x.shape[0], MOST_STEPS):
        yield x[start : start + MOST_STEPS]
