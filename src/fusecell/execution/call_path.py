"""The one path of every call that may repeat an earlier one: through the cache of prepared calls, or the slow path.

Whether an earlier call's guards hold, so that the checks can be skipped, is decided in `compiler.dispatch.fast_path`,
which registers itself here. A step of a small GRU takes some 70 us on the slow path, for all its checks, and 11 us by a
prepared call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.profiler import record_function

from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.context import is_compiled
from fusecell.execution.natively import natively
from fusecell.execution.options import State
from fusecell.execution.torchscript import is_tracing
from fusecell.torch_internals import is_profiling

__all__ = ["CallCache", "SlowPath", "call", "register_call_cache"]

SlowPath = Callable[..., tuple[Any, Any]]
"""A function of (owner, input, state, *options) that checks them, runs the cell, and returns what ``call`` does."""


class CallCache(Protocol):
    """A cache of prepared calls: each a kernel for tensors of known shapes and strides, behind guards."""

    def find(self, owner: nn.Module, form: CallForm, tensors: State, /) -> tuple[Tensor | None, State] | None:
        """Run the prepared call whose guards hold, and return the outputs and the state; None if there is none.

        Arguments:
            owner: the cell, or the module that builds one for each call.
            tensors: the inputs and, if the caller passed them, the states.
        """
        ...

    def keep(self, owner: nn.Module, form: CallForm, tensors: State, factory: CellFactory | None, /) -> None:
        """Prepare a call that has just succeeded on the slow path for the next time.

        Arguments:
            factory: how to build the cell of an owner that is no cell itself.
        """
        ...


_cache: CallCache | None = None
_SEQUENCES = (tuple, list)


def register_call_cache(cache: CallCache) -> None:
    """Set the process's cache of calls; the compiled runner does, when it is imported."""
    global _cache  # noqa: PLW0603  # one per process, registered as runners are
    _cache = cache


@natively
def call(
    owner: nn.Module,
    input: Tensor | State,
    state: Any,
    form: CallForm,
    slow_path: SlowPath,
    options: tuple[Any, ...] = (),
    factory: Callable[[Any], CellFactory] | None = None,
) -> tuple[Any, Any]:
    """Launch the prepared kernel of an earlier call like this one, else take ``slow_path`` and prepare the next.

    Arguments:
        owner: the cell, or the module that builds one for each call.
        input, state: as the user passed them; nothing is checked but that the input is a tensor, or a tuple of as many
            as the form has.
        form: their layout.
        slow_path: called with (owner, input, state, *options); checks them and runs the cell.
        options: what ``slow_path`` takes besides; ``form`` must tell calls with different options apart.
        factory: called with an owner that is no cell itself, returns how to build its cell.

    Returns:
        The outputs, or None where ``form`` has none, and the state as users see it.
    """
    # Positional parameters, and options in place of a closure: a hit takes 11 us in all, a closure 0.2 of them.
    tensors = (input,) if isinstance(input, Tensor) else input
    if isinstance(state, Tensor):
        tensors = (*tensors, state)
    elif isinstance(state, _SEQUENCES):
        tensors = (*tensors, *state)
    elif state is not None:
        return slow_path(owner, input, state, *options)
    if _cache is not None and is_compiled():
        if is_profiling():
            with record_function(f"fusecell::{type(owner).__name__}"):
                result = _cache.find(owner, form, tensors)
        else:
            result = _cache.find(owner, form, tensors)
        if result is not None:
            outputs, after = result
            return outputs, after[0] if len(after) == 1 else after  # `public_state`, without another call
    result = slow_path(owner, input, state, *options)
    # Looked at anew: the first slow path of a process imports the compiled runner, which registers the cache.
    if _cache is not None and is_compiled() and not is_tracing():
        _cache.keep(owner, form, tensors, None if factory is None else factory(owner))
    return result
