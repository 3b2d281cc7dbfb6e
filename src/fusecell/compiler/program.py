"""A program: a cell's step compiled, and its calls."""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.emit import Emitted, emit
from fusecell.compiler.graph import Graph, copy, rebuild
from fusecell.compiler.machine import Loaded, load
from fusecell.compiler.passes import optimise
from fusecell.compiler.schedule import Plan, plan
from fusecell.compiler.target import host_target
from fusecell.compiler.trace import Refusal, Traced, trace
from fusecell.errors import CompilerError
from fusecell.runner import Options, State, steps_of

__all__ = ["Program", "compile_step"]

# What the buffers of a chunk of steps may take, so that lifted values are still in L2 when the loop reads them.
CHUNK_BYTES = 384 * 1024
# Below this many multiply-adds a kernel keeps the GIL: letting it go may cost more than the kernel.
SHORT_CALL = 1_000_000


class _Binding:
    """What a call writes into the argument block: the words' positions, looked up by name once."""

    def __init__(self, schedule: Plan, emitted: Emitted) -> None:
        graph = schedule.graph
        self._positions = {name: position for position, name in enumerate(emitted.words)}
        self.block = array("q", bytes(8 * len(emitted.words)))
        self.itemsize = 4 if graph.dtype == "f32" else 8
        self.output_size = graph[graph.outputs["output"]].size
        self.scratch = emitted.scratch
        self.sizes = self._all("", "steps", "rows", "reverse", "chunk_steps", "scratch")
        self.lengths = self._all("", "counts", "caller.order")
        self.resets = self._all("resets", "", ".step", ".row")
        sequence, matrix, rows = (".ptr", ".step", ".row"), (".ptr", ".stride0", ".stride1"), (".ptr", ".row")
        self.inputs = [self._all(f"in.{graph[index].name}", *sequence) for index in graph.leaves("input")]
        self.output = self._all("out.output", *sequence)
        self.weights = [self._all(f"weight.{graph[index].name}", *matrix) for index in graph.leaves("weight")]
        self.first, self.last, self.reset = (
            [self._all(f"{kind}.{name}", *rows) for name in schedule.states] for kind in ("first", "last", "reset")
        )
        bound = {places[0] for places in (*self.inputs, self.output, *self.weights, *self.first, *self.last)}
        missing = [name for name in emitted.pointers if self._positions[name] not in bound]
        if missing:
            raise CompilerError(f"a kernel would be called without {', '.join(missing)}")

    def _all(self, name: str, *parts: str) -> tuple[int, ...]:
        return tuple([self._positions[name + part] for part in parts])

    # Each hands back the tensors it made that the block now points into: they must live until the kernel returns.

    def give_inputs(self, block: array[int], inputs: State) -> list[Tensor]:
        kept = []
        for (ptr, step, row), value in zip(self.inputs, inputs, strict=True):
            rows = value if value.dim() == 3 else value.reshape(value.shape[0], value.shape[1], -1)
            strides = rows.stride()
            if strides[2] != 1 and rows.shape[2] > 1:
                rows = rows.contiguous()
                strides = rows.stride()
            if rows is not value:
                kept.append(rows)
            block[ptr], block[row] = rows.data_ptr(), strides[1] * self.itemsize
            block[step] = strides[0] * self.itemsize if rows.shape[0] > 1 else 0
        return kept

    def give_weights(self, block: array[int], weights: Sequence[Tensor]) -> list[Tensor]:
        kept = []
        for (ptr, stride0, stride1), value in zip(self.weights, weights, strict=True):
            if value.is_neg():
                value = value.resolve_neg()
                kept.append(value)
            strides = value.stride()
            block[ptr], block[stride0] = value.data_ptr(), strides[0] * self.itemsize
            if len(strides) > 1:
                block[stride1] = strides[1] * self.itemsize
        return kept

    def give_states(self, block: array[int], places: Sequence[tuple[int, ...]], state: State) -> list[Tensor]:
        kept = []
        for (ptr, row), value in zip(places, state, strict=True):
            strides = value.stride()
            if strides[1] != 1 and value.shape[1] > 1:
                value = value.contiguous()
                strides = value.stride()
                kept.append(value)
            block[ptr], block[row] = value.data_ptr(), strides[0] * self.itemsize
        return kept

    def give_lengths(self, block: array[int], lengths: Tensor, steps: int) -> list[Tensor]:
        ordered, order = torch.sort(lengths, descending=True, stable=True)
        counts = (ordered > torch.arange(steps, device=lengths.device)[:, None]).sum(1)
        kept = [counts, order]
        for place, value in zip(self.lengths, kept, strict=True):
            block[place] = value.data_ptr()
        return kept

    def give_resets(self, block: array[int], resets: Tensor) -> None:
        ptr, step, row = self.resets
        block[ptr], (block[step], block[row]) = resets.data_ptr(), resets.stride()

    def give_outputs(self, block: array[int], outputs: Tensor) -> None:
        ptr, step, row = self.output
        strides = outputs.stride()
        block[ptr], block[step], block[row] = outputs.data_ptr(), strides[0] * self.itemsize, strides[1] * self.itemsize

    def give_sizes(self, block: array[int], steps: int, rows: int, reverse: bool, like: Tensor) -> Tensor:
        chunk = max(1, min(steps, CHUNK_BYTES // max(self.scratch.per_chunk_row * rows, 1)))
        # In the inputs' dtype: new_empty goes where they are, whatever the default device.
        scratch = like.new_empty((self.scratch.bytes(rows, chunk) + 64) // self.itemsize + 1)
        places = self.sizes
        block[places[0]], block[places[1]], block[places[2]] = steps, rows, reverse
        block[places[3]], block[places[4]] = chunk, -(-scratch.data_ptr() // 64) * 64
        return scratch


@dataclass(frozen=True)
class Program:
    """Machine code for one cell, input form and dtype; any number of steps and rows."""

    traced: Traced
    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    macs: int
    binding: _Binding
    short: Callable[[int], None]
    long: Callable[[int], None]

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""
        like, binding = inputs[0], self.binding
        steps, rows = steps_of(inputs), like.shape[1]
        block = binding.block[:]  # like the scratch memory, the call's own: other threads may be in the kernel
        weights = self.traced.weights.values(cell)
        kept: list[object] = [
            binding.give_inputs(block, inputs),
            binding.give_weights(block, weights),
            binding.give_states(block, binding.first, state),
            binding.give_sizes(block, steps, rows, options.reverse, like),
        ]
        after = tuple([value.new_empty(rows, value.shape[1]) for value in state])
        binding.give_states(block, binding.last, after)
        new = like.new_empty
        if options.lengths is not None:
            new = like.new_zeros
            kept.append(binding.give_lengths(block, options.lengths, steps))
        if options.resets is not None:
            start = cell.initial_state(rows, dtype=like.dtype, device=like.device)
            kept += [start, binding.give_states(block, binding.reset, start)]
            binding.give_resets(block, options.resets)
        outputs = new(steps, rows, binding.output_size)
        binding.give_outputs(block, outputs)
        function = self.short if self.macs * steps * rows < SHORT_CALL else self.long
        function(block.buffer_info()[0])
        return outputs, after


def compile_step(cell: Cell, features: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Program | Refusal:
    """Trace, optimise, schedule, emit and load a cell's step.

    Arguments:
        features: the feature shape of each input, what follows (T, N).
    """
    began = time.perf_counter()
    traced = trace(cell, features, dtype, gradients=False)
    if isinstance(traced, Refusal):
        return traced
    target = host_target()
    try:
        schedule = plan(optimise(_without_notes(traced.graph))[-1][1])
        emitted = emit(schedule, target)
        binding = _Binding(schedule, emitted)
        loaded = load(emitted.text, ["run"], target)
    except (CompilerError, AssertionError, LookupError) as error:
        # A defect of ours must not stop a user whose cell runs well without the compiler.
        kind = type(error).__name__
        return Refusal((f"The compiler failed on it, please report this with the cell ({kind}: {error}).",))
    address = loaded.address("run")
    return Program(
        traced,
        schedule,
        emitted,
        loaded,
        time.perf_counter() - began,
        _macs(schedule),
        binding,
        ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address),
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
    )


def _without_notes(graph: Graph) -> Graph:
    """The graph of the outputs and states alone."""
    outputs = {label: index for label, index in graph.outputs.items() if not label.startswith("note.")}
    return rebuild(replace(graph, outputs=outputs), copy(graph))


def _macs(schedule: Plan) -> int:
    """Multiply-adds of a row's step."""
    graph = schedule.graph
    total = 0
    for _, node in graph:
        if node.op == "affine":
            terms: Any = node.attrs["terms"]
            total += sum((term["rows"][1] - term["rows"][0]) * node.size for term in terms)
    return total
