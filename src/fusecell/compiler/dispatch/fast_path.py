"""Fast path for repeated calls: if all guards of an earlier call of a module hold, launch its kernels directly.

A call depends on its tensors' values, which are read anew, and on everything else, which is guarded:
:mod:`fusecell.compiler.frontend.guards` compares the module, and one call of torch's own guards compares all tensors:
their classes, dtypes, shapes, strides, ``requires_grad``, and the active transforms and modes. A call whose guards fail
takes the slow path, and is then cached too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.cache_registry import register_cache
from fusecell.compiler.dispatch.computed_weights import ComputedWeights
from fusecell.compiler.dispatch.conversion import Conversion, ConvertedCall, selector
from fusecell.compiler.dispatch.eligibility import call_reasons, loop_is_faster, needs_gradient
from fusecell.compiler.dispatch.prepared_kernels import BoundBackward, BoundForward, ExampleCall
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.frontend.dtypes import has_16_bits, widened
from fusecell.compiler.frontend.guards import ModuleGuards, attribute_guards, guards_of
from fusecell.compiler.programs.autograd import TrainableStep, differentiated, transformed
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.programs.prepacked import KernelCell, PrepackedCall
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.training import IndexedKernel, Training
from fusecell.compiler.runtime.argument_block import NotPreparable
from fusecell.eager import run_eager
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.call_path import CallCache
from fusecell.execution.context import active_runner, recomputing
from fusecell.execution.natively import natively
from fusecell.execution.options import Options, State
from fusecell.shapes import all_flat
from fusecell.torch_internals import (
    any_autocast,
    apply_directly,
    forward_ad,
    has_saved_tensor_hooks,
    is_expanded_weight,
    tensor_guards,
)

__all__ = ["CACHE", "forget"]

_MAX_CALLS = 64
"""Calls of a module that are cached at a time."""
_MAX_MISSES = 32
"""Calls of a module that are cached one after another without a hit; then no more are.

Where every call has another shape, preparing it is in vain.
"""


class _CachedCall(NamedTuple):
    """Guards of one call, on its module and on its tensors, and what runs another one for which they hold."""

    guards: ModuleGuards
    check_tensors: Callable[..., bool]
    run: Callable[[nn.Module, State], tuple[Tensor | None, State] | None]


class _ModuleCalls:
    """Cached calls of one module; they keep neither it nor its weights alive.

    Attributes:
        calls: by what is compared before any guard; None for a call that cannot be cached.
        misses: calls cached since the last hit.
    """

    def __init__(self, owner: nn.Module) -> None:
        key = id(owner)
        self.owner = ref(owner, lambda _: _CALLS.pop(key, None))
        self.calls: dict[tuple[object, ...], _CachedCall | None] = {}
        self.misses = 0


# By id: a weak dictionary makes a reference at every look-up.
_CALLS: dict[int, _ModuleCalls] = {}


@register_cache
def forget(kinds: Collection[type] | None = None) -> None:
    """Drop all cached calls, whatever the classes of cells are."""
    _CALLS.clear()


def find(owner: nn.Module, form: CallForm, args: State) -> tuple[Tensor | None, State] | None:
    """See :class:`fusecell.execution.call_path.CallCache`; ``args`` are the input and, if passed, the states."""
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
    """See :class:`fusecell.execution.call_path.CallCache`; ``args`` are the input and, if passed, the states."""
    module_calls = _CALLS.get(id(owner))
    if module_calls is None or module_calls.owner() is not owner:
        module_calls = _CALLS[id(owner)] = _ModuleCalls(owner)
    calls = module_calls.calls
    key = (form, len(args), args[0].shape, torch.is_grad_enabled(), recomputing())
    # Looked at once: nothing that makes a call uncacheable is likely to change, and preparing it in vain is slow.
    uncacheable = key in calls and calls[key] is None
    if uncacheable or module_calls.misses >= _MAX_MISSES or not form.fits(args):
        return
    if any_autocast() or has_saved_tensor_hooks() or recomputing() == "chunk":
        return
    inputs, state = (form.sequence(args[0]),), tuple([form.rows_of(value) for value in args[1:]])
    if call_reasons(inputs, state):
        return
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    module_calls.misses += 1
    calls[key] = _prepare(owner, form, args, inputs, factory)


def _prepare(
    owner: nn.Module, form: CallForm, args: State, inputs: State, factory: CellFactory | None
) -> _CachedCall | None:
    """Prepare the kernels of a call; None where guards and addresses are not all that it takes."""
    # Before the cell is built: a parametrized weight may change whenever it is read.
    guards = (
        guards_of(owner) if factory is None else attribute_guards(owner, factory.attributes, factory.weights.values())
    )
    module_tensors = None if guards is None else guards.tensors(owner)
    if guards is None or module_tensors is None or (module_tensors and is_expanded_weight(module_tensors[0])):
        return None
    cell: Any = owner if factory is None else factory.cell()
    if not all_flat(cell):  # a form has one dimension of features
        return None
    if isinstance(cell, KernelCell):
        return _prepare_own_kernel(cell, form, args, args + module_tensors, guards)
    if not _starts_from_zeros(cell, args) or (active_runner() == "auto" and loop_is_faster(cell, inputs)):
        return None
    trainable = needs_gradient(cell, args)
    step: Any = (TRAINABLE_STEPS if trainable else PROGRAMS).find(cell, inputs)
    if not isinstance(step, TrainableStep | Program) or not step.traced.is_plain:
        return None
    indices = {path: index for index, path in enumerate(guards.paths, len(args))}
    leaves = step.traced.weights.stored_leaves
    if leaves is None:
        if factory is not None or has_16_bits(args[0].dtype):
            return None
        return _prepare_computed(step, form, args, args + module_tensors, guards, indices)
    if factory is not None:
        indices = {path: indices[name] for path, name in factory.weights.items()}
    weights, tensors = [indices[path] for path, _ in leaves], args + module_tensors
    check = tensor_guards(tensors)
    conversion = None
    if has_16_bits(args[0].dtype):
        conversion = Conversion(tensors, [*range(len(args)), *weights])
        tensors, weights = conversion.widened(tensors), list(range(len(args), len(args) + len(weights)))
    matrices = tuple([leaf.of(tensors[index]).detach() for index, (_, leaf) in zip(weights, leaves, strict=True)])
    # A leaf that is a copy of its weight would have to be copied in every call.
    pairs = zip(matrices, weights, strict=True)
    if check is None or any(matrix.data_ptr() != tensors[index].data_ptr() for matrix, index in pairs):
        return None
    call = ExampleCall(form, tensors, len(args), weights, matrices)
    run: Any
    try:
        if isinstance(step, TrainableStep):
            template = None if factory is None else _without_weights(cell)
            # Only these go through autograd, which takes time for each tensor.
            select = selector([*range(len(args)), *weights])
            run = _TrainingCall(step, template, [path for path, _ in leaves], call, select, conversion)
        else:
            run = _InferenceCall(step, call)
    except NotPreparable:
        return None
    return _CachedCall(guards, check, run if conversion is None else ConvertedCall(run, conversion))


def _prepare_computed(
    step: TrainableStep | Program,
    form: CallForm,
    args: State,
    tensors: State,
    guards: ModuleGuards,
    indices: Mapping[str, int],
) -> _CachedCall | None:
    """Prepare a call whose weights torch computes from others; None where guards and addresses are not all it takes."""
    prologue, count = step.traced.weights, len(args)
    check = tensor_guards(tensors)
    if check is None or not all(path in indices for path in prologue.source_paths):
        return None
    computed = ComputedWeights(prologue, count, indices)
    weights = prologue.computed_from([tensors[indices[path]] for path in computed.paths])
    matrices = tuple([weight.detach() for weight in weights])
    call = ExampleCall(form, (*args, *weights), count, range(count, count + len(weights)), matrices)
    try:
        if isinstance(step, TrainableStep):
            training = _TrainingCall(step, None, computed.paths, replace(call, tensors=tensors), computed.select, None)
            return _CachedCall(guards, check, training)
        inference = _InferenceCall(step, call)
    except NotPreparable:
        return None
    return _CachedCall(guards, check, lambda owner, tensors: inference(owner, computed.select(tensors)))


def _prepare_own_kernel(
    cell: KernelCell, form: CallForm, args: State, tensors: State, guards: ModuleGuards
) -> _CachedCall | None:
    """Prepare the call of a cell that comes with its kernel; None where that isn't all that it takes."""
    check = tensor_guards(tensors)
    if check is None or needs_gradient(cell, args) or not (len(args) > 1 or cell.starts_from_zeros()):
        return None
    if args[0].dtype is not torch.float32:
        return None
    try:
        return _CachedCall(guards, check, _OwnKernelCall(cell, form, args))
    except NotPreparable:
        return None


def _starts_from_zeros(cell: Cell, args: State) -> bool:
    """Whether a cell draws nothing, takes one input, and starts from zeros if no state is passed."""
    kind, attributes = type(cell), vars(cell)
    if len(cell.inputs) > 1 or "draw" in attributes or "initial_state" in attributes:
        return False
    return len(args) > 1 or kind.initial_state is Cell.initial_state or not cell.states


class _InferenceCall:
    """A cached call without gradients."""

    def __init__(self, program: Program, call: ExampleCall) -> None:
        slots = program.kernel.slots
        everything = IndexedKernel(program.kernel, list(slots.inputs), list(slots.weights))
        self._forward = BoundForward(everything, call)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        return self._forward(tensors)[1:]


class _OwnKernelCall:
    """A cached call of a cell that comes with its kernel, whose weights are packed."""

    def __init__(self, cell: KernelCell, form: CallForm, args: State) -> None:
        self._prepacked = own = cell.prepacked()
        slots = own.kernel.slots
        everything = IndexedKernel(own.kernel, list(slots.inputs), list(slots.weights))
        call = ExampleCall(form, args, len(args), None, own.packed_weights)
        self._forward = BoundForward(everything, call, prepare=partial(PrepackedCall, own))

    def __call__(self, owner: Any, tensors: State) -> tuple[Tensor | None, State] | None:
        cell = owner if isinstance(owner, KernelCell) else owner.leaf_cells()[0][2]
        if cell.prepacked() is not self._prepacked:  # its weights have changed
            return None
        return self._forward(tensors)[1:]


class _TrainingCall:
    """A cached call with gradients.

    Arguments:
        template: a copy of the cell without its weights, where the cell is built anew for each call.
        paths: of the cell's tensors that the last ones of ``select`` take the place of when the step is run again.
        select: returns what goes through autograd of a call's tensors: the caller's, then the weights, then the tensors
            that weights are computed from.
        conversion: what the tensors went through, in a 16-bit layer.
    """

    def __init__(
        self,
        step: TrainableStep,
        template: Cell | None,
        paths: Sequence[str],
        call: ExampleCall,
        select: Callable[[State], State],
        conversion: Conversion | None,
    ) -> None:
        self._template, self._step, self._paths, self._conversion = template, step, paths, conversion
        self.form, self._count, self._select = call.form, call.count, select
        everything = select(call.tensors)
        tensors = everything[: call.count + len(call.matrices)]
        self._computes = len(everything) > len(tensors)
        call = replace(call, tensors=tensors, weights=range(call.count, len(tensors)))
        requires_grad = [value.requires_grad for value in tensors]
        flags = (requires_grad[0], *requires_grad[call.count :])
        training = step.training(flags, bool(call.form.recompute or recomputing()))
        if not isinstance(training, Training):
            raise NotPreparable
        self._training = training
        steps, rows = call.sizes
        self.forward = BoundForward(training.forward, call, training.saved_size(steps * rows))
        self.backward = BoundBackward(training, call, requires_grad)

    def __call__(self, owner: nn.Module, tensors: State) -> tuple[Tensor | None, State] | None:
        # torch.utils.checkpoint counts saved tensors to find them again in its second forward: both take the slow path.
        if has_saved_tensor_hooks():
            return None
        results = _apply(self, owner, *self._select(tensors))
        if self.form.outputs:
            return results[0], results[1:]
        return None, results

    def again(self, owner: nn.Module, tensors: State, saved: Tensor, *, eager: bool) -> State:
        """Run the call again under autograd, for gradients of gradients.

        Arguments:
            saved: by its forward.
            eager: by the Python loop, for gradients of many backwards at once.
        """
        if self._conversion is not None:  # the loop's results have the layer's dtype, their gradients the kernel's
            tensors = self._conversion.restored(tensors)
        # What weights are computed from is last: a gradient of it is one of the step, through the computation.
        args, sources, form = tensors[: self._count], tensors[len(tensors) - len(self._paths) :], self.form
        cell: Any = self._template
        if cell is None:
            cell = owner
            self._step.check_unchanged(cell)
        x, state = form.sequence(args[0]), tuple([form.rows_of(value) for value in args[1:]])
        if not state:
            state = cell.initial_state(x.shape[1], dtype=x.dtype, device=x.device)
        cell = rebound(cell, dict(zip(self._paths, sources, strict=True)), ())
        options = Options(reverse=form.reverse)
        before = None if self._conversion is not None else (self._training, saved)
        result = None if eager or self._computes else self._step(cell, (x,), state, options, before)
        outputs, after = run_eager(cell, (x,), state, options) if not isinstance(result, tuple) else result
        states = tuple([form.state(value) for value in after])
        results = (form.output(outputs), *states) if form.outputs else states
        return results if self._conversion is None else widened(results)


def _without_weights(cell: Cell) -> Cell:
    """Empty a cell whose tensors are plain attributes, so that it keeps no weight alive."""
    for name, value in vars(cell).items():
        if isinstance(value, Tensor):
            vars(cell)[name] = None
    return cell


class _CachedScan(torch.autograd.Function):
    """A cached call's forward kernel, and its backward kernel as the gradient."""

    @staticmethod
    @natively
    def forward(ctx: Any, call: _TrainingCall, owner: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        saved, outputs, after = call.forward(tensors)
        ctx.call, ctx.owner = call, owner
        ctx.set_materialize_grads(False)  # None for a gradient that there is none of: kernels need no zeros for it
        ctx.save_for_backward(saved, *tensors)  # which sees if a tensor is changed in place before the backward
        return after if outputs is None else (outputs, *after)

    @staticmethod
    @natively
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _TrainingCall = ctx.call
        all_saved: State = ctx.saved_tensors
        saved, tensors = all_saved[0], all_saved[1:]
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * (2 + len(tensors))
        if torch.is_grad_enabled() or transformed(grads):
            owner: nn.Module = ctx.owner
            needed = ctx.needs_input_grad[2:]
            eager = transformed(grads)
            return (
                None,
                None,
                *differentiated(lambda aliases: call.again(owner, aliases, saved, eager=eager), tensors, needed, grads),
            )
        if not call.form.outputs:  # then the states are the only results
            grads = (None, *grads)
        gradients = call.backward(saved, tensors, grads)
        return None, None, *gradients, *(None,) * (len(tensors) - len(gradients))


# Past torch's own `apply`, which looks for transforms of torch.func: the tensors' guards have done so.
_apply: Any = apply_directly(_CachedScan)


class _FastPath:
    find = staticmethod(find)
    keep = staticmethod(store)


CACHE: CallCache = _FastPath()
"""The cache that the compiled runner registers; see :mod:`fusecell.execution.call_path`."""
