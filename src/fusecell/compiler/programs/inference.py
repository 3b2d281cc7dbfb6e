"""A program: a cell's step compiled, and its calls without gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.ir.graph import Graph, copy, rebuild
from fusecell.compiler.programs.allocation import new_empty
from fusecell.compiler.programs.launch import RaggedRows, run
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.errors import CompilerError
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State, steps_of
from fusecell.validation import first_state

__all__ = ["Program", "compile_step", "run_all", "run_forward", "without_notes"]


@dataclass(frozen=True)
class Program:
    """Machine code for one cell, input form and dtype; any number of steps and rows.

    Attributes:
        seconds: how long it took from the cell to callable code.
    """

    traced: Traced
    kernel: Kernel
    seconds: float

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""
        start: State = ()
        if options.resets is not None:
            start = reset_state(cell, inputs[0])
        return run_forward(self.kernel, self.traced.weights.values(cell), inputs, state, start, options)


def reset_state(cell: Cell, like: Tensor) -> State:
    """The states that resets of (T, N, ...) inputs go back to, as machine code reads them.

    Raises:
        ValueError: if the cell made them in another dtype, or elsewhere.
    """
    found = first_state(cell, like.shape[1], dtype=like.dtype, device=like.device)
    for name, value in zip(cell.states, found, strict=True):
        if value.dtype != like.dtype or not value.is_cpu or value.layout is not torch.strided:
            raise ValueError(
                f"{type(cell).__name__}.initial_state made {name} in {value.dtype} on {value.device}, "
                f"asked for {like.dtype} on {like.device}."
            )
    return found


@one_thread_after_fork()
def run_forward(
    kernel: Kernel, weights: State, inputs: State, state: State, start: State, options: Options
) -> tuple[Tensor, State]:
    """Run a forward kernel without gradient; ``start`` is what resets go back to."""
    outputs, after = run_all(kernel, weights, inputs, state, start, options)
    return outputs["output"], after


def run_all(
    kernel: Kernel, weights: State, inputs: State, state: State, start: State, options: Options
) -> tuple[dict[str, Tensor], State]:
    """Run a forward kernel of several outputs, each (T, N, size), by name."""
    words, block, like = kernel.words, kernel.block(), inputs[0]
    steps, rows = steps_of(inputs), like.shape[1]
    # Whatever the block points into must live until the kernel returns.
    kept: list[object] = [
        kernel.give_sequences(block, words.inputs.values(), inputs),
        kernel.give_matrices(block, words.weights.values(), weights),
        kernel.give_states(block, words.first, state),
    ]
    after = tuple([value.new_empty(rows, value.shape[1]) for value in state])
    kernel.give_states(block, words.last, after)
    outputs = _new_outputs(kernel, like, steps, rows)
    if options.lengths is not None:
        for value in outputs.values():
            value.zero_()
    kernel.give_sequences(block, words.outputs.values(), outputs.values())
    if options.resets is not None:
        kept += [start, kernel.give_states(block, words.reset, start)]
        kernel.give_resets(block, options.resets)
    ragged = None if options.lengths is None else RaggedRows.of(options.lengths, steps)
    run(kernel, block, steps, rows, options.reverse, ragged)
    return outputs, after


def _new_outputs(kernel: Kernel, like: Tensor, steps: int, rows: int) -> dict[str, Tensor]:
    """Memory for each output, (T, N, size); of several in one block, as that is large sooner."""
    sizes = kernel.output_sizes
    if len(sizes) == 1:
        return {label: new_empty(like, steps, rows, size) for label, size in sizes.items()}
    block = new_empty(like, steps * rows * sum(sizes.values()))
    parts = torch.split(block, [steps * rows * size for size in sizes.values()])
    return {label: part.view(steps, rows, size) for (label, size), part in zip(sizes.items(), parts, strict=True)}


def compile_step(cell: Cell, features: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Program | Refusal:
    """Trace a cell's step and compile it.

    Arguments:
        features: the feature shape of each input, what follows (T, N).
    """
    began = time.perf_counter()
    traced = trace(cell, features, dtype, gradients=False)
    if isinstance(traced, Refusal):
        return traced
    try:
        kernel = compile_graph(without_notes(traced.graph), about=f"{type(cell).__name__}, without gradient")
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error)
    return Program(traced, kernel, time.perf_counter() - began)


def without_notes(graph: Graph) -> Graph:
    """The graph of the outputs and states alone."""
    outputs = {label: index for label, index in graph.outputs.items() if not label.startswith("note.")}
    return rebuild(replace(graph, outputs=outputs), copy(graph))
