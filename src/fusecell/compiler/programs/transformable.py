"""The kernels of a step's forward and backward as Functions that torch.func can take apart: under grad, vjp and vmap.

torch.func runs a Function below its transforms, on plain tensors, and asks it what to do with members of a vmap. Each
has its own weights, or wants its own gradients of them: their kernels run side by side (`programs.members`), or, where
a transform is left below, one member after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecell.cell import Cell
from fusecell.compiler.programs.autograd import TrainableStep, differentiated
from fusecell.compiler.programs.members import backward_of_members, forward_of_members, in_memory, of_member
from fusecell.compiler.programs.rebind import rebound
from fusecell.compiler.programs.tangent_step import TangentStep
from fusecell.compiler.programs.training import Call, Training
from fusecell.compiler.refusal import Refusal
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State
from fusecell.shapes import packed
from fusecell.torch_internals import has_gradient
from fusecell.torch_transforms import below_functorch, in_functorch_transform, outside_functorch

__all__ = ["PureScan", "backward_of", "forward_of", "pure_scan"]


@dataclass(frozen=True)
class PureScan:
    """A scan as a function of its tensors alone: inputs, first states and weights.

    Arguments:
        step: of which all weights are attributes of the cell unchanged.
        cell: one that computes what the scan does, with other weights.
        inputs, states: the numbers of these.
    """

    step: TrainableStep
    training: Training
    cell: Cell
    options: Options
    inputs: int
    states: int

    def call(self, tensors: State) -> Call:
        """Describe a call with plain tensors."""
        inputs, state, weights = self.split(tensors)
        return Call.of(self.training, inputs, state, (), weights, self.options, self.step.traced.shapes["output"])

    def split(self, tensors: State) -> tuple[State, State, State]:
        """Split tensors into inputs, states and weights."""
        middle = self.inputs + self.states
        return tensors[: self.inputs], tensors[self.inputs : middle], tensors[middle:]

    def of_members(self, size: int) -> PureScan:
        """Return the scan of a number of members, each with the same lengths, as rows one behind the other."""
        lengths = self.options.lengths
        return replace(
            self, options=replace(self.options, lengths=lengths if lengths is None else lengths.repeat(size))
        )

    @property
    def count(self) -> int:
        """The number of tensors."""
        return self.inputs + self.states + len(self.step.traced.weight_names)

    @property
    def gradient_places(self) -> list[int]:
        """The places among the tensors of those that have a gradient."""
        indices, start = self.training.gradients, self.inputs + self.states
        return sorted([*indices.inputs, *range(self.inputs, start), *(start + index for index in indices.weights)])

    def eager(self, tensors: State) -> State:
        """Run the Python loop; return the output and the last states."""
        inputs, state, weights = self.split(tensors)
        cell = rebound(self.cell, self.step.traced.weights.bindings(weights, ()), ())
        output, after = run_eager(cell, inputs, state, self.options)
        return packed(output, 2), *after


def pure_scan(scan: PureScan, *tensors: Tensor) -> State:
    """Run a scan; return its output and its last states."""
    return forward_of(scan, tensors)[1:]


def forward_of(scan: PureScan, tensors: State) -> State:
    """Run a scan; return what its backward reads of it, its output, and its last states."""
    results: State = _Forward.apply(scan, *tensors)  # type: ignore[no-untyped-call]  # torch's
    return results


def backward_of(
    scan: PureScan, places: Sequence[int], saved: Tensor, tensors: State, grads: Sequence[Tensor | None]
) -> State:
    """Return the gradients of the tensors at some places; those of ``grads`` are of the output and the last states."""
    gradients: State = _Backward.apply(scan, places, saved, *tensors, *grads)  # type: ignore[no-untyped-call]  # torch's
    return gradients


class _Forward(torch.autograd.Function):
    """The forward kernel: what it saves, the output, and the last states."""

    @staticmethod
    def forward(scan: PureScan, *tensors: Tensor) -> State:
        saved, output, after = scan.call(tensors).forward(tensors)
        return saved, output, *after

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scan = inputs[0]
        ctx.save_for_backward(output[0], *inputs[1:])
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, _: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scan: PureScan = ctx.scan
        saved, *tensors = ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(tensors)
        # At this level of transforms; at another others may be needed.
        places = tuple([place for place in scan.gradient_places if ctx.needs_input_grad[1 + place]])
        if places and any(grad is not None for grad in grads):
            gradients = backward_of(scan, places, saved, tuple(tensors), grads)
            for place, gradient in zip(places, gradients, strict=True):
                result[place] = gradient
        return None, *result

    @staticmethod
    def vmap(info: Any, dims: Sequence[Any], scan: PureScan, *tensors: Tensor) -> tuple[State, tuple[int, ...]]:
        if info.batch_size > 1 and _is_plain(tensors):
            own = [dim is not None for dim in dims[1:]]
            placed = _members_first(tensors, dims[1:])
            call = scan.call(of_member(0, placed, own))
            saved, outputs, after = forward_of_members(call, info.batch_size, own, placed)
            return (saved, outputs, *after), (0,) * (2 + len(after))
        apply: Any = _Forward.apply
        return _by_member(info.batch_size, dims[1:], tensors, lambda *values: apply(scan, *values))


class _Backward(torch.autograd.Function):
    """The backward kernel: the gradients of the tensors at some places."""

    @staticmethod
    def forward(scan: PureScan, places: Sequence[int], saved: Tensor, *values: Tensor | None) -> State:
        tensors: Any = values[: scan.count]
        gradients = scan.call(tensors).gradients(saved.contiguous(), tensors, values[scan.count :])
        return tuple([gradients[place] for place in places])  # type: ignore[misc]  # each of them has one

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scan, ctx.places = inputs[:2]
        ctx.save_for_backward(*inputs[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Compute the gradients' own gradients: by kernels, and those of these in the Python loop."""
        scan: PureScan = ctx.scan
        places: Sequence[int] = ctx.places
        by_kernels = _gradients_of_gradients(scan, places, ctx.saved_tensors, ctx.needs_input_grad[3:], cotangents)
        if by_kernels is not None:
            return None, None, None, *by_kernels

        def gradients(values: Sequence[Any]) -> list[Tensor | None]:
            needed = [place in places for place in range(scan.count)]
            every = differentiated(scan.eager, values[: scan.count], needed, values[scan.count :])
            return [every[place] for place in places]

        result = differentiated(gradients, ctx.saved_tensors, ctx.needs_input_grad[3:], cotangents)
        return None, None, None, *result

    @staticmethod
    def vmap(
        info: Any, dims: Sequence[Any], scan: PureScan, places: Sequence[int], saved: Tensor, *values: Any
    ) -> tuple[State, tuple[int, ...]]:
        apply: Any = _Backward.apply
        of_tensors, of_grads = dims[3 : 3 + scan.count], dims[3 + scan.count :]
        if max(places) < scan.inputs + scan.states and all(dim is None for dim in of_tensors):
            return _many_backwards(scan, places, info.batch_size, of_grads, values)
        if info.batch_size > 1 and dims[2] is not None and _is_plain((saved, *values)):
            own = [dim is not None for dim in of_tensors]
            tensors = _members_first(values[: scan.count], of_tensors)
            grads = [
                None if grad is None else _member_first(grad, dim, info.batch_size)
                for grad, dim in zip(values[scan.count :], of_grads, strict=True)
            ]
            call = scan.call(of_member(0, tensors, own))
            gradients = backward_of_members(call, own, saved.movedim(dims[2], 0).contiguous(), tensors, grads)
            return tuple([gradients[place] for place in places]), (0,) * len(places)  # type: ignore[misc]  # each has one
        return _by_member(info.batch_size, dims[2:], (saved, *values), lambda *each: apply(scan, places, *each))


def _gradients_of_gradients(
    scan: PureScan, places: Sequence[int], values: State, needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Return the gradients of a backward kernel's gradients, as `second_order` says; None where there is no kernel.

    Arguments:
        places: those whose gradients the backward returns, and ``cotangents`` are of.
        values: the scan's tensors, and the gradients that the backward was given.
        needed: for each of these, whether its gradient is needed.
    """
    tensors, grads = values[: scan.count], values[scan.count :]
    tangents: list[Tensor | None] = [None] * scan.count
    for place, cotangent in zip(places, cotangents, strict=True):
        tangents[place] = cotangent
    second = None if isinstance(scan.cell, TangentStep) else _tangent_scan(scan, tensors, tangents, needed)
    if second is None:
        return None
    of_tangents, of_scan, to_place = second
    saved, *results = forward_of(of_tangents, of_scan)
    rates = (results[0], *results[1 + scan.states :])
    result: list[Tensor | None] = [None] * len(values)
    sources = {of: place for place, of in enumerate(to_place) if of is not None and needed[place]}
    if sources and any(grad is not None for grad in grads):
        of_rates = (grads[0], *(None,) * scan.states, *grads[1:])
        gradients = backward_of(of_tangents, sorted(sources), saved, of_scan, of_rates)
        for place, gradient in zip(sorted(sources), gradients, strict=True):
            result[sources[place]] = gradient
    for place, (grad, rate) in enumerate(zip(grads, rates, strict=True), scan.count):
        result[place] = None if grad is None else rate
    return result


def _tangent_scan(
    scan: PureScan, tensors: State, tangents: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[PureScan, State, list[int | None]] | None:
    """Return the scan of a cell with tangents, its tensors, and where among them those of the cell are, if they are.

    Arguments:
        tangents: of the tensors, None for zero.
        needed: for each tensor whether its gradient is.
    """
    paths, shape = scan.step.traced.weights.direct_paths or (), scan.step.traced.shapes["output"]
    inputs, state, weights = scan.split(tensors)
    of_inputs, of_state, of_weights = scan.split(tangents)  # type: ignore[arg-type]  # of some there is none
    moving = _or_zeros(of_inputs, inputs) if any(value is not None for value in of_inputs) else ()
    directions = {}
    if any(value is not None for value in of_weights):
        pairs = zip(paths, _or_zeros(of_weights, weights), strict=True)
        directions = {path: value for path, value in pairs if has_gradient(value)}

    def step(of: Callable[[Tensor], Tensor]) -> TangentStep:
        cell = rebound(scan.cell, dict(zip(paths, map(of, weights), strict=True)), ())
        return TangentStep(cell, shape, bool(moving), {path: of(value) for path, value in directions.items()})

    def leaf(value: Tensor) -> Tensor:
        value = below_functorch(value)[0].detach()
        return value.requires_grad_(has_gradient(value))

    with outside_functorch():
        plain = step(leaf)
        kernels = scan.step.second_order.kernels(plain, [tuple(value.shape[2:]) for value in (*inputs, *moving)])
    if isinstance(kernels, Refusal) or kernels.traced.weights.direct_paths is None:
        return None
    of_leaf = {f"cell.{path}": place for place, path in enumerate(paths, scan.inputs + scan.states)}
    leaf_paths = kernels.traced.weights.direct_paths
    flags = [*needed[: scan.inputs], *[False] * len(moving)]
    flags += [path in of_leaf and needed[of_leaf[path]] for path in leaf_paths]
    training = kernels.training(flags, False)
    if isinstance(training, Refusal):
        return None
    options = replace(scan.options, recompute=False)
    of_tangents = PureScan(kernels, training, plain, options, len(inputs) + len(moving), 2 * scan.states)
    start = of_tangents.inputs + of_tangents.states
    places = {path: place for place, path in enumerate(leaf_paths, start)}
    to_place = [*range(scan.inputs), *range(of_tangents.inputs, of_tangents.inputs + scan.states)]
    to_place += [places.get(f"cell.{path}") for path in paths]
    leaves = kernels.traced.weights.values(step(lambda value: value))
    return of_tangents, (*inputs, *moving, *state, *_or_zeros(of_state, state), *leaves), to_place


def _or_zeros(tangents: Sequence[Tensor | None], like: State) -> State:
    pairs = zip(tangents, like, strict=True)
    return tuple([torch.zeros_like(value) if tangent is None else tangent for tangent, value in pairs])


def _is_plain(tensors: Sequence[Any]) -> bool:
    """Whether kernels can read tensors at once: no transform is left below, and nothing records gradients of them."""
    recording = torch.is_grad_enabled()
    values = [value for value in tensors if value is not None]
    return not in_functorch_transform() and not any(recording and value.requires_grad for value in values)


def _members_first(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> State:
    pairs = zip(tensors, dims, strict=True)
    return in_memory([v if dim is None else v.movedim(dim, 0) for v, dim in pairs])


def _member_first(value: Tensor, dim: int | None, size: int) -> Tensor:
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _many_backwards(
    scan: PureScan, places: Sequence[int], size: int, dims: Sequence[int | None], values: Sequence[Any]
) -> tuple[State, tuple[int, ...]]:
    """Run the backwards of one forward, as of a Jacobian, as rows of one: none has a weight's gradient of its own.

    What a forward of these rows saves is computed again, as it lies otherwise in memory.
    """
    inputs, state, weights = scan.split(tuple(values[: scan.count]))
    rows = [1] * len(inputs) + [0] * len(state)

    def repeated(value: Tensor, axis: int) -> Tensor:
        return value.repeat(*[size if dim == axis else 1 for dim in range(value.dim())])

    def as_rows(value: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
        if value is None or dim is None:
            return value if value is None else repeated(value, axis)
        return value.movedim(dim, axis).flatten(axis, axis + 1)

    tensors = [*map(repeated, (*inputs, *state), rows), *weights]
    grads = [
        as_rows(v, dim, 0 if at else 1) for at, (v, dim) in enumerate(zip(values[scan.count :], dims, strict=True))
    ]
    of_rows = scan.of_members(size)
    saved = forward_of(of_rows, tuple(tensors))[0]
    gradients = backward_of(of_rows, places, saved, tuple(tensors), grads)
    results = []
    for place, gradient in zip(places, gradients, strict=True):
        axis = rows[place]
        results.append(gradient.reshape(*gradient.shape[:axis], size, -1, *gradient.shape[axis + 1 :]))
    return tuple(results), tuple([rows[place] for place in places])


def _by_member(
    size: int, dims: Sequence[int | None], values: Sequence[Tensor | None], run: Callable[..., State]
) -> tuple[State, tuple[int, ...]]:
    """Run a Function for each member of a vmap; return its results with the members first."""
    results = []
    for member in range(size):
        pairs = zip(values, dims, strict=True)
        results.append(run(*(v if v is None or dim is None else v.select(dim, member) for v, dim in pairs)))
    stacked = tuple([torch.stack(each) for each in zip(*results, strict=True)])
    return stacked, (0,) * len(stacked)
