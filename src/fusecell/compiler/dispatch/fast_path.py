"""Calls that are like an earlier one of the same module: straight from the tensors they were given to their kernel.

What a call depends on beside its tensors' values is proven unchanged, of the module by
:mod:`fusecell.compiler.dispatch.guards`,
of all its tensors by one look of torch's own guards: their classes, dtypes, shapes, strides, whether they want
gradients, and the transforms and modes that are active. Where it fails the call goes the long way, and is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusecell.cell import Cell
from fusecell.compiler.dispatch.bound_kernels import Backward, Forward, NotPreparable, saved_offsets
from fusecell.compiler.dispatch.eligibility import call_reasons, needs_gradient
from fusecell.compiler.dispatch.guards import ModuleGuards, attribute_guards, guards_of
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.program_registry import register_cache
from fusecell.compiler.programs.autograd import TrainableStep, differentiated, transformed
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.programs.rebind import bound
from fusecell.compiler.programs.training import Training
from fusecell.eager import run_eager
from fusecell.execution.call_cache import CallCache
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.context import recomputing
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State

__all__ = ["CACHE", "forget"]

_MOST_KEPT = 64
"""Calls of a module that are remembered at a time."""
_MOST_MISSED = 32
"""Calls that are remembered one after another though none of them comes again: after these no more are."""


class _Remembered(NamedTuple):
    """One call: the proof that another is like it, and its way."""

    facts: ModuleGuards
    check: Callable[..., bool]
    run: Callable[[nn.Module, State], tuple[Tensor | None, State] | None]


class _Known:
    """What is remembered of a module; it must not keep the module or a weight of its alive."""

    def __init__(self, owner: nn.Module) -> None:
        key = id(owner)
        self.owner = ref(owner, lambda _: _KNOWN.pop(key, None))
        self.calls: dict[tuple[object, ...], _Remembered | None] = {}
        self.missed = 0


_KNOWN: dict[int, _Known] = {}


@register_cache
def forget(kinds: Collection[type] | None = None) -> None:
    """Remember no call, whatever the classes of cells are."""
    _KNOWN.clear()


def find(owner: nn.Module, call_form: CallForm, given: State) -> tuple[Tensor | None, State] | None:
    """See :func:`fusecell.execution.call_cache.cached_call`."""
    known = _KNOWN.get(id(owner))
    if known is None or known.owner() is not owner:
        return None
    call = known.calls.get((call_form, len(given), given[0].shape, torch.is_grad_enabled(), recomputing()))
    if call is None or forward_ad._current_level >= 0:
        return None
    tensors = call.facts.tensors(owner)
    if tensors is None:
        return None
    tensors = given + tensors
    if not call.check(*tensors):
        return None
    known.missed = 0
    return call.run(owner, tensors)


def _keeps_otherwise() -> bool:
    """Whether what is saved for the backward is counted by hooks: it must be the same whichever way a call goes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def keep(owner: nn.Module, call_form: CallForm, given: State, view: CellFactory | None) -> None:
    """See :func:`fusecell.execution.call_cache.store_call`."""
    known = _KNOWN.get(id(owner))
    if known is None or known.owner() is not owner:
        known = _KNOWN[id(owner)] = _Known(owner)
    key = (call_form, len(given), given[0].shape, torch.is_grad_enabled(), recomputing())
    refused = key in known.calls and known.calls[key] is None
    if refused or known.missed >= _MOST_MISSED or not call_form.fits(given):
        return
    if torch._C._is_any_autocast_enabled() or _keeps_otherwise():
        return
    inputs, state = (call_form.sequence(given[0]),), tuple([call_form.rows_of(value) for value in given[1:]])
    if call_reasons(inputs, state):
        return
    if len(known.calls) >= _MOST_KEPT:
        known.calls = {}
    known.missed += 1
    known.calls[key] = _remembered(owner, call_form, given, inputs, view)


def _remembered(
    owner: nn.Module, call_form: CallForm, given: State, inputs: State, view: CellFactory | None
) -> _Remembered | None:
    """A call as it is remembered, or None for one that always needs a closer look."""
    # Before the cell is made: a parametrized weight may change whenever it is looked at.
    facts = guards_of(owner) if view is None else attribute_guards(owner, view.attributes, view.weights.values())
    if facts is None:
        return None
    cell = owner if view is None else view.cell()
    assert isinstance(cell, Cell)
    if not _plain(cell, given):
        return None
    learns = needs_gradient(cell, given)
    found: Any = (TRAINABLE_STEPS if learns else PROGRAMS).find(cell, inputs)
    leaves = found.traced.weights.stored_leaves if isinstance(found, TrainableStep | Program) else None
    tensors = facts.tensors(owner)
    if leaves is None or tensors is None:
        return None
    names = {path: place for place, path in enumerate(facts.paths)}
    if view is not None:
        names = {path: names[name] for path, name in view.weights.items()}
    places = [len(given) + names[path] for path, _ in leaves]
    tensors, check = given + tensors, _guard(given + tensors)
    weights = [
        _Weight(place, path, leaf.of(tensors[place]).detach())
        for place, (path, leaf) in zip(places, leaves, strict=True)
    ]
    if check is None or any(each.matrix.data_ptr() != tensors[each.place].data_ptr() for each in weights):
        return None
    try:
        if not learns:
            return _Remembered(facts, check, _Answering(found, call_form, len(given), tensors, weights))
        template = None if view is None else _without_weights(cell)
        return _Remembered(facts, check, _Learning(found, template, call_form, len(given), tensors, weights))
    except NotPreparable:
        return None


class _Weight(NamedTuple):
    """A weight that a kernel reads: its place among a call's tensors, its path in the cell, and as it is read."""

    place: int
    path: str
    matrix: Tensor


def _plain(cell: Cell, given: State) -> bool:
    """Whether a cell draws nothing, takes one input, and starts from zeros if no state is given."""
    kind, own = type(cell), vars(cell)
    if len(cell.inputs) > 1 or "draw" in own or "initial_state" in own:
        return False
    return len(given) > 1 or kind.initial_state is Cell.initial_state or not cell.states


def _guard(tensors: State) -> Callable[..., bool] | None:
    """Tells whether other tensors are like these; None where torch's guards don't take them, or two are one."""
    sizes: Any = [list(value.shape) for value in tensors]
    strides: Any = [list(value.stride()) for value in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else None
    except (AttributeError, TypeError):  # a torch that has them under another name
        return None


class _Answering:
    """A call without gradients."""

    def __init__(
        self,
        program: Program,
        call_form: CallForm,
        count: int,
        tensors: State,
        weights: Sequence[_Weight],
    ) -> None:
        kernel = program.kernel
        places, matrices = [each.place for each in weights], tuple([each.matrix for each in weights])
        self._forward = Forward(kernel, call_form, [0], places, matrices, tensors, count)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        return self._forward(tensors)[1:]


class _Learning:
    """A call whose results have gradients.

    Attributes:
        template: for a cell that is made in the call, one like it without weights.
    """

    def __init__(
        self,
        learner: TrainableStep,
        template: Cell | None,
        call_form: CallForm,
        count: int,
        tensors: State,
        weights: Sequence[_Weight],
    ) -> None:
        self.template, self._learner, self._paths = template, learner, [each.path for each in weights]
        self.call_form, self.count = call_form, count
        self._taken = _taker([*range(count), *[each.place for each in weights]])
        matrices, tensors = tuple([each.matrix for each in weights]), self._taken(tensors)
        due = [value.requires_grad for value in tensors]
        flags = (due[0], *due[self.count :])
        training = learner.training(flags, call_form.recompute or recomputing())
        x = call_form.sequence(tensors[0])
        steps, rows = x.shape[0], x.shape[1]
        if not isinstance(training, Training):
            raise NotPreparable
        half = training.forward
        offsets, _ = saved_offsets(half.saved, steps * rows * half.kernel.itemsize)
        self.forward = Forward(
            half.kernel,
            call_form,
            half.input_indices,
            [self.count + index for index in half.weight_indices],
            tuple([matrices[index] for index in half.weight_indices]),
            tensors,
            count,
            (offsets, training.saved_size(steps * rows)),
        )
        self.backward = Backward(training, call_form, matrices, tensors, count, due)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        if _keeps_otherwise():
            return None
        results = _apply(self, owner, *self._taken(tensors))
        if self.call_form.outputs:
            return results[0], results[1:]
        return None, results

    def again(self, owner: nn.Module, tensors: State) -> State:
        """The results of the Python loop, in torch's autograd."""
        given, weights, call_form = tensors[: self.count], tensors[self.count :], self.call_form
        cell: Any = self.template
        if cell is None:
            cell = owner
            self._learner.check_unchanged(cell)
        x, state = call_form.sequence(given[0]), tuple([call_form.rows_of(value) for value in given[1:]])
        if not state:
            state = cell.initial_state(x.shape[1], dtype=x.dtype, device=x.device)
        cell = bound(cell, dict(zip(self._paths, weights, strict=True)), ())
        outputs, after = run_eager(cell, (x,), state, Options(reverse=call_form.reverse))
        states = tuple([call_form.state(value) for value in after])
        return (call_form.output(outputs), *states) if call_form.outputs else states


def _taker(places: Sequence[int]) -> Callable[[State], State]:
    """Takes some of a tuple's entries, in another order."""
    if len(places) > 1:
        return itemgetter(*places)
    (place,) = places
    return lambda tensors: (tensors[place],)


def _without_weights(cell: Cell) -> Cell:
    """A cell whose tensors are plain attributes, emptied of them."""
    for name, value in vars(cell).items():
        if isinstance(value, Tensor):
            vars(cell)[name] = None
    return cell


class _Repeated(torch.autograd.Function):
    """A remembered call's forward kernel, and its backward kernel as the gradient."""

    @staticmethod
    @natively
    def forward(ctx: Any, call: _Learning, owner: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        saved, outputs, after = call.forward(tensors)
        ctx.call, ctx.owner = call, owner
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *tensors)
        return after if outputs is None else (outputs, *after)

    @staticmethod
    @natively
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Learning = ctx.call
        found: State = ctx.saved_tensors
        saved, tensors = found[0], found[1:]
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * (2 + len(tensors))
        if torch.is_grad_enabled() or transformed(grads):
            owner: nn.Module = ctx.owner
            needed = ctx.needs_input_grad[2:]
            return None, None, *differentiated(lambda again: call.again(owner, again), tensors, needed, grads)
        if not call.call_form.outputs:
            grads = (None, *grads)
        return None, None, *call.backward(saved, tensors, grads)


# Past the wrapper that looks for transforms of torch.func: a call under one doesn't come here.
_apply: Any = super(torch.autograd.Function, _Repeated).apply


class _FastPath:
    find = staticmethod(find)
    keep = staticmethod(keep)


CACHE: CallCache = _FastPath()
"""What the runner registers; see :mod:`fusecell.execution.call_cache`."""
