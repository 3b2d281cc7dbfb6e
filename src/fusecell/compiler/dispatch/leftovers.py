"""Run steps that leave tensors in attributes of their module, as spiking neurons do with their potential.

No step reads what an earlier one has left, so a compiled loop computes the same without it. After a call, though, it is
there for whoever looks: the last step is run once more in Python, and sets the attributes as the last step of a loop
does. Where they are weights that hooks compute, as pruning does, the hooks alone are run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.programs.autograd import TrainableStep
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State, steps_of
from fusecell.torch_internals import computes_weight

__all__ = ["run_leaving"]


def run_leaving(
    program: Program | TrainableStep, cell: Cell, inputs: State, numbers: State, state: State, options: Options
) -> tuple[Tensor, State] | Refusal:
    """Run all steps as machine code, and the last once more in Python, for what it leaves."""
    hooks = _weights_hooks(cell)
    if hooks.keys() >= set(program.traced.leftovers):
        result = program(cell, numbers, state, options)
        for module, hook in hooks.values():
            hook(module, ())
        return result
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
    at = slice(last, last + 1)
    outputs = []
    if steps > 1:
        first = slice(1, None) if options.reverse else slice(0, last)
        result = program(cell, _part(numbers, steps, first), state, _part_of_options(options, first, steps - 1))
        if isinstance(result, Refusal):
            return result
        outputs, state = [result[0]], result[1]
    of_last = _part_of_options(options, at, 1, last)
    drawn = torch.random.get_rng_state() if program.traced.draws else None
    # The kernel's results, in which no call's end can be told from any other step: pieces have the bits of the whole.
    result = program(cell, _part(numbers, steps, at), state, of_last)
    if isinstance(result, Refusal):
        return result
    if drawn is not None:
        torch.random.set_rng_state(drawn)  # what is left is made of the numbers that the results are made of
    run_eager(cell, _part(inputs, steps, at), state, of_last)
    outputs.append(result[0])
    return torch.cat(outputs[::-1] if options.reverse else outputs), result[1]


def _weights_hooks(cell: Cell) -> dict[str, tuple[nn.Module, Any]]:
    """Return the hooks that compute weights of submodules, by the weight's path."""
    found = {}
    for prefix, module in cell.named_modules():
        for hook in module._forward_pre_hooks.values():
            if prefix and computes_weight(hook):
                # Pruning and the norms call it differently.
                name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")
                found[f"{prefix}.{name}"] = module, hook
    return found


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
