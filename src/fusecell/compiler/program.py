"""A program: a cell's step compiled, and its calls."""

from __future__ import annotations

import ctypes
import time
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


@dataclass(frozen=True)
class Program:
    """Machine code for one cell, input form and dtype; any number of steps and rows."""

    traced: Traced
    plan: Plan
    emitted: Emitted
    loaded: Loaded
    seconds: float
    macs: int
    short: Callable[[int], None]
    long: Callable[[int], None]

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""
        steps = steps_of(inputs)
        rows = inputs[0].shape[1]
        kept: list[Tensor] = []
        words: dict[str, int] = {"steps": steps, "rows": rows, "reverse": int(options.reverse)}
        like = state[0] if state else inputs[0]
        self._give_inputs(words, kept, inputs, steps)
        self._give_weights(words, kept, self.traced.weights.values(cell))
        after = self._give_states(words, kept, cell, state, options, like)
        self._give_options(words, kept, options, steps)
        ragged = options.lengths is not None
        outputs = (like.new_zeros if ragged else like.new_empty)(steps, rows, cell.output_size)
        _give(words, "out.output", outputs)
        chunk = self._chunk_steps(steps, rows)
        scratch = torch.empty(self.emitted.scratch.bytes(rows, chunk) + 64, dtype=torch.uint8)
        words["chunk_steps"] = chunk
        words["scratch"] = -(-scratch.data_ptr() // 64) * 64
        missing = [name for name in self.emitted.pointers if name not in words]
        if missing:
            raise CompilerError(f"a kernel would be called without {', '.join(missing)}")
        block = (ctypes.c_int64 * len(self.emitted.words))(*[words.get(name, 0) for name in self.emitted.words])
        function = self.short if self.macs * steps * rows < SHORT_CALL else self.long
        function(ctypes.addressof(block))
        return outputs, after

    def _chunk_steps(self, steps: int, rows: int) -> int:
        each = self.emitted.scratch.per_chunk_row * max(rows, 1)
        return max(1, min(steps, CHUNK_BYTES // max(each, 1)))

    def _give_inputs(self, words: dict[str, int], kept: list[Tensor], inputs: State, steps: int) -> None:
        graph = self.plan.graph
        for index, value in zip(graph.leaves("input"), inputs, strict=True):
            rows = value.reshape(value.shape[0], value.shape[1], -1) if value.dim() != 3 else value
            if rows.shape[2] > 1 and rows.stride(2) != 1:
                rows = rows.contiguous()
            kept.append(rows)
            _give(words, f"in.{graph[index].name}", rows)
            if rows.shape[0] == 1 and steps != 1:
                words[f"in.{graph[index].name}.step"] = 0

    def _give_weights(self, words: dict[str, int], kept: list[Tensor], weights: Sequence[Tensor]) -> None:
        graph = self.plan.graph
        for index, value in zip(graph.leaves("weight"), weights, strict=True):
            kept.append(value)
            name, bytes_ = f"weight.{graph[index].name}", value.element_size()
            words[f"{name}.ptr"] = value.data_ptr()
            for dim, stride in enumerate(value.stride()):
                words[f"{name}.stride{dim}"] = stride * bytes_

    def _give_states(
        self, words: dict[str, int], kept: list[Tensor], cell: Cell, state: State, options: Options, like: Tensor
    ) -> State:
        after = tuple(value.new_empty(value.shape) for value in state)
        groups = {"first": state, "last": after}
        if options.resets is not None:
            groups["reset"] = cell.initial_state(like.shape[-2], dtype=like.dtype, device=like.device)
        for kind, values in groups.items():
            for name, value in zip(self.plan.states, values, strict=True):
                row = value if value.shape[1] < 2 or value.stride(1) == 1 else value.contiguous()
                kept.append(row)
                words[f"{kind}.{name}.ptr"] = row.data_ptr()
                words[f"{kind}.{name}.row"] = row.stride(0) * row.element_size()
        return after

    def _give_options(self, words: dict[str, int], kept: list[Tensor], options: Options, steps: int) -> None:
        if options.lengths is not None:
            lengths, order = torch.sort(options.lengths, descending=True, stable=True)
            counts = (lengths > torch.arange(steps)[:, None]).sum(1)
            kept += [order, counts]
            words["caller.order"], words["counts"] = order.data_ptr(), counts.data_ptr()
        if options.resets is not None:
            kept.append(options.resets)
            words["resets"] = options.resets.data_ptr()
            words["resets.step"], words["resets.row"] = options.resets.stride()


def _give(words: dict[str, int], name: str, value: Tensor) -> None:
    """The address and the strides, in bytes, of a (T, N, size) tensor."""
    bytes_ = value.element_size()
    words[f"{name}.ptr"] = value.data_ptr()
    words[f"{name}.step"], words[f"{name}.row"] = value.stride(0) * bytes_, value.stride(1) * bytes_


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
