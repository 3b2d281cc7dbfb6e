"""Arguments of ATen calls: finding and replacing the tensors in them, and a key by which a tensor is recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.traced_values import Complex, ExternalGrad, Row, Sum, Unsupported, Value, Weight

__all__ = ["Key", "call", "key_of", "mapped", "named_arguments", "tensors_in", "values_in", "written_to"]

Key = tuple[Any, ...]


def key_of(tensor: Tensor) -> Key:
    """Return what identifies a tensor's elements: their memory and layout.

    Not its ``id``: autograd hands out saved tensors as new objects.
    """
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make an ATen call, but for one in which torch itself would crash."""
    # Below autograd torch (2.13) reads the memory of a zero tensor times a number, which has none.
    if func is torch.ops.aten.mul.Scalar and args[0]._is_zerotensor():
        return torch._efficientzerotensor(args[0].shape, dtype=args[0].dtype)
    return func(*args, **kwargs)


def mapped(value: Any, change: Callable[[Any], Any], name: str, kind: type = Tensor) -> Any:
    """Return ``value`` with ``change`` applied to every tensor, or instance of ``kind``, in it.

    Arguments:
        name: of the operation whose argument it is.
    """
    if isinstance(value, kind):
        if isinstance(value, Tensor) and name == "lift_fresh":
            return _literal(value, change)
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change, name, kind) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change, name, kind) for item in value]
    return value


def _literal(tensor: Tensor, change: Callable[[Any], Any]) -> Any:
    """Return the argument of ``lift_fresh``, by which torch.tensor(...) wraps data: a number is a constant."""
    # Data of more elements may come from a list outside the step, which can change unseen.
    if tensor.dim() == 0:
        return Weight((), -1, None, float(tensor))
    return change(tensor)


def values_in(value: Any) -> Iterator[Value]:
    """Yield the traced values in nested lists, tuples and dicts."""
    if isinstance(value, Row | Complex | Weight | Sum | ExternalGrad | Unsupported):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_in(item)
    elif isinstance(value, dict):
        yield from values_in(list(value.values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the tensors that a call writes to."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
