"""Run steps that leave tensors in attributes of their module, as spiking neurons do with their potential.

No step reads what an earlier one has left, so a compiled loop computes the same without it. After a call, though, it is
there for whoever looks: the last step is run in Python, and sets the attributes as the last step of a loop does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.programs.autograd import TrainableStep
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State, steps_of
from fusecell.shapes import packed

__all__ = ["run_leaving"]


def run_leaving(
    program: Program | TrainableStep, cell: Cell, inputs: State, numbers: State, state: State, options: Options
) -> tuple[Tensor, State] | Refusal:
    """Run all steps but the last as machine code, and the last in Python."""
    steps = steps_of(inputs)
    if options.lengths is not None and options.reverse:
        name = program.traced.leftovers[0]
        return Refusal(
            (
                f"The step sets self.{name}, which a call leaves as its last step does: backwards, rows of different "
                "lengths have different last steps. Return the value as part of the output instead.",
            )
        )
    last = 0 if options.reverse else steps - 1
    outputs = []
    if steps > 1:
        first = slice(1, None) if options.reverse else slice(0, last)
        result = program(cell, _part(numbers, steps, first), state, _part_of_options(options, first, steps - 1))
        if isinstance(result, Refusal):
            return result
        outputs, state = [result[0]], result[1]
    at = slice(last, last + 1)
    output, after = run_eager(cell, _part(inputs, steps, at), state, _part_of_options(options, at, 1, last))
    outputs.append(packed(output, 2))
    return torch.cat(outputs[::-1] if options.reverse else outputs), after


def _part(inputs: State, steps: int, part: slice) -> State:
    """Return some steps of inputs; one that is constant over time has one step."""
    return tuple([value[part] if value.shape[0] == steps else value for value in inputs])


def _part_of_options(options: Options, part: slice, steps: int, before: int = 0) -> Options:
    """Return the options of some steps.

    Arguments:
        steps: how many.
        before: how many steps come before them.
    """
    lengths = None if options.lengths is None else (options.lengths - before).clamp(0, steps)
    return replace(options, lengths=lengths, resets=None if options.resets is None else options.resets[part])
