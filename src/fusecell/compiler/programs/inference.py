"""Run a compiled step without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.frontend import Traced, trace
from fusecell.compiler.frontend.dtypes import has_16_bits, rounded, widened
from fusecell.compiler.ir.graph import Graph, copy, rebuild
from fusecell.compiler.programs.allocation import new_empty
from fusecell.compiler.programs.launch import RaggedRows, run
from fusecell.compiler.programs.replay import with_draws
from fusecell.compiler.refusal import Refusal, refusal
from fusecell.compiler.runtime.kernel import Kernel, compile_graph
from fusecell.errors import CompilerError
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State, steps_of
from fusecell.shapes import Shape
from fusecell.validation import first_state

__all__ = ["Program", "compile_step", "reset_state", "run_all", "run_forward", "without_notes"]

_FLAT: Mapping[str, Shape] = {}


@dataclass(frozen=True)
class Program:
    """Machine code for the step of one cell, for inputs of some features and dtype; any number of steps and rows.

    Arguments:
        seconds: the time it took from the cell to callable code.
    """

    traced: Traced
    kernel: Kernel
    seconds: float

    def __call__(self, cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
        """Run over (T, N, ...) inputs; see :func:`fusecell.eager.run_eager`."""
        reset = () if options.resets is None else reset_state(cell, inputs[0])
        weights = self.traced.weights.values(cell)
        inputs = with_draws(inputs, self.traced, options)
        output, after = run_forward(self.kernel, weights, inputs, state, reset, options, self.traced.shapes)
        dtype = self.traced.output_dtype
        return output if dtype is None else output.to(dtype), after


def reset_state(cell: Cell, like: Tensor) -> State:
    """Return the states that resets of (T, N, ...) inputs go back to, one row for each of theirs.

    Raises:
        ValueError: if the cell's ``initial_state`` has another dtype or device than it was asked for.
    """
    state = first_state(cell, like.shape[1], dtype=like.dtype, device=like.device)
    for name, value in zip(cell.states, state, strict=True):
        if value.dtype != like.dtype or not value.is_cpu or value.layout is not torch.strided:
            raise ValueError(
                f"{type(cell).__name__}.initial_state made {name} in {value.dtype} on {value.device}, "
                f"asked for {like.dtype} on {like.device}."
            )
    return state


@one_thread_after_fork()
def run_forward(
    kernel: Kernel,
    weights: State,
    inputs: State,
    state: State,
    reset: State,
    options: Options,
    shapes: Mapping[str, Shape] = _FLAT,
) -> tuple[Tensor, State]:
    """Run a forward kernel without gradient; return the output and the states after the last step.

    Arguments:
        reset: the states that resets go back to.
        shapes: of a row of the output; flat where it has none.
    """
    outputs, after = run_all(kernel, weights, inputs, state, reset, options, shapes)
    return outputs["output"], after


def run_all(
    kernel: Kernel,
    weights: State,
    inputs: State,
    state: State,
    reset: State,
    options: Options,
    shapes: Mapping[str, Shape] = _FLAT,
    launch: Callable[..., None] = run,
) -> tuple[dict[str, Tensor], State]:
    """Run a forward kernel of several outputs; return each, (T, N, ...), by name, and the states after the last step.

    Tensors of 16 bits are converted to the kernel's float32, and results back.

    Arguments:
        reset: the states that resets go back to.
        shapes: of a row of each output, by name; flat where it has none.
        launch: runs the kernel, with the arguments of :func:`run`.
    """
    dtype = inputs[0].dtype
    if has_16_bits(dtype):
        wide = widened(inputs), widened(state), widened(reset)
        outputs, after = run_all(kernel, weights, *wide, options, shapes, launch)
        return dict(zip(outputs, rounded(tuple(outputs.values()), dtype), strict=True)), rounded(after, dtype)
    steps, rows = steps_of(inputs), inputs[0].shape[1]
    after = tuple([value.new_empty(value.shape) for value in state])
    outputs = _new_outputs(kernel, inputs[0], steps, rows, shapes)
    ragged = None
    if options.lengths is not None:
        ragged = RaggedRows.of(options.lengths, steps)
        for value in outputs.values():  # the kernel writes nothing behind a row's end
            value.zero_()
    block = kernel.block()
    block.bind(inputs=inputs, weights=weights, first=state, last=after, outputs=outputs.values())
    if options.resets is not None:
        block.bind(reset=reset, resets=options.resets)
    launch(kernel, block, steps, rows, options.reverse, ragged)
    return outputs, after


def _new_outputs(kernel: Kernel, like: Tensor, steps: int, rows: int, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Allocate each output, (T, N, ...), by name."""
    sizes = kernel.output_sizes
    if len(sizes) == 1:
        return {label: new_empty(like, steps, rows, *shapes.get(label, (size,))) for label, size in sizes.items()}
    # All in one piece of memory, which is sooner large enough for huge pages than each by itself.
    memory = new_empty(like, steps * rows * sum(sizes.values()))
    parts = torch.split(memory, [steps * rows * size for size in sizes.values()])
    return {
        label: part.view(steps, rows, *shapes.get(label, (size,)))
        for (label, size), part in zip(sizes.items(), parts, strict=True)
    }


def compile_step(
    cell: Cell,
    features: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    draws: bool = True,
) -> Program | Refusal:
    """Trace a cell's step and compile it.

    Arguments:
        features: the shape of each input behind (T, N).
        dtypes: of each input in the step, where some are integers.
        draws: whether the step may draw random numbers, which each call then draws before it runs the kernel.
    """
    began = time.perf_counter()
    traced = trace(cell, features, dtype, gradients=False, dtypes=dtypes, draws=draws, leftovers=True)
    if isinstance(traced, Refusal):
        return traced
    try:
        kernel = compile_graph(without_notes(traced.graph), about=f"{type(cell).__name__}, without gradient")
    except (CompilerError, AssertionError, LookupError) as error:
        return refusal(error)
    return Program(traced, kernel, time.perf_counter() - began)


def without_notes(graph: Graph) -> Graph:
    """Return a graph without the intermediate values that the cell records, and whatever only these need."""
    outputs = {label: index for label, index in graph.outputs.items() if not label.startswith("note.")}
    return rebuild(replace(graph, outputs=outputs), copy(graph))
