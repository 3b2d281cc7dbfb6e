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
from fusecell.compiler.programs.training import Call, Training
from fusecell.eager import run_eager
from fusecell.execution.options import Options, State
from fusecell.shapes import packed
from fusecell.torch_internals import in_functorch_transform

__all__ = ["PureScan", "pure_scan"]


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
    _, *results = _Forward.apply(scan, *tensors)  # type: ignore[no-untyped-call]  # torch's
    return tuple(results)


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
            gradients = _Backward.apply(scan, places, saved, *tensors, *grads)  # type: ignore[no-untyped-call]  # torch's
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
        """Compute the gradients' own gradients in the Python loop."""
        scan: PureScan = ctx.scan
        places: Sequence[int] = ctx.places

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
    saved = _Forward.apply(of_rows, *tensors)[0]  # type: ignore[no-untyped-call]  # torch's
    gradients = _Backward.apply(of_rows, places, saved, *tensors, *grads)  # type: ignore[no-untyped-call]  # torch's
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
