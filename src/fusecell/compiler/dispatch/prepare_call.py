"""Prepare a call for the next one like it: guards on its module and tensors, kernels with all but addresses bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecell.cell import Cell
from fusecell.compiler.dispatch.cached_calls import (
    CachedCall,
    InferenceCall,
    OwnKernelCall,
    TrainingCall,
    without_weights,
)
from fusecell.compiler.dispatch.computed_weights import ComputedWeights
from fusecell.compiler.dispatch.conversion import Conversion, ConvertedCall, selector
from fusecell.compiler.dispatch.eligibility import call_reasons, loop_is_faster, needs_gradient
from fusecell.compiler.dispatch.prepared_kernels import ExampleCall, state_shapes
from fusecell.compiler.dispatch.program_cache import PROGRAMS, TRAINABLE_STEPS
from fusecell.compiler.frontend.dtypes import has_16_bits
from fusecell.compiler.frontend.guards import ModuleGuards, attribute_guards, guards_of
from fusecell.compiler.programs.autograd import TrainableStep
from fusecell.compiler.programs.inference import Program
from fusecell.compiler.programs.prepacked import KernelCell
from fusecell.compiler.runtime.argument_block import NotPreparable
from fusecell.execution.call_form import CallForm, CellFactory
from fusecell.execution.context import active_runner
from fusecell.execution.options import State, steps_of
from fusecell.shapes import has_flat_rows
from fusecell.torch_internals import is_expanded_weight, tensor_guards
from fusecell.validation import compute_dtype, first_state
from fusecell.wrappers.base import Wrapper

__all__ = ["guarded_tensors", "is_preparable", "prepare"]


def prepare(
    owner: nn.Module, form: CallForm, args: State, inputs: State, factory: CellFactory | None
) -> CachedCall | None:
    """Prepare the kernels of a call; None where guards and addresses are not all that it takes.

    Arguments:
        args: the inputs and, if the caller passed them, the states.
        inputs: the inputs as (T, N, ...).
        factory: how to build the cell of an owner that is none itself.
    """
    if isinstance(owner, Cell) and len(args) == form.inputs and _has_own_start(owner):
        return _prepare_from_own_start(owner, form, args)
    return _prepare(owner, form, args, inputs, factory)


def _prepare(
    owner: nn.Module, form: CallForm, args: State, inputs: State, factory: CellFactory | None
) -> CachedCall | None:
    """Prepare the kernels of a call; None where guards and addresses are not all that it takes."""
    guarded = guarded_tensors(owner, factory)
    if guarded is None:
        return None
    guards, module_tensors = guarded
    cell: Any = owner if factory is None else factory.cell()
    if not has_flat_rows(cell):  # a form has one dimension of features
        return None
    if isinstance(cell, KernelCell):
        return _prepare_own_kernel(cell, form, args, args + module_tensors, guards)
    if not is_preparable(cell, form, len(args), inputs):
        return None
    if active_runner() == "auto" and loop_is_faster(cell, inputs):
        return None
    step: Any = (TRAINABLE_STEPS if needs_gradient(cell, args) else PROGRAMS).find(cell, inputs)
    if not isinstance(step, TrainableStep | Program) or not step.traced.is_plain:
        return None
    call = ExampleCall(form, args + module_tensors, len(args), state_shapes(cell), None, ())
    indices = {path: index for index, path in enumerate(guards.paths, len(args))}
    try:
        if step.traced.weights.stored_leaves is None:
            return None if factory is not None else _prepare_computed(step, call, guards, indices)
        if factory is not None:
            indices = {path: indices[name] for path, name in factory.weights.items()}
        return _prepare_stored(step, call, guards, indices, None if factory is None else cell)
    except NotPreparable:
        return None


def guarded_tensors(owner: nn.Module, factory: CellFactory | None) -> tuple[ModuleGuards, State] | None:
    """Return guards on a module, and its tensors in their order; None where there are none that prove enough.

    Arguments:
        factory: how to build the cell of an owner that is none itself.
    """
    # Before the cell is built: a parametrized weight may change whenever it is read.
    guards = (
        guards_of(owner) if factory is None else attribute_guards(owner, factory.attributes, factory.weights.values())
    )
    tensors = None if guards is None else guards.tensors(owner)
    if guards is None or tensors is None or (tensors and is_expanded_weight(tensors[0])):
        return None
    return guards, tensors


def is_preparable(cell: Cell, form: CallForm, count: int, inputs: State) -> bool:
    """Whether a kernel and its tensors are all that a call of a cell takes.

    Arguments:
        count: how many tensors the caller passed.
        inputs: as (T, N, ...).
    """
    starts_by_itself = count == form.inputs and _has_own_start(cell)
    if len(cell.inputs) != form.inputs or _may_draw(cell) or starts_by_itself:
        return False
    # The gradient of an input that is the same at all steps is a sum over them.
    return not any(value.requires_grad and value.shape[0] != steps_of(inputs) for value in inputs)


def _prepare_stored(
    step: TrainableStep | Program,
    call: ExampleCall,
    guards: ModuleGuards,
    indices: Mapping[str, int],
    template: Cell | None,
) -> CachedCall | None:
    """Prepare a call whose weights are tensors of the module; None where one would have to be copied in every call.

    Arguments:
        call: with the tensors of the caller and of the module, and without weights.
        indices: of the weights, by path.
        template: a cell that was built for this call.

    Raises:
        NotPreparable: if the input or a state would have to be copied.
    """
    leaves, tensors, count = step.traced.weights.stored_leaves, call.tensors, call.count
    assert leaves is not None, "the caller has looked"
    weights, check, conversion = [indices[path] for path, _ in leaves], tensor_guards(tensors), None
    if has_16_bits(tensors[0].dtype):
        conversion = Conversion(tensors, [*range(count), *weights])
        tensors, weights = conversion.widened(tensors), list(range(count, count + len(weights)))
    matrices = tuple([leaf.of(tensors[index]).detach() for index, (_, leaf) in zip(weights, leaves, strict=True)])
    pairs = zip(matrices, weights, strict=True)
    if check is None or any(matrix.data_ptr() != tensors[index].data_ptr() for matrix, index in pairs):
        return None
    call = replace(call, tensors=tensors, weights=weights, matrices=matrices)
    run: Any
    if isinstance(step, TrainableStep):
        template = None if template is None else without_weights(template)
        # Only these go through autograd, which takes time for each tensor.
        select = selector([*range(count), *weights])
        run = TrainingCall(step, template, [path for path, _ in leaves], call, select, conversion)
    else:
        run = InferenceCall(step, call)
    return CachedCall(guards, check, run if conversion is None else ConvertedCall(run, conversion))


def _prepare_from_own_start(owner: Cell, form: CallForm, args: State) -> CachedCall | None:
    """Prepare a call without states of a cell that says where it starts: one with these states, asked for anew."""
    generator_state = torch.get_rng_state()
    start, inputs = _own_start(owner, form, args[0]), tuple(map(form.sequence, args))
    if not torch.equal(generator_state, torch.get_rng_state()):  # drawn: once for each call, as on the slow path
        torch.set_rng_state(generator_state)
        return None
    if call_reasons(inputs, tuple([form.rows_of(value) for value in start])):
        return None
    call = _prepare(owner, form, (*args, *start), inputs, None)
    tensors = None if call is None else call.guards.tensors(owner)
    check = None if tensors is None else tensor_guards((*args, *tensors))
    if call is None or check is None:
        return None
    started = call

    def run(owner: Any, tensors: State) -> tuple[Tensor | None, State] | None:
        args, others = tensors[: form.inputs], tensors[form.inputs :]
        everything = *args, *_own_start(owner, form, args[0]), *others
        return started.run(owner, everything) if started.check_tensors(*everything) else None

    return CachedCall(started.guards, check, run)


def _own_start(cell: Cell, form: CallForm, x: Tensor) -> State:
    """Return the cell's initial states for an input, in the caller's layout."""
    rows = form.sequence(x).shape[1]
    return tuple(map(form.state, first_state(cell, rows, dtype=compute_dtype(cell, x), device=x.device)))


def _prepare_computed(
    step: TrainableStep | Program, call: ExampleCall, guards: ModuleGuards, indices: Mapping[str, int]
) -> CachedCall | None:
    """Prepare a call whose weights torch computes from others; None where guards and addresses are not all it takes.

    Arguments:
        call: with the tensors of the caller and of the module, and without weights.
        indices: of the module's tensors, by path.

    Raises:
        NotPreparable: if the input, a state or a weight would have to be copied.
    """
    prologue, count, tensors = step.traced.weights, call.count, call.tensors
    check = tensor_guards(tensors)
    are_there = all(path in indices for path in prologue.source_paths)
    if check is None or not are_there or has_16_bits(tensors[0].dtype):
        return None
    computed = ComputedWeights(prologue, count, indices)
    weights = prologue.computed_from([tensors[indices[path]] for path in computed.paths])
    call = replace(call, matrices=tuple([weight.detach() for weight in weights]))
    if isinstance(step, TrainableStep):
        return CachedCall(guards, check, TrainingCall(step, None, computed.paths, call, computed.select, None))
    places = range(count, count + len(weights))
    inference = InferenceCall(step, replace(call, tensors=(*tensors[:count], *weights), weights=places))
    return CachedCall(guards, check, lambda owner, tensors: inference(owner, computed.select(tensors)))


def _prepare_own_kernel(
    cell: KernelCell, form: CallForm, args: State, tensors: State, guards: ModuleGuards
) -> CachedCall | None:
    """Prepare the call of a cell that comes with its kernel; None where that isn't all that it takes."""
    check = tensor_guards(tensors)
    if check is None or needs_gradient(cell, args) or not (len(args) > form.inputs or cell.starts_from_zeros()):
        return None
    if args[0].dtype is not torch.float32:
        return None
    try:
        return CachedCall(guards, check, OwnKernelCall(cell, form, args))
    except NotPreparable:
        return None


_DRAWS_ONLY_INPUTS = (Cell.draw.__module__, Wrapper.draw.__module__, "fusecell.cells.")
"""Where those methods ``draw`` are defined that change nothing: the cell would have more inputs if they drew any."""


def _may_draw(cell: Cell) -> bool:
    """Whether a call has a cell draw something first, be it as an input or as a change of the cell."""
    for part in cell.modules():
        if not isinstance(part, Cell):
            continue
        if "draw" in vars(part) or not type(part).draw.__module__.startswith(_DRAWS_ONLY_INPUTS):
            return True
        # In eval mode none of the library's wrappers draws anything.
        if isinstance(part, Wrapper) and type(part).noise is not Wrapper.noise and part.training:
            return True
    return False


def _has_own_start(cell: Cell) -> bool:
    """Whether a cell says itself which states a sequence starts from, not zeros; one with its own kernel knows it."""
    if isinstance(cell, KernelCell):
        return False
    is_default = type(cell).initial_state is Cell.initial_state and "initial_state" not in vars(cell)
    return not is_default and bool(cell.states)
