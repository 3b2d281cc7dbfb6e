"""The transforms of torch.func and the levels of forward mode that are active, by torch's private names for them.

What :mod:`fusecell.torch_internals` says of private names holds here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from fusecell.torch_internals import apply_directly, forward_ad

__all__ = [
    "FunctorchLevel",
    "apply_at_level",
    "below_functorch",
    "common_to_members",
    "functorch_levels",
    "in_forward_mode",
    "in_functorch_transform",
    "innermost_level",
    "is_batched_gradient",
    "is_transformed",
    "is_wrapped",
    "outside_functorch",
    "sharing_dual_level",
]


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one of torch.func's, around another, and has no memory of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def in_functorch_transform() -> bool:
    """Whether a transform of torch.func is active: tensors may be wrappers without memory then.

    No public function says so.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, or forward-mode differentiation."""
    return in_forward_mode() or in_functorch_transform()


class FunctorchLevel:
    """The innermost transform of torch.func that is active, to be taken off and put back on.

    No public function runs code below a transform, but a Function's own, which knows nothing of tangents and results
    together.

    Attributes:
        kind: ``"Vmap"``, ``"Grad"``, ``"Jvp"`` or ``"Functionalize"``.
    """

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._level: int = interpreter.level()
        self.kind: str = interpreter.key().name

    @property
    def size(self) -> int:
        """The number of members of a vmap."""
        return int(self._interpreter.batch_size())

    def lower(self) -> AbstractContextManager[Any]:
        """Run a ``with`` block below the transform."""
        result: AbstractContextManager[Any] = self._interpreter.lower()
        return result

    def members(self, value: Tensor) -> tuple[Tensor, int | None]:
        """Return what is below a vmap, and the dimension that its members are along; None if they have it in common."""
        return torch._C._functorch._unwrap_batched(value, self._level)

    def of_members(self, value: Tensor, dim: int) -> Tensor:
        """Return a tensor as a vmap has it, of one with its members along a dimension."""
        return torch._C._functorch._add_batch_dim(value, dim, self._level)

    def below(self, value: Tensor) -> Tensor:
        """Return what is below a grad or a jvp."""
        return torch._C._functorch._unwrap_for_grad(value, self._level)

    def above(self, value: Tensor) -> Tensor:
        """Return a tensor as a grad or a jvp has it."""
        return torch._C._functorch._wrap_for_grad(value, self._level)

    def differentiates(self, value: Tensor) -> bool:
        """Whether a grad asks for the gradient of a tensor."""
        return value.requires_grad and self._has(value)

    def wrapped(self, value: Tensor) -> Tensor:
        """Return a tensor as a grad has it, also one that it hasn't seen: its tangents don't show at that level."""
        return value if self._has(value) else self.above(value)

    def _has(self, value: Tensor) -> bool:
        return bool(torch._C._functorch.maybe_get_level(value) == self._level)

    @contextmanager
    def lower_recording(self) -> Iterator[None]:
        """Run a ``with`` block below a grad, from a Function at its level: with the derivatives of what is below."""
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), self._interpreter.lower():
            yield


def functorch_levels() -> list[FunctorchLevel]:
    """Return the transforms of torch.func that are active, the innermost last."""
    if not in_functorch_transform():
        return []
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return [FunctorchLevel(interpreter) for interpreter in retrieve_all_functorch_interpreters()]


def innermost_level() -> FunctorchLevel | None:
    """Return the innermost transform of torch.func that is active; None outside of all."""
    levels = functorch_levels()
    return levels[-1] if levels else None


@contextmanager
def outside_functorch() -> Iterator[None]:
    """Take all transforms of torch.func off for a ``with`` block; ``without_functorch`` lets their checks go on."""
    if not in_functorch_transform():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def below_functorch(value: Tensor) -> tuple[Tensor, bool]:
    """Return a plain tensor in the place of one of torch.func's, the first member of each vmap, and whether any needs
    a gradient."""
    trainable = value.requires_grad
    while is_wrapped(value):
        dim = torch._C._functorch.maybe_get_bdim(value)
        value = torch._C._functorch.get_unwrapped(value)
        value = value if dim < 0 else value.select(dim, 0)
        trainable = trainable or value.requires_grad
    return value, trainable


def common_to_members(value: Tensor) -> Tensor | None:
    """Return a plain tensor in the place of one of torch.func's; None if it differs between members of a vmap."""
    while is_wrapped(value):
        if torch._C._functorch.maybe_get_bdim(value) >= 0:
            return None
        value = torch._C._functorch.get_unwrapped(value)
    return value


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether a tensor is many: ``torch.autograd.grad(..., is_grads_batched=True)`` makes these without torch.func."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(grad))


def in_forward_mode() -> bool:
    """Whether a ``dual_level`` is entered; the module's counter, -1 outside."""
    return forward_ad._current_level >= 0


@contextmanager
def sharing_dual_level() -> Iterator[None]:
    """Let ``torch.func.jvp`` use the ``dual_level`` that a caller has entered: torch has one at a time.

    A jvp inside another does so already. torch counts those, and not the levels that are entered without one.
    """
    if not in_forward_mode() or eager_transforms.JVP_NESTING:
        yield
        return
    eager_transforms.JVP_NESTING += 1
    try:
        yield
    finally:
        eager_transforms.JVP_NESTING -= 1


def apply_at_level(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply a Function at the innermost level of torch.func alone: its tensors are that level's, wrapped."""
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return apply_directly(function)(*args)
