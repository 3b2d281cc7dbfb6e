"""``QuantizedCell``: a cell whose matrices are stored in 16 or 8 bits, as a graph and its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.cache_registry import register_cache
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.programs.inference import reset_state
from fusecell.compiler.programs.prepacked import KernelCell, PrepackedKernel
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.execution.options import Options, State
from fusecell.shapes import Outputs, Size, feature_shape, output_shape, unpacked
from fusecell.streaming.bound_step import Part
from fusecell.streaming.build import part_of
from fusecell.streaming.small_weights import StoredWeight, check_format, stored_weights, with_small_weights

__all__ = ["QuantizedCell"]

# Bits without a meaning to torch, so that model.float() and the like leave them alone.
_BITS = {np.uint16: torch.int16, np.float16: torch.int16, np.int8: torch.int8}
_DECODED = {Storage.BF16: torch.bfloat16, Storage.F16: torch.float16}
_WEIGHT, _START = "weight_", "start_"


class QuantizedCell(KernelCell):
    r"""A cell in eval() mode whose matrices are stored in 16 or 8 bits, for inference.

    .. math:: (y_t, s_t) = \mathrm{step}_{\hat W}(x_t, s_{t-1})

    Its step is the cell's, traced once; the weights are those that the cell had then. Calls without gradients run a
    kernel that reads the stored weights; its arithmetic is float32's. :func:`fusecell.quantize` puts such cells in the
    place of a model's.

    Example:
        >>> import torch, fusecell as fc
        >>> cell = fc.quantized.QuantizedCell(fc.GRUCell(40, 128), "int8")
        >>> sum(value.nbytes for value in cell.state_dict().values())
        71168
        >>> y, h = fc.scan(cell, torch.randn(7, 3, 40))
        >>> y.shape
        torch.Size([7, 3, 128])

    Arguments:
        cell: one that draws nothing in eval mode.
        weights: "bfloat16", "float16", "int8" or "int8-dynamic", as :class:`fusecell.Stream` takes them.
        keep: the names of weights that stay float32.
        input_sizes: the features or shape of each input, for a cell that takes several.

    Attributes:
        format: how the weights are stored.
        kind: the name of the cell's class.

    Raises:
        TypeError, ValueError, NotCompilable: as :class:`fusecell.Stream` does.
    """

    def __init__(
        self, cell: Cell, weights: str, keep: Collection[str] = (), input_sizes: Sequence[Size] | None = None
    ) -> None:
        super().__init__(cell.input_size, cell.hidden_size)
        with _evaluating(cell):
            self.states, self.inputs = cell.states, cell.inputs  # type: ignore[misc]  # the class's, of other cells
            self.state_sizes, self.output_size = tuple(cell.state_sizes), cell.output_size
            part = part_of(cell, 2, "quantize", input_sizes)
        check_format(weights, keep, part.dtype)
        (small,) = with_small_weights([part], weights, keep)
        self.kind, self.format, self.keep = type(cell).__name__, weights, tuple(keep)
        self.graph_text = small.graph.text
        for index, (leaf, value) in enumerate(zip(small.graph.leaves("weight"), small.weights, strict=True)):
            stored = small.graph[leaf].attrs.get("stored")
            self.register_buffer(f"{_WEIGHT}{index}", _encoded(value, stored))
        for index, value in enumerate(part.start):
            if not (value == value[:1]).all():
                raise ValueError(f"{self.kind} begins each row of a batch with another state, and is not quantized.")
            self.register_buffer(f"{_START}{index}", torch.from_numpy(value[:1].copy()))

    @property
    def graph(self) -> Graph:
        """The graph of the step, whose products read stored weights."""
        return _parsed(self.graph_text)

    @property
    def weights(self) -> list[StoredWeight]:
        """How each weight is stored: its name, shape, format, bytes, and why it stayed as it was if it did."""
        start = [value.numpy() for value in self.initial_state(1)]
        numbers = [value.numpy() for value in self._numbers()]
        part = Part(self.kind, self.graph, self.prepacked().kernel, numbers, start)
        return stored_weights([part], self.format, self.keep)

    def initial_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        start = [self.get_buffer(f"{_START}{index}") for index in range(len(self.states))]
        return tuple(
            [
                value.to(device=device, dtype=dtype)
                .expand(batch_size, -1)
                .reshape(batch_size, *feature_shape(size))
                .clone()
                for value, size in zip(start, self.state_sizes, strict=True)
            ]
        )

    def step(self, x: Tensor | State, state: State) -> tuple[Outputs, State]:
        """Evaluate the graph with the numbers that the stored weights stand for."""
        inputs = (x,) if isinstance(x, Tensor) else tuple(x)
        graph, rows = self.graph, inputs[0].shape[0]
        weights = zip(graph.leaves("weight"), self._numbers(), strict=True)
        values = {graph[leaf].name: value for leaf, value in weights}
        leaves = zip((*graph.leaves("input"), *graph.leaves("state")), (*inputs, *state), strict=True)
        values |= {graph[leaf].name: value.reshape(rows, -1).to(torch.float32) for leaf, value in leaves}
        results = interpret(graph, values)
        after = [
            results[f"state.{name}"].reshape(rows, *feature_shape(size))
            for name, size in zip(self.states, self.state_sizes, strict=True)
        ]
        output = results["output"].reshape(rows, *output_shape(self.output_size))
        return unpacked(self.output_size, output, 1), tuple(after)

    def run_kernel(self, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs without gradients; see :func:`fusecell.eager.run_eager`."""
        reset = () if options.resets is None else reset_state(self, inputs[0])
        shape = output_shape(self.output_size)
        return self.prepacked()(inputs, state, reset, options, {} if len(shape) == 1 else {"output": shape})

    def prepacked(self) -> PrepackedKernel:
        """Return the kernel with the present weights, made on first use and after a change of a buffer."""
        return _kernel_of(self)

    def starts_from_zeros(self) -> bool:
        """Whether all first states are zeros."""
        return not any(self.get_buffer(f"{_START}{index}").any() for index in range(len(self.states)))

    def _numbers(self) -> State:
        """Return the weights as float32 numbers, in the order of the graph's leaves."""
        graph = self.graph
        leaves = enumerate(graph.leaves("weight"))
        return tuple(
            [_decoded(self.get_buffer(f"{_WEIGHT}{index}"), graph[leaf].attrs.get("stored")) for index, leaf in leaves]
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedCell:
        dtype = fn(torch.zeros(0)).dtype
        if dtype is not torch.float32:
            raise TypeError(
                f"A quantized {self.kind} computes in float32 and can't be converted to {dtype}. Convert the model, "
                "then quantize it: weights='bfloat16' or 'float16' store 16 bits a number."
            )
        module: Any = super()
        module._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.input_size} -> {self.output_size}, {self.format}"


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside a ``with`` block."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class _LoadedKernel(NamedTuple):
    """A cell's kernel, and what its buffers were when it was given them."""

    versions: tuple[tuple[int, int], ...]
    run: PrepackedKernel


# Not on the cells, which are copied, pickled and sent to other processes.
_KERNELS: WeakKeyDictionary[QuantizedCell, _LoadedKernel] = WeakKeyDictionary()


def _kernel_of(cell: QuantizedCell) -> PrepackedKernel:
    """Return a cell's kernel with its present weights, made on first use and after a change of a buffer."""
    versions = tuple([(value.data_ptr(), value._version) for value in cell._buffers.values() if value is not None])
    loaded = _KERNELS.get(cell)
    if loaded is None or loaded.versions != versions:
        graph, reference = cell.graph, ref(cell)
        kernel = compile_graph(graph, about=f"{cell.kind}, {cell.format}")
        # What is stored in fewer bits is an operand of products alone.
        only_packed = ["stored" in graph[leaf].attrs for leaf in graph.leaves("weight")]

        def numbers() -> State:
            owner = reference()
            assert owner is not None, "its kernel is run by the cell"
            return owner._numbers()

        loaded = _KERNELS[cell] = _LoadedKernel(versions, PrepackedKernel(kernel, numbers, only_packed))
    return loaded.run


@register_cache
def _forget_kernels(kinds: Collection[type] | None = None) -> None:
    """Drop the kernels of all cells."""
    _KERNELS.clear()


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Graph:
    return Graph.parse(text)


def _encoded(value: Any, stored: str | None) -> Tensor:
    """Return a weight as it is stored: numbers of float32, or bits."""
    if stored is None:
        return torch.from_numpy(np.ascontiguousarray(value))
    bits = Storage(stored).encode(value)
    return torch.from_numpy(bits.view(np.int16) if bits.itemsize == 2 else bits)


def _decoded(value: Tensor, stored: str | None) -> Tensor:
    """Return the numbers that a stored weight stands for."""
    if stored is None:
        return value
    dtype = _DECODED.get(Storage(stored))
    return (value if dtype is None else value.view(dtype)).to(torch.float32)
