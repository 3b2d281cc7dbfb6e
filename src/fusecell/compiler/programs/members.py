"""Run the same scan for several members side by side: of an ensemble, or of a vmap; each on one thread.

Tensors are (members, ...), or without members where they have them in common: they then lie at equal distances, and the
argument blocks of two members say where those of the others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusecell.compiler.programs.allocation import aligned
from fusecell.compiler.programs.training import Call, Gradients, Results
from fusecell.errors import CompilerError
from fusecell.execution.options import State

__all__ = ["backward_of_members", "forward_of_members", "in_memory", "of_member"]


def of_member(place: int, tensors: Sequence[Any], own: Sequence[bool]) -> State:
    """Return the tensors of one member.

    Arguments:
        own: for each tensor, whether each member has its own.
    """
    return tuple([value.select(0, place) if is_own else value for value, is_own in zip(tensors, own, strict=True)])


def forward_of_members(call: Call, size: int, own: Sequence[bool], tensors: State) -> Results:
    """Run the forward kernels; return what they write, (members, ...).

    Arguments:
        call: that of each member.
        size: how many members there are, two or more.
        own: as of :func:`of_member`.
        tensors: as :func:`in_memory` returns them.
    """
    two = [of_member(place, tensors, own) for place in (0, 1)]
    results = call.new_results(two[0], size)
    saved, outputs, after = results
    first, second = (
        call.bind_forward(each, Results(saved[place], outputs[place], tuple([value[place] for value in after])))
        for place, each in enumerate(two)
    )
    # What was copied to be bound would lie anywhere, and so would what the other members' blocks point to.
    if first.copies or second.copies:
        raise CompilerError("the tensors of an ensemble's members lie at unequal distances")
    call.run_each(call.training.forward, first, second, size)
    return results


def in_memory(tensors: Sequence[Tensor]) -> State:
    """Return tensors as kernels read them: contiguous, and negated where they are lazily."""
    return tuple([value.resolve_neg().contiguous() for value in tensors])


def backward_of_members(
    call: Call, own: Sequence[bool], saved: Tensor, tensors: State, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Run the backward kernels; return the gradients, (members, ...), in the order of ``tensors``.

    Arguments:
        saved: by the forward, (members, ...).
        grads: of the outputs and the states after the last step, (members, ...).
    """
    saved = aligned(saved)
    two = [of_member(place, tensors, own) for place in (0, 1)]
    of_members = _gradients_in_memory(call, saved, grads, two[0])
    gradients = call.new_gradients(two[0], len(saved))
    first, second = (
        call.bind_backward(
            saved[place],
            each,
            [grad[place] for grad in of_members],
            Gradients(*[[value[place] for value in values] for values in gradients]),
        )
        for place, each in enumerate(two)
    )
    call.run_each(call.training.backward, first, second, len(saved))
    return _in_order(call, gradients, two[0], len(saved))


def _gradients_in_memory(call: Call, saved: Tensor, grads: Sequence[Tensor | None], tensors: State) -> list[Tensor]:
    """Return the gradients of all members' results as kernels read them; zeros, the same for all, where there are none.

    Arguments:
        tensors: those of one member.
    """
    shapes = [(1, call.rows, *call.output), *[value.shape for value in call.split(tensors)[1]]]
    return [
        saved.new_zeros(shape).expand(len(saved), *shape) if grad is None else grad.contiguous().resolve_neg()
        for grad, shape in zip(grads, shapes, strict=True)
    ]


def _in_order(call: Call, gradients: Gradients, tensors: State, size: int) -> list[Tensor | None]:
    """Return the members' gradients in the order of one member's tensors."""
    start, end = call.ends[0], call.ends[2]
    indices = call.training.gradients
    result: list[Tensor | None] = [None] * len(tensors)
    result[start:end] = gradients.states
    for index, grad in zip(indices.weights, gradients.weights, strict=True):
        result[end + index] = grad
    for index, grad in zip(indices.inputs, gradients.inputs, strict=True):
        value = tensors[index]
        grad = grad if value.shape[0] == call.steps else grad.sum(1, keepdim=True)
        result[index] = grad.reshape(size, *value.shape)
    return result
