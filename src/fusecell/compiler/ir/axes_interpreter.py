"""What each primitive that computes along axes does, in torch: the part of the interpreter for `ir.axes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["EVALUATE_AXES", "flat_rows"]

Attrs = Mapping[str, Any]
Rule = Callable[[Sequence[Tensor], Attrs], Tensor]


def flat_rows(value: Tensor, is_weight: bool) -> Tensor:
    """Return a value as (rows, features): a weight, of whatever shape, and what is spread from one is one row."""
    return value.reshape(1, -1) if is_weight or value.dim() == 1 else value


def _accessed(value: Tensor, shape: Sequence[int], access: Attrs) -> Tensor:
    """Return the elements that an access reads of each row: (rows, *shape)."""
    where = torch.tensor(access["offset"])
    for axis, (extent, stride) in enumerate(zip(shape, access["strides"], strict=True)):
        steps = torch.arange(extent) * stride
        where = where + steps.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
    return value[:, where.expand(tuple(shape)).reshape(-1)].reshape(value.shape[0], *shape)


def _gather(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return _accessed(args[0], attrs["shape"], attrs).flatten(1)


def _interleave(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    rows = max(arg.shape[0] for arg in args)
    parts = [arg.expand(rows, -1).reshape(rows, attrs["outer"], -1) for arg in args]
    return torch.cat(parts, 2).flatten(1)


def _by_axes(value: Tensor, attrs: Attrs) -> Tensor:
    return value.reshape(value.shape[0], attrs["outer"], attrs["count"], attrs["inner"])


_REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(2),
    "prod": lambda x: x.prod(2),
    "amax": lambda x: x.amax(2),
    "amin": lambda x: x.amin(2),
    "argmax": lambda x: x.argmax(2).to(x.dtype),
    "argmin": lambda x: x.argmin(2).to(x.dtype),
}
_SCANS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.cumsum(2),
    "prod": lambda x: x.cumprod(2),
    "amax": lambda x: x.cummax(2).values,
    "amin": lambda x: x.cummin(2).values,
}


def _reduce(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return _REDUCTIONS[attrs["op"]](_by_axes(args[0], attrs)).flatten(1)


def _scan(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    value = _by_axes(args[0], attrs)
    if attrs["reverse"]:
        return _SCANS[attrs["op"]](value.flip(2)).flip(2).flatten(1)
    return _SCANS[attrs["op"]](value).flatten(1)


def _operands(args: Sequence[Tensor], attrs: Attrs) -> tuple[Tensor, Tensor]:
    """Return the operands of a contraction as (rows, outputs, terms)."""
    shape = (*attrs["shape"], *attrs["count"])
    outputs = math.prod(attrs["shape"])
    a, b = (
        _accessed(arg, shape, attrs[name]).reshape(arg.shape[0], outputs, -1)
        for arg, name in zip(args, ("a", "b"), strict=True)
    )
    return a, b


def _contract(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    a, b = _operands(args, attrs)
    return (a * b).sum(2)


def _contract_sum(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    a, b = _operands(args, attrs)
    return (a * b).sum((0, 2)).reshape(tuple(attrs["result"]))


def _positions(value: Tensor, attrs: Attrs, count: int) -> Tensor:
    """Return positions as (rows, outer, picks, inner) of integers; what is none, NaN included, is put in range."""
    positions = value.nan_to_num(0.0, count - 1, 0.0).clamp(0, count - 1).long()
    outer, inner, picks = attrs["outer"], attrs["inner"], attrs["picks"]
    if attrs["positions"] == "shared":
        return positions.reshape(-1, 1, picks, 1).expand(-1, outer, picks, inner)
    return positions.reshape(-1, outer, picks, inner)


def _take(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    value, positions = _by_axes(args[0], attrs), _positions(args[1], attrs, attrs["count"])
    rows = max(len(value), len(positions))
    return value.expand(rows, -1, -1, -1).gather(2, positions.expand(rows, -1, -1, -1)).flatten(1)


def _scatter_add(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    positions = _positions(args[0], attrs, attrs["count"])
    values = args[1].reshape(-1, attrs["outer"], attrs["picks"], attrs["inner"])
    rows = max(len(values), len(positions))
    zeros = values.new_zeros(rows, attrs["outer"], attrs["count"], attrs["inner"])
    return zeros.scatter_add(2, positions.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)).flatten(1)


def _scatter_sum(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    each = {**attrs, "outer": 1, "positions": "shared"}
    return _scatter_add(args, each).sum(0).reshape(attrs["count"], attrs["inner"])


def _argsort(args: Sequence[Tensor], attrs: Attrs) -> Tensor:
    value = args[0].reshape(args[0].shape[0], attrs["outer"], attrs["count"])
    order = torch.argsort(value, dim=2, descending=attrs["descending"], stable=True)
    return order[:, :, : attrs.get("first")].to(value.dtype).flatten(1)


EVALUATE_AXES: Mapping[str, Rule] = {
    "view": _gather,
    "gather": _gather,
    "interleave": _interleave,
    "reduce": _reduce,
    "scan": _scan,
    "contract": _contract,
    "take": _take,
    "scatter_add": _scatter_add,
    "argsort": _argsort,
    "contract_sum": _contract_sum,
    "scatter_sum": _scatter_sum,
}
