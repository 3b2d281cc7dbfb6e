"""The registry of runners, functions of (cell, inputs, state, options) that return (outputs, state); ``run`` calls one.

Layers and cells call :func:`run` and depend on no runner. A runner is a module that registers a function here when it
is imported. Runners are above this module in the order of imports, so they are imported by name, on first use.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from fusecell.execution.context import RunnerName, active_runner, chosen_runner, default_runner
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.execution.torchscript import refuse_trace
from fusecell.torch_internals import any_autocast, computes_weight, in_jit_trace, is_profiling

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = [
    "Runner",
    "autocasting",
    "no_collection",
    "prepare",
    "register",
    "run",
    "traced_as_operator",
    "traced_runner",
]

Runner = Callable[["Cell", State, State, Options], tuple[Tensor, State]]

_MODULES = {
    "eager": "fusecell.eager",
    "auto": "fusecell.compiler.dispatch.runner",
    "compiled": "fusecell.compiler.dispatch.runner",
    "traced": "fusecell.compiler.dispatch.torch_compile",
    "record": "fusecell.tape.recording",
}
_RUNNERS: dict[str, Runner] = {}


def register(name: str, function: Runner) -> None:
    """Make ``function`` the runner called ``name``."""
    _RUNNERS[name] = function


@natively
def run(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """Run ``cell`` over ``inputs``, each (T, N, ...) or (1, N, ...), with the runner in force.

    Autocast is off inside: torch.nn's own layers compute in their weights' dtype too.

    Raises:
        RuntimeError: while torch.jit traces.
    """
    if torch.compiler.is_compiling():
        return traced_runner()(cell, inputs, state, options)
    if in_jit_trace():
        refuse_trace(type(cell).__name__, "the trace would hold its loop unrolled, wrong for every other length.")
    for hook in cell._forward_pre_hooks.values():
        if computes_weight(hook):  # of a parameter of the cell's own, which is never called itself
            hook(cell, ())
    name = active_runner()
    function = _RUNNERS.get(name) or _load(name)
    if is_profiling():
        with record_function(f"fusecell::{type(cell).__name__}"):
            return _without_autocast(function, cell, inputs, state, options)
    if any_autocast():  # one look for all types of device; a context manager takes longer
        return _without_autocast(function, cell, inputs, state, options)
    return function(cell, inputs, state, options)


@natively
def _without_autocast(
    function: Runner, cell: Cell, inputs: State, state: State, options: Options
) -> tuple[Tensor, State]:
    """Run ``function`` with autocast off."""
    device = inputs[0].device.type
    if autocasting(device):
        with torch.autocast(device, enabled=False):
            return function(cell, inputs, state, options)
    return function(cell, inputs, state, options)


def traced_runner() -> Runner:
    """Return the runner for a cell that torch.compile or torch.export traces."""
    return _RUNNERS[_traced_name(chosen_runner())]


def traced_as_operator() -> bool:
    """Return whether it is the operator, which takes a drop-in layer and its cell's index; else it is the loop."""
    return _traced_name(chosen_runner()) == "traced"


def _traced_name(runner: RunnerName | None) -> str:
    """Import the runner for traces, and return its name; torch calls this function rather than trace it.

    Arguments:
        runner: that of this thread. Passed, as a ``with runner(...)`` inside the traced function has happened only in
            the tracer's model of the thread, which this function, running for real, doesn't see.
    """
    name = "eager" if (runner or default_runner()) == "eager" else "traced"
    if name not in _RUNNERS:
        _load(name)
    return name


# As torch.compiler.assume_constant_result does, but without importing torch's compiler.
_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasting(device_type: str) -> bool:
    """Return whether autocast is on for a type of device; some, such as ``meta``, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def prepare() -> None:
    """Import the default runner now, so that the first call doesn't have to."""
    if os.environ.get("FUSECELL_RUNNER", "auto") != "eager":
        _load("auto")


@contextmanager
def no_collection() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off inside a ``with`` block.

    Imports and traces allocate so many objects that full collections start, each of which visits all of torch's: they
    take longer than the rest of a first call, and find nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(name: str) -> Runner:
    with no_collection():
        importlib.import_module(_MODULES[name])
    return _RUNNERS[name]
