"""The cache of calls: one that is like an earlier one goes straight to its kernel."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.context import is_compiled
from fusecell.execution.natively import natively
from fusecell.execution.options import State
from fusecell.execution.torchscript import is_tracing

__all__ = ["CallCache", "register_call_cache", "store_call", "cached_call"]


class CallCache(Protocol):
    """Who remembers calls, so that one like an earlier one needs no second look at anything but addresses."""

    def find(self, owner: nn.Module, call_form: CallForm, given: State) -> tuple[Tensor | None, State] | None: ...
    def keep(self, owner: nn.Module, call_form: CallForm, given: State, view: CellFactory | None) -> None: ...


_memory: CallCache | None = None


def register_call_cache(memory: CallCache) -> None:
    """Make ``memory`` the one that calls are remembered in."""
    global _memory  # noqa: PLW0603  # one per process, registered as runners are
    _memory = memory


@natively
def cached_call(owner: nn.Module, call_form: CallForm, given: State) -> tuple[Tensor | None, State] | None:
    """Outputs and states of a call that is like one that was remembered, in everything but tensors' values; else None.

    Arguments:
        owner: the cell, or what makes cells of itself.
        given: exactly what was handed over: the input, and the states if they were.
    """
    if _memory is None or not is_compiled():
        return None
    return _memory.find(owner, call_form, given)


@natively
def store_call(owner: nn.Module, call_form: CallForm, given: State, view: CellFactory | None = None) -> None:
    """Keep what a call that has just gone well takes, for others that are like it, if it is the runner's in force."""
    if _memory is not None and is_compiled() and not is_tracing():
        _memory.keep(owner, call_form, given, view)
