"""Fast path for repeated calls: if all guards of an earlier call of a module hold, launch its kernels directly.

A call depends on its tensors' values, which are read anew, and on everything else, which is guarded:
:mod:`fusecell.compiler.frontend.guards` compares the module, and one call of torch's own guards compares all tensors:
their classes, dtypes, shapes, strides, ``requires_grad``, and the active transforms and modes. A call whose guards fail
takes the slow path, and is then cached too.
"""

from __future__ import annotations

from collections.abc import Collection
from weakref import ref

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.cache_registry import register_cache
from fusecell.compiler.dispatch.cached_calls import CachedCall
from fusecell.compiler.dispatch.eligibility import call_reasons
from fusecell.compiler.dispatch.ensemble_calls import prepare_members
from fusecell.compiler.dispatch.prepare_call import prepare
from fusecell.compiler.dispatch.prepared_kernels import state_shapes
from fusecell.compiler.programs.members import of_member
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.call_path import CallCache
from fusecell.execution.context import recomputing
from fusecell.execution.options import State
from fusecell.torch_internals import any_autocast, forward_ad, has_saved_tensor_hooks

__all__ = ["CACHE", "forget"]

_MAX_CALLS = 64
"""Calls of a module that are cached at a time."""
_MAX_MISSES = 32
"""Calls of a module that are cached one after another without a hit; then no more are.

Where every call has another shape, preparing it is in vain.
"""


class _ModuleCalls:
    """Cached calls of one module; they keep neither it nor its weights alive.

    Attributes:
        calls: by what is compared before any guard; None for a call that cannot be cached.
        misses: calls cached since the last hit.
    """

    def __init__(self, owner: nn.Module) -> None:
        key = id(owner)
        self.owner = ref(owner, lambda _: _CALLS.pop(key, None))
        self.calls: dict[tuple[object, ...], CachedCall | None] = {}
        self.misses = 0


# By id: a weak dictionary makes a reference at every look-up.
_CALLS: dict[int, _ModuleCalls] = {}


@register_cache
def forget(kinds: Collection[type] | None = None) -> None:
    """Drop all cached calls, whatever the classes of cells are."""
    _CALLS.clear()


def find(owner: nn.Module, form: CallForm, args: State) -> tuple[Tensor | None, State] | None:
    """See :class:`fusecell.execution.call_path.CallCache`; ``args`` are the inputs and, if passed, the states."""
    module_calls = _CALLS.get(id(owner))
    if module_calls is None or module_calls.owner() is not owner:
        return None
    # What is cheap to compare is in the key, so that calls of other shapes miss before any guard is run.
    call = module_calls.calls.get((form, len(args), args[0].shape, torch.is_grad_enabled(), recomputing()))
    # Read here, not through `in_forward_mode`: a function call is a hundredth of the smallest call.
    if call is None or forward_ad._current_level >= 0:
        return None
    tensors = call.guards.tensors(owner)
    if tensors is None:
        return None
    tensors = args + tensors
    if not call.check_tensors(*tensors):
        return None
    module_calls.misses = 0
    return call.run(owner, tensors)


def store(owner: nn.Module, form: CallForm, args: State, factory: CellFactory | None) -> None:
    """See :class:`fusecell.execution.call_path.CallCache`; ``args`` are the inputs and, if passed, the states."""
    module_calls = _CALLS.get(id(owner))
    if module_calls is None or module_calls.owner() is not owner:
        module_calls = _CALLS[id(owner)] = _ModuleCalls(owner)
    calls = module_calls.calls
    key = (form, len(args), args[0].shape, torch.is_grad_enabled(), recomputing())
    # Looked at once: nothing that makes a call uncacheable is likely to change, and preparing it in vain is slow.
    uncacheable = key in calls and calls[key] is None
    states = len(args) - form.inputs
    ranks = list(map(len, state_shapes(owner))) if isinstance(owner, Cell) else [1] * states
    if uncacheable or module_calls.misses >= _MAX_MISSES:
        return
    if any_autocast() or has_saved_tensor_hooks() or recomputing() == "chunk":
        return
    of_one = of_member(0, args, form.own(len(args))) if form.members else args
    if not form.fits(of_one, ranks):
        return
    inputs, state = tuple(map(form.sequence, of_one[: form.inputs])), tuple(map(form.rows_of, of_one[form.inputs :]))
    if call_reasons(inputs, state):
        return
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    module_calls.misses += 1
    if form.members:
        calls[key] = prepare_members(owner, form, args, inputs, factory)
    else:
        calls[key] = prepare(owner, form, args, inputs, factory)


class _FastPath:
    find = staticmethod(find)
    keep = staticmethod(store)


CACHE: CallCache = _FastPath()
"""The cache that the compiled runner registers; see :mod:`fusecell.execution.call_path`."""
