"""The seam: a runner maps (cell, inputs, state, options) to (outputs, state); this module picks one.

Layers and cells call :func:`run` and know nothing of what is behind it. A runner is a module that registers a
function here when it is imported; runners stand above this module, so they are imported by name, on first use.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fusecell.cell import Cell

__all__ = [
    "Manner",
    "Options",
    "Runner",
    "RunnerName",
    "State",
    "View",
    "active_runner",
    "autocasting",
    "no_collection",
    "prepare",
    "recording",
    "recording_into",
    "register",
    "register_memory",
    "remember",
    "repeated",
    "run",
    "runner",
    "steps_of",
    "traced_runner",
]

RunnerName = Literal["auto", "compiled", "eager"]
State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How a sequence is run beside its input and state; every tensor is time-major and already checked.

    Arguments:
        lengths: (N,) int64, row n is valid for t < lengths[n].
        resets: (T, N) bool, True puts a row back to the initial state before the step at t.
        reverse: run from the last step to the first.
        recompute: keep the states only for the backward, which computes everything else again.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    recompute: bool = False


Runner = Callable[["Cell", State, State, Options], tuple[Tensor, State]]


class Manner(NamedTuple):
    """How a call without lengths and resets hands over its input and state, as they are given, and takes its results.

    Outputs come time-major, states as they are given.

    Arguments:
        steps: the input has a dimension of steps; else it is one step.
        batched: input and state have a dimension of rows.
        batch_first: the input's rows come before its steps.
        layered: the state has a dimension of layers, of which there is one.
        outputs: the outputs are wanted, not only the state.
        reverse, recompute: as in :class:`Options`.
        part: which of an owner's cells it is that is called.
    """

    steps: bool = False
    batched: bool = True
    batch_first: bool = False
    layered: bool = False
    outputs: bool = True
    reverse: bool = False
    recompute: bool = False
    part: int = 0

    def fits(self, given: State) -> bool:
        """Whether an input, and the states if they are given, have the right number of dimensions."""
        rank = 1 + self.batched
        return given[0].dim() == rank + self.steps and all(value.dim() == rank + self.layered for value in given[1:])

    def sequence(self, value: Tensor) -> Tensor:
        """The input as (T, N, ...)."""
        if not self.batched:
            value = value[..., None, :]
        elif self.batch_first:
            value = value.transpose(0, 1)
        return value if self.steps else value[None]

    def rows_of(self, state: Tensor) -> Tensor:
        """A state as (N, size)."""
        state = state[0] if self.layered else state
        return state if self.batched else state[None]

    def state(self, rows: Tensor) -> Tensor:
        """A state as it is given, of (N, size)."""
        state = rows if self.batched else rows[0]
        return state[None] if self.layered else state

    def output(self, outputs: Tensor) -> Tensor:
        """Outputs as they are returned, of (T, N, size)."""
        outputs = outputs if self.steps else outputs[0]
        return outputs if self.batched else outputs[..., 0, :]

    def scanned(self, outputs: Tensor) -> Tensor:
        """Outputs as (T, N, size), of what is returned."""
        outputs = outputs if self.batched else outputs[..., None, :]
        return outputs if self.steps else outputs[None]

    def output_shape(self, steps: int, rows: int, size: int) -> tuple[int, ...]:
        return (steps,) * self.steps + (rows,) * self.batched + (size,)

    def state_shape(self, rows: int, size: int) -> tuple[int, ...]:
        return (1,) * self.layered + (rows,) * self.batched + (size,)


class View(NamedTuple):
    """What a module that is no cell itself makes a cell of, each time it is called.

    Arguments:
        cell: makes it.
        attributes: the names of all the module's attributes that go into it.
        weights: the name of the module's parameter for each of the cell's.
    """

    cell: Callable[[], Cell]
    attributes: Sequence[str]
    weights: Mapping[str, str]


class Memory(Protocol):
    """Who remembers calls, so that one like an earlier one needs no second look at anything but addresses."""

    def find(self, owner: nn.Module, manner: Manner, given: State) -> tuple[Tensor | None, State] | None: ...
    def keep(self, owner: nn.Module, manner: Manner, given: State, view: View | None) -> None: ...


_MODULES = {
    "eager": "fusecell.eager",
    "auto": "fusecell.compiler.runner",
    "compiled": "fusecell.compiler.runner",
    "traced": "fusecell.compiler.operator",
    "record": "fusecell.tape.recording",
}
_RUNNERS: dict[str, Runner] = {}
_memory: Memory | None = None
_COMPILED = ("auto", "compiled")


class _Choice(threading.local):
    """What is in force in a thread."""

    name: Any = None  # a RunnerName, or "record"
    recompute = False
    keep: Any = None


_CHOICE = _Choice()


def register(name: str, function: Runner) -> None:
    """Make ``function`` the runner called ``name``."""
    _RUNNERS[name] = function


def active_runner() -> RunnerName:
    """The runner in force in this thread: the innermost ``with runner(...)``, else ``FUSECELL_RUNNER``, else auto."""
    chosen: Any = _CHOICE.name
    found: RunnerName = _default_runner() if chosen is None else chosen
    return found


@functools.cache
def _default_runner() -> RunnerName:
    # Read once: a look into os.environ costs a tenth of a small cell's step.
    return _checked(os.environ.get("FUSECELL_RUNNER", "auto"), "the environment variable FUSECELL_RUNNER")


@contextmanager
def runner(name: RunnerName) -> Iterator[None]:
    """Choose how cells run inside a ``with`` block, in this thread.

    ``"compiled"`` runs machine code and raises :class:`fusecell.NotCompilable` where it can't; ``"eager"`` loops
    over ``cell.step`` in Python; ``"auto"``, the default, compiles where it can and falls back to eager with one
    :class:`fusecell.EagerWarning` per cell.

    Example:
        >>> import torch, fusecell as fc
        >>> with fc.runner("eager"):
        ...     y, h = fc.Recurrent(fc.GRUCell(5, 10))(torch.randn(7, 3, 5))

    Raises:
        ValueError: for any other name.
    """
    before = _CHOICE.name
    _CHOICE.name = _checked(name, "runner()")
    try:
        yield
    finally:
        _CHOICE.name = before


@contextmanager
def recompute(enabled: bool = True) -> Iterator[None]:
    """Keep less for the backward inside a ``with`` block, in this thread.

    Training keeps, for each row and step, the products and transcendentals that the gradient needs: for a GRU five
    numbers per unit. Recomputing keeps the states only and works out the rest in the backward, for about a third more
    arithmetic. The layers' keyword ``recompute=True`` does the same for one layer.

    Example:
        >>> import torch, fusecell as fc
        >>> gru = fc.GRU(5, 10)
        >>> with fc.recompute():
        ...     y, h = gru(torch.randn(7, 3, 5))
        >>> y.sum().backward()

    Arguments:
        enabled: False to switch it off again inside another block; a layer's own ``recompute=True`` stays.
    """
    before = recomputing()
    _CHOICE.recompute = enabled
    try:
        yield
    finally:
        _CHOICE.recompute = before


def recomputing() -> bool:
    """Whether ``with recompute():`` is in force in this thread."""
    return _CHOICE.recompute


@contextmanager
def recording(keep: Callable[[Cell, dict[str, Any], Options], None]) -> Iterator[None]:
    """Hand what happens inside every cell that runs in a ``with`` block to ``keep``, in this thread."""
    before = _CHOICE.name, _CHOICE.keep
    _CHOICE.name, _CHOICE.keep = "record", keep
    try:
        yield
    finally:
        _CHOICE.name, _CHOICE.keep = before


def recording_into() -> Callable[[Cell, dict[str, Any], Options], None]:
    """Who gets what is recorded in this thread."""
    keep: Callable[[Cell, dict[str, Any], Options], None] = _CHOICE.keep
    return keep


def run(cell: Cell, inputs: State, state: State, options: Options) -> tuple[Tensor, State]:
    """Run ``cell`` over ``inputs``, each (T, N, ...) or (1, N, ...), with the runner in force.

    Autocast is switched off: a recurrence in its weights' dtype is what torch.nn's own layers compute.
    """
    if torch.compiler.is_compiling():
        return traced_runner()(cell, inputs, state, options)
    name = active_runner()
    function = _RUNNERS.get(name) or _load(name)
    if torch._C._is_any_autocast_enabled():
        device = inputs[0].device.type
        if autocasting(device):
            with torch.autocast(device, enabled=False):
                return function(cell, inputs, state, options)
    return function(cell, inputs, state, options)


def register_memory(memory: Memory) -> None:
    """Make ``memory`` the one that calls are remembered in."""
    global _memory  # noqa: PLW0603  # one there is, as of runners under a name
    _memory = memory


def repeated(owner: nn.Module, manner: Manner, given: State) -> tuple[Tensor | None, State] | None:
    """Outputs and states of a call that is like one that was remembered, in everything but tensors' values; else None.

    Arguments:
        owner: the cell, or what makes cells of itself.
        given: exactly what was handed over: the input, and the states if they were.
    """
    if (_CHOICE.name or _default_runner()) not in _COMPILED or _memory is None:
        return None
    return _memory.find(owner, manner, given)


def remember(owner: nn.Module, manner: Manner, given: State, view: View | None = None) -> None:
    """Keep what a call that has just gone well takes, for others that are like it, if it is the runner's in force."""
    if (_CHOICE.name or _default_runner()) in _COMPILED and _memory is not None:
        _memory.keep(owner, manner, given, view)


def traced_runner() -> Runner:
    """What runs a cell while torch.compile or torch.export traces it."""
    return _RUNNERS[_traced_name(_CHOICE.name)]


def _traced_name(chosen: RunnerName | None) -> str:
    """The traced runner in force, imported: torch runs this, where it would trace anything else."""
    name = "eager" if (chosen or _default_runner()) == "eager" else "traced"
    if name not in _RUNNERS:
        _load(name)
    return name


# What torch.compiler.assume_constant_result does, which would import torch's compiler here.
_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as ``meta``, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def steps_of(inputs: State) -> int:
    """The steps of a sequence: those of any input that is not constant over time."""
    for value in inputs:
        if value.shape[0] != 1:
            return value.shape[0]
    return 1


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


def _checked(name: str, where: str) -> RunnerName:
    if name not in get_args(RunnerName):
        raise ValueError(f"{where} got {name!r}; expected one of 'auto', 'compiled' or 'eager'.")
    return name  # type: ignore[return-value]  # narrowed by the test above
