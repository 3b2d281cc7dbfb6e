"""The arguments of an ATen call: the tensors in them, and what a tensor is known by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fusecell.compiler.frontend.traced_values import ExternalGrad, Row, Sum, Unsupported, Value, Weight

__all__ = ["Key", "key_of", "mapped", "tensors_in", "values_in"]

Key = tuple[Any, ...]


def key_of(tensor: Tensor) -> Key:
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def mapped(value: Any, change: Callable[[Any], Any], name: str, kind: type = Tensor) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, kind):
        if isinstance(value, Tensor) and name == "lift_fresh":
            return _literal(value, change)
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change, name, kind) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(item, change, name, kind) for item in value]
    return value


def _literal(tensor: Tensor, known: Callable[[Any], Any]) -> Any:
    """What torch.tensor(...) wraps: a number is a constant of the step, anything longer came from elsewhere."""
    if tensor.dim() == 0:
        return Weight((), -1, None, float(tensor))
    return known(tensor)


def values_in(value: Any) -> Iterator[Value]:
    if isinstance(value, Row | Weight | Sum | ExternalGrad | Unsupported):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_in(item)
    elif isinstance(value, dict):
        yield from values_in(list(value.values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
