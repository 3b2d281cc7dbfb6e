"""The runners ``auto`` and ``compiled``: run machine code, or the Python loop with a warning, or raise the reasons."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from fusecell.cell import Cell
from fusecell.cell_tree import iter_cells
from fusecell.compiler.cache_registry import forget_programs, register_cache
from fusecell.compiler.dispatch import fast_path
from fusecell.compiler.dispatch.eligibility import (
    INTEGERS,
    as_numbers,
    call_reasons,
    integers_reason,
    loop_is_faster,
    needs_gradient,
)
from fusecell.compiler.dispatch.leftovers import run_leaving
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.programs.prepacked import KernelCell
from fusecell.compiler.programs.replay import is_in_order
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.errors import EagerWarning, NotCompilable
from fusecell.execution.call_path import register_call_cache
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.execution.options import Options, State
from fusecell.execution.runners import register
from fusecell.shapes import Outputs, is_size, unpacked
from fusecell.torch_transforms import is_transformed
from fusecell.validation import compute_dtype

__all__ = ["find_trainable", "find_program", "refresh", "run_auto", "run_compiled"]

# Frames of files that begin with these are not the user's.
_OWN = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent), contextlib.__file__)
_warned: set[tuple[type[Cell], tuple[str, ...]]] = set()


_OUT_OF_ORDER = (
    "The step draws random numbers, and an input or a state has its dimensions in another order in memory, in which "
    "the loop would draw; pass it as .contiguous()."
)
_ONLY_INFERENCE = Refusal(
    (
        "It is quantized, for inference: a call whose input or state requires gradients isn't compiled. Call it under "
        "torch.no_grad(), or train the model that it was made of.",
    )
)


@one_thread_after_fork()
def run_compiled(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Outputs, State]:
    """Run machine code.

    Raises:
        NotCompilable: with the reasons, if the cell or the call cannot be compiled.
    """
    if is_transformed():
        result = _run_transformed(cell, inputs, state, options)
        if not isinstance(result, Refusal):
            return result
        raise NotCompilable(type(cell).__name__, result.reasons)
    numbers = _numbers(cell, inputs, state)
    if isinstance(numbers, Refusal):
        raise NotCompilable(type(cell).__name__, numbers.reasons)
    reasons = call_reasons(numbers, state)
    if not reasons:
        result = _run(cell, inputs, numbers, state, options)
        if not isinstance(result, Refusal):
            return result
        reasons = result.reasons
    raise NotCompilable(type(cell).__name__, reasons)


@one_thread_after_fork()
def run_auto(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Outputs, State]:
    """Run machine code if possible, else the Python loop; warn once per class of cells and reason."""
    # None is worth a warning: torch compiles the loop itself, and another call of the cell may be compiled.
    if torch.compiler.is_compiling():
        return run_eager(cell, inputs, state, options)
    if is_transformed():
        # What a transform keeps from being compiled is worth no warning: another call of the cell may be.
        transformed = _run_transformed(cell, inputs, state, options)
        return run_eager(cell, inputs, state, options) if isinstance(transformed, Refusal) else transformed
    numbers = _numbers(cell, inputs, state)
    if isinstance(numbers, Refusal):
        result: tuple[Outputs, State] | Refusal = numbers
    elif call_reasons(numbers, state) or loop_is_faster(cell, numbers):
        return run_eager(cell, inputs, state, options)
    else:
        result = _run(cell, inputs, numbers, state, options)
    if not isinstance(result, Refusal):
        return result
    if (type(cell), result.reasons) not in _warned:
        _warned.add((type(cell), result.reasons))
        reasons = " ".join(result.reasons)
        warnings.warn(f"{type(cell).__name__} runs as a Python loop: {reasons}", EagerWarning, _users_level())
    return run_eager(cell, inputs, state, options)


def _run_transformed(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Outputs, State] | Refusal:
    # Imported on use: few programs transform anything.
    from fusecell.compiler.dispatch.transforms import run_transformed

    return run_transformed(cell, inputs, state, options)


def _users_level() -> int:
    """Return the stack level, for a warning of the caller's, of the innermost frame that is the user's code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        level, frame = level + 1, frame.f_back
    return level


def _numbers(cell: Cell, inputs: State, state: State) -> State | Refusal:
    """Return inputs as kernels take them, integers as numbers."""
    for value in inputs:
        if value.dtype in INTEGERS:
            return as_numbers(inputs, state[0].dtype if state else compute_dtype(cell, value))
    return inputs


def _run(cell: Cell, inputs: State, numbers: State, state: State, options: Options) -> tuple[Outputs, State] | Refusal:
    result = _run_packed(cell, inputs, numbers, state, options)
    size = cell.output_size
    if isinstance(result, Refusal) or is_size(size):
        return result
    return unpacked(size, result[0], 2), result[1]


def _run_packed(
    cell: Cell, inputs: State, numbers: State, state: State, options: Options
) -> tuple[Outputs, State] | Refusal:
    """Run over the inputs; several outputs are side by side in one."""
    if isinstance(cell, KernelCell):
        return _ONLY_INFERENCE if needs_gradient(cell, (*inputs, *state)) else cell.run_kernel(numbers, state, options)
    find = find_trainable if needs_gradient(cell, (*inputs, *state)) else find_program
    program = find(cell, inputs, numbers[0].dtype)
    if isinstance(program, Refusal):
        return program
    if program.traced.draws and not all(map(is_in_order, (*[value[0] for value in inputs], *state))):
        return Refusal((_OUT_OF_ORDER,))
    reason = integers_reason(inputs, program.traced.largest_integer)
    if reason is not None:
        return reason
    if program.traced.leftovers:
        return run_leaving(program, cell, inputs, numbers, state, options)
    return program(cell, numbers, state, options)


find_program = PROGRAMS.find
find_trainable = TRAINABLE_STEPS.find


def refresh(module: nn.Module | None = None) -> None:
    """Forget what was compiled for the cells in a module and for others of their classes; for all, without a module.

    A compiled step follows every attribute of its cell, and of what its code mentions the functions and numbers, be
    they global variables, attributes of the class or enclosed. It does not follow what is inside of other objects, such
    as a global dict or a module: call this after such a change. It also drops what :func:`fusecell.record`
    and torch's operator have compiled, but not what torch.compile has traced: that is ``torch.compiler.reset()``.

    Example:
        >>> import torch, fusecell as fc
        >>> class Amplifier(fc.Cell):
        ...     def step(self, x, state):
        ...         return settings["gain"] * x, state
        >>> settings = {"gain": 1.0}
        >>> layer, x = fc.Recurrent(Amplifier(3, 3)), torch.ones(2, 1, 3)
        >>> before, _ = layer(x)
        >>> settings["gain"] = 2.0
        >>> fc.refresh(layer)
        >>> after, _ = layer(x)
        >>> before.max(), after.max()
        (tensor(1.), tensor(2.))

    Arguments:
        module: a cell, a layer, or any module that contains some.
    """
    kinds = None if module is None else {type(cell) for cell in iter_cells(module)}
    forget_programs(kinds)


@register_cache
def _forget_warnings(kinds: Collection[type] | None = None) -> None:
    """Forget which warnings were given, so that they are given again."""
    for kind, reasons in list(_warned):
        if kinds is None or kind in kinds:
            _warned.discard((kind, reasons))


register("compiled", run_compiled)
register("auto", run_auto)
register_call_cache(fast_path.CACHE)
