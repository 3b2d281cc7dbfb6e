"""The compiled runner: which calls it takes, the programs it keeps, and what happens to the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusecell.cell import Cell
from fusecell.compiler.kept import Kept
from fusecell.compiler.learner import compile_learner
from fusecell.compiler.program import compile_step
from fusecell.compiler.trace import Refusal
from fusecell.eager import run_eager
from fusecell.errors import EagerWarning, NotCompilable
from fusecell.runner import Options, State, register

__all__ = ["find_learner", "find_program", "refresh", "run_auto", "run_compiled"]

_EXACT = (Tensor, nn.Parameter)
_warned: set[tuple[type[Cell], tuple[str, ...]]] = set()


def run_compiled(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """Run machine code, or raise NotCompilable with the reasons."""
    reasons = _call_reasons(inputs, state)
    if not reasons:
        result = _run(cell, inputs, state, options)
        if not isinstance(result, Refusal):
            return result
        reasons = result.reasons
    raise NotCompilable(type(cell).__name__, reasons)


def run_auto(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """Run machine code where it can be, else the Python loop; say so once per class of cells and reason."""
    if torch.compiler.is_compiling() or _call_reasons(inputs, state):
        return run_eager(cell, inputs, state, options)
    result = _run(cell, inputs, state, options)
    if not isinstance(result, Refusal):
        return result
    if (type(cell), result.reasons) not in _warned:
        _warned.add((type(cell), result.reasons))
        reasons = " ".join(result.reasons)
        warnings.warn(f"{type(cell).__name__} runs as a Python loop: {reasons}", EagerWarning, stacklevel=2)
    return run_eager(cell, inputs, state, options)


def _run(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State] | Refusal:
    found = (find_learner if _needs_gradient(cell, (*inputs, *state)) else find_program)(cell, inputs)
    return found if isinstance(found, Refusal) else found(cell, inputs, state, options)


_programs = Kept(compile_step)
_learners = Kept(compile_learner)
find_program = _programs.find
find_learner = _learners.find


def refresh(module: nn.Module | None = None) -> None:
    """Forget what was compiled for the cells in a module and for others of their classes; for all, without a module.

    A compiled step follows every attribute of its cell. It doesn't follow global variables, nor what its functions
    enclose: after a change of those, call this.

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
        module: a cell, a layer, or any module that holds some.
    """
    kinds = None if module is None else {type(cell) for cell in _cells(module)}
    for kept in (_programs, _learners):
        kept.forget(kinds)
    for warned in list(_warned):
        if kinds is None or warned[0] in kinds:
            _warned.discard(warned)


def _cells(module: nn.Module) -> Iterator[Cell]:
    for part in module.modules():
        if isinstance(part, Cell):
            yield part
        elif hasattr(part, "leaf_cells"):  # a drop-in layer, whose cells are in no module's tree
            leaves: Any = part.leaf_cells
            yield from (cell for *_, cell in leaves())


def _call_reasons(inputs: State, state: State) -> tuple[str, ...]:
    """Why this call, whatever its cell, must run eagerly; empty if it need not."""
    dtype = inputs[0].dtype
    usual = dtype is torch.float32 or dtype is torch.float64
    for value in (*inputs, *state):
        usual = usual and type(value) in _EXACT and value.is_cpu and value.layout is torch.strided
        usual = usual and value.dtype is dtype and not value.is_neg() and value.numel() > 0
    if not usual:
        return _tensor_reasons((*inputs, *state))
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return ("A transform of torch.func or a dispatch mode is active.",)
    if forward_ad._current_level >= 0:
        return ("Forward-mode differentiation is active.",)
    return ()


def _tensor_reasons(tensors: State) -> tuple[str, ...]:
    """What is unusual about one of the tensors of a call."""
    first = tensors[0]
    if not all(type(value) in _EXACT for value in tensors):
        return ("An input or state is a subclass of Tensor.",)
    if not all(value.is_cpu and value.layout is torch.strided for value in tensors):
        return ("An input or state is not a dense tensor on the CPU.",)
    if first.dtype not in (torch.float32, torch.float64) or any(value.dtype != first.dtype for value in tensors):
        kinds = ", ".join(sorted({str(value.dtype) for value in tensors}))
        return (f"Inputs and states must all be float32 or all float64, got {kinds}.",)
    if any(value.is_neg() for value in tensors):
        return ("An input or state is a lazy negation.",)
    return ("There is nothing to compute.",)


def _needs_gradient(cell: Cell, tensors: State) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(value.requires_grad for value in tensors) or _learns(cell)


def _learns(module: nn.Module) -> bool:
    """Whether a parameter, or a tensor that stands as an attribute of a drop-in layer's cell, wants a gradient."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    for value in vars(module).values():
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return any(part is not None and _learns(part) for part in module._modules.values())


register("compiled", run_compiled)
register("auto", run_auto)
