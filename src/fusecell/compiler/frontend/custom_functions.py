"""Custom autograd Functions in a step: intercept them, and check that a later call may apply them again.

Applied to weights alone, a Function is one step of the weight prologue, with its own backward.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import tensors_in
from fusecell.compiler.frontend.isolation import users_line
from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.torch_internals import OPERATOR_TYPE, function_apply

__all__ = ["is_custom_node", "is_of_operator", "intercepted", "plain_arguments", "tensor_results"]

Apply = Callable[..., Any]
"""A Function's ``apply`` as torch has it."""

# Types of constants: values that a later call may be given again.
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), slice, range, np.generic, Enum, type, BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, OPERATOR_TYPE,
)  # fmt: skip


@contextmanager
def intercepted(on_apply: Callable[[type[Any], Sequence[Any], Apply], Any]) -> Iterator[None]:
    """Call ``on_apply(function, arguments, apply)`` in place of every Function that this thread applies in the block.

    The tracer's lock is held meanwhile, and other threads' Functions are applied as always.
    """
    thread = threading.get_ident()
    owner, original = function_apply()
    before = vars(owner).get("apply")

    def apply(function: type[Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs and is_new_style(function):
            bound = inspect.signature(function.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        if threading.get_ident() != thread or kwargs:
            return original(function)(*args, **kwargs)
        return on_apply(function, args, original(function))

    owner.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del owner.apply
        else:
            owner.apply = before


def is_new_style(function: type[Any]) -> bool:
    """Whether a Function's forward takes no context, and so arguments by name."""
    return function.setup_context is not torch.autograd.Function.setup_context


def is_custom_node(node: Any) -> bool:
    """Whether a node of autograd's graph is a custom Function's."""
    return hasattr(node, "_forward_cls")


def is_of_operator(function: type[Any]) -> bool:
    """Whether a Function is torch's own, around an operator with a gradient; the dispatcher sees that operator too."""
    return function.__module__ == "torch._library.autograd"


def plain_arguments(function: type[Any], args: Sequence[Any]) -> None:
    """Raise Untraceable unless all arguments but tensors are constants, which a later call may be given again."""
    for arg in args:
        if not _is_plain(arg):
            raise Untraceable(
                f"The step applies {function.__name__} to a weight and a {type(arg).__name__}, which may be another at "
                f"the next call; give it tensors and numbers{users_line()}."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        # torch finds no tensors in a dict either: a Function doesn't differentiate them.
        return not any(True for _ in tensors_in(list(value.values()))) and all(map(_is_plain, value.values()))
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    return isinstance(value, (*_PLAIN, Tensor))


def tensor_results(function: type[Any], result: Any) -> list[Tensor | None]:
    """Return the results of a Function as a list.

    Raises:
        Untraceable: if one of them is neither a tensor nor None.
    """
    results = [result] if not isinstance(result, tuple | list) else list(result)
    for value in results:
        if value is not None and not isinstance(value, Tensor):
            raise Untraceable(
                f"{function.__name__} makes a {type(value).__name__} of a weight, which would stay what it was at the "
                f"first call; return tensors{users_line()}."
            )
    return results
