"""ONNX operators in plain torch: what the body of a Scan node is computed with when it has become a cell.

An operator is a function of its attributes and its inputs. Inputs are tensors of rows; NumPy arrays where they are
integers that say how (axes, shapes, indices); Python numbers where they are one number; and None where they are left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATORS", "Operator"]

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]


def _plain(function: Callable[..., Any]) -> Operator:
    """Return the operator of a function that needs no attributes."""
    return lambda attributes, *args: function(*args)


def _all(function: Callable[[Any, Any], Any]) -> Operator:
    """Return the operator that takes any number of inputs, two at a time."""

    def operator(attributes: Attributes, *args: Any) -> Any:
        total = args[0]
        for each in args[1:]:
            total = function(*map(_tensor_like, (total, each), (each, total)))
        return total

    return operator


def _tensor_like(value: Any, other: Any) -> Any:
    """Return a number as a tensor beside another."""
    return value if isinstance(value, Tensor) or not isinstance(other, Tensor) else torch.full_like(other, value)


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    a, b = (value.mT if attributes.get(name, 0) else value for value, name in ((a, "transA"), (b, "transB")))
    product: Tensor = (a @ b) * attributes.get("alpha", 1.0)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _axes(attributes: Attributes, given: Any, value: Any) -> tuple[int, ...]:
    """Return the axes of a reduction: an attribute of older operators, an input of newer ones; all of them if none."""
    axes = attributes.get("axes") if given is None else np.atleast_1d(given).tolist()
    return tuple(axes) if axes else tuple(range(value.dim()))


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def operator(attributes: Attributes, x: Tensor, axes: Any = None) -> Tensor:
        if not _axes(attributes, axes, x) or (axes is None and attributes.get("noop_with_empty_axes", 0)):
            return x
        return function(x, _axes(attributes, axes, x), bool(attributes.get("keepdims", 1)))

    return operator


def _reshape(attributes: Attributes, x: Any, shape: Any) -> Any:
    sizes = [int(size) for size in np.atleast_1d(shape)]
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


def _slice(attributes: Attributes, x: Any, *given: Any) -> Any:
    """Cut out a part: starts, ends, axes and steps are inputs, or attributes of the first version."""
    if not given:
        given = (attributes["starts"], attributes["ends"], attributes.get("axes"))
    starts, ends, axes, steps = [*(None if each is None else np.atleast_1d(each) for each in given), None, None][:4]
    rank = x.ndim
    assert starts is not None
    assert ends is not None
    places = [slice(None)] * rank
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = int(axes[at]) if axes is not None else at
        step = int(steps[at]) if steps is not None else 1
        if step < 0:
            raise ValueError("a slice with a negative step")
        places[axis] = slice(int(start), int(min(end, np.iinfo(np.int32).max)), step)
    return x[tuple(places)]


def _split(attributes: Attributes, x: Tensor, sizes: Any = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    sizes = attributes.get("split") if sizes is None else np.atleast_1d(sizes).tolist()
    if sizes is None:
        count = attributes.get("num_outputs") or attributes["outputs"]
        return torch.split(x, -(-x.shape[axis] // count), axis)
    return torch.split(x, [int(size) for size in sizes], axis)


def _gather(attributes: Attributes, x: Any, index: Any) -> Any:
    axis = attributes.get("axis", 0)
    if isinstance(x, np.ndarray):
        return np.take(x, index, axis)
    if isinstance(index, Tensor):
        return torch.index_select(x, axis, index.reshape(-1)).reshape(
            *x.shape[:axis], *index.shape, *x.shape[axis + 1 :]
        )
    places = np.where(np.asarray(index) < 0, np.asarray(index) + x.shape[axis], index)
    if places.ndim == 0:
        return x.select(axis, int(places))
    flat = x.index_select(axis, torch.as_tensor(places.reshape(-1), dtype=torch.int64))
    axis %= x.dim()
    return flat.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _concat(attributes: Attributes, *args: Any) -> Any:
    if any(isinstance(arg, Tensor) for arg in args):
        return torch.cat([arg if isinstance(arg, Tensor) else torch.as_tensor(arg) for arg in args], attributes["axis"])
    return np.concatenate([np.atleast_1d(arg) for arg in args], attributes["axis"])


def _squeeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    axes = attributes.get("axes") if axes is None else np.atleast_1d(axes).tolist()
    if isinstance(x, np.ndarray):
        return np.squeeze(x, None if axes is None else tuple(axes))
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    axes = attributes.get("axes") if axes is None else np.atleast_1d(axes).tolist()
    if not isinstance(x, Tensor):
        return np.expand_dims(np.asarray(x), tuple(axes))
    for axis in sorted(each % (x.dim() + len(axes)) for each in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(attributes: Attributes, x: Any, shape: Any) -> Any:
    sizes = np.broadcast_shapes(tuple(np.shape(x)), tuple(int(size) for size in np.atleast_1d(shape)))
    return x.expand(sizes) if isinstance(x, Tensor) else torch.full(sizes, float(x))


def _cast(attributes: Attributes, x: Any) -> Any:
    dtype = helper.tensor_dtype_to_np_dtype(attributes["to"])
    if not isinstance(x, Tensor):
        return np.asarray(x).astype(dtype)
    return x.to(getattr(torch, np.dtype(dtype).name)) if attributes["to"] != TensorProto.BOOL else x != 0


def _layer_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Any = None) -> Tensor:
    axis = attributes.get("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], scale.reshape(x.shape[axis:]), bias, attributes.get("epsilon", 1e-5))


def _clip(attributes: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = attributes.get("min", low), attributes.get("max", high)
    return x if low is None and high is None else x.clamp(low, high)


def _shape(attributes: Attributes, x: Any) -> Any:
    sizes = [int(size) for size in np.shape(x)] if not isinstance(x, Tensor) else list(x.shape)
    return np.array(sizes[attributes.get("start", 0) : attributes.get("end")], dtype=np.int64)


def _where(attributes: Attributes, condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y)


def _constant_of_shape(attributes: Attributes, shape: Any) -> Any:
    value = attributes.get("value")
    number = 0.0 if value is None else np.asarray(value).item()
    if isinstance(number, float):
        return torch.full([int(size) for size in np.atleast_1d(shape)], number)
    return np.full([int(size) for size in np.atleast_1d(shape)], number)


OPERATORS: Mapping[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(lambda a, b: a + b),
    "And": _plain(lambda a, b: a & b),
    "Atan": _plain(torch.atan),
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _plain(torch.cos),
    "Cosh": _plain(torch.cosh),
    "Div": _plain(lambda a, b: a // b if isinstance(a, np.ndarray) else a / b),
    "Dropout": lambda attributes, x, *_: x,
    "Einsum": lambda attributes, *args: torch.einsum(attributes["equation"], *args),
    "Elu": lambda attributes, x: F.elu(x, attributes.get("alpha", 1.0)),
    "Equal": _plain(lambda a, b: a == b),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": lambda attributes, x: x.flatten(attributes.get("axis", 1)),
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "Gelu": lambda attributes, x: F.gelu(x, approximate=attributes.get("approximate", "none")),
    "Gemm": _gemm,
    "Greater": _plain(lambda a, b: a > b),
    "GreaterOrEqual": _plain(lambda a, b: a >= b),
    "HardSigmoid": lambda attributes, x: (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(
        0.0, 1.0
    ),
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda attributes, x: F.leaky_relu(x, attributes.get("alpha", 0.01)),
    "Less": _plain(lambda a, b: a < b),
    "LessOrEqual": _plain(lambda a, b: a <= b),
    "Log": _plain(torch.log),
    "LogSoftmax": lambda attributes, x: F.log_softmax(x, attributes.get("axis", -1)),
    "MatMul": _plain(lambda a, b: a @ b),
    "Max": _all(torch.maximum),
    "Mean": lambda attributes, *args: sum(args) / len(args),
    "Min": _all(torch.minimum),
    "Mish": _plain(F.mish),
    "Mul": _plain(lambda a, b: a * b),
    "Neg": _plain(lambda x: -x),
    "Not": _plain(torch.logical_not),
    "Or": _plain(lambda a, b: a | b),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Pow": _plain(lambda a, b: a**b),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Round": _plain(torch.round),
    "Selu": _plain(F.selu),
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Sinh": _plain(torch.sinh),
    "Slice": _slice,
    "Softmax": lambda attributes, x: F.softmax(x, attributes.get("axis", -1)),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(lambda a, b: a - b),
    "Sum": lambda attributes, *args: sum(args[1:], args[0]),
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": lambda attributes, x: torch.where(x > attributes.get("alpha", 1.0), x, 0.0),
    "Transpose": lambda attributes, x: x.permute(*attributes.get("perm", range(x.dim())[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": _plain(lambda a, b: a ^ b),
}
