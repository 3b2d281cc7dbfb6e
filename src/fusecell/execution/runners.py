"""Runners: each maps (cell, inputs, state, options) to (outputs, state); ``run`` takes the one in force.

Layers and cells call :func:`run` and know nothing of what is behind it. A runner is a module that registers a
function here when it is imported; runners stand above this module, so they are imported by name, on first use.
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

from fusecell.execution.context import RunnerName, active_runner, chosen_runner, default_runner
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.execution.torchscript import refuse_trace

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
    "traced": "fusecell.compiler.dispatch.torch_operator",
    "record": "fusecell.tape.recording",
}
_RUNNERS: dict[str, Runner] = {}


def register(name: str, function: Runner) -> None:
    """Make ``function`` the runner called ``name``."""
    _RUNNERS[name] = function


@natively
def run(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """Run ``cell`` over ``inputs``, each (T, N, ...) or (1, N, ...), with the runner in force.

    Autocast is switched off: a recurrence in its weights' dtype is what torch.nn's own layers compute.

    Raises:
        RuntimeError: while torch.jit traces.
    """
    if torch.compiler.is_compiling():
        return traced_runner()(cell, inputs, state, options)
    if torch._C._get_tracing_state() is not None:
        refuse_trace(type(cell).__name__, "the trace would hold its loop unrolled, wrong for every other length.")
    name = active_runner()
    function = _RUNNERS.get(name) or _load(name)
    if torch._C._is_any_autocast_enabled():
        device = inputs[0].device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return function(cell, inputs, state, options)
    return function(cell, inputs, state, options)


def traced_runner() -> Runner:
    """What runs a cell while torch.compile or torch.export traces it."""
    return _RUNNERS[_traced_name(chosen_runner())]


def traced_as_operator() -> bool:
    """Whether that is the operator, which takes a drop-in layer and the place of its cell; else the Python loop."""
    return _traced_name(chosen_runner()) == "traced"


def _traced_name(chosen: RunnerName | None) -> str:
    """The traced runner in force, imported: torch runs this, where it would trace anything else.

    Arguments:
        chosen: handed over, because torch's tracer sets the thread's choice in its own bookkeeping only.
    """
    name = "eager" if (chosen or default_runner()) == "eager" else "traced"
    if name not in _RUNNERS:
        _load(name)
    return name


# What torch.compiler.assume_constant_result does, which would import torch's compiler here.
_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as ``meta``, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def prepare() -> None:
    """Import the runner that calls will want, so that the first one needn't wait for it."""
    if os.environ.get("FUSECELL_RUNNER", "auto") != "eager":
        _load("auto")


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold back Python's cyclic garbage collector inside a ``with`` block.

    Beside torch's objects a full collection takes longer than all else of a first call, and would find nothing.
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
